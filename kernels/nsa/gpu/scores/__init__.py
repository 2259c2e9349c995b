"""How blocks are scored and chosen: one scorer a file.

A scorer is one function `(inputs, layout, sizes) -> selection`. It gets what it alone reads (a `NamedTuple` of its own,
`CompressedInputs` or `IndexInputs`), where every query and block stands (`Layout`), and the sizes. It gives the
selection `[B, T, Hk, topk]` int32: of each query and KV head the block numbers, counted from the row's or document's
start, ascending, with the forced blocks among them and -1 for unused places, which come last; of equal scores the lower
number is taken. It has no gradient. The selected branch reads the selection and nothing else of the scorer.
"""
