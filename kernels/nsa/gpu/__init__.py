"""The operation on a GPU, in Triton: forward and backward.

Words of this folder, each with one meaning:

    part     a selection block, or a share of a larger one: at most 64 tokens, 32 in float32
    slot     a place of a query's selection, for each part of the block in it
    pick     a (query, slot) pair that is in use: a part that a query selected
    lane     one KV head of one row with one chunk of queries: what picks are sorted within
    item     some picks of one part: what one program takes
    bundle   blocks ranked together by the best of them (decoding)
    cell     the entries that begin in one selection block, or some of them (decoding)
"""
