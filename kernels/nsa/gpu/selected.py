"""Attention over the selected blocks, one block after another over the queries that selected it.

A query's group of heads is too few rows for a matrix product when groups are small, and every block would be read once
a query. Instead a block is read once and the rows are whichever queries chose it, all heads of a group side by
side (row `r` of a part is head `r % G` of pick `r // G`: nothing is padded whatever the group). Each (query, slot) has
its own partial result, in q's dtype, rounded once and summed in float32: no atomics. Chunks of the queries bound the
memory of the partial results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import Sizes
from .common import (
    LARGE_SHARED_MEMORY,
    SMALL_SHARED_MEMORY,
    bytes_a_row,
    cdiv,
    hopper,
    load_tile,
    next_power_of_2,
    padded,
    shared_memory,
    store_tile,
)
from .gates import Outputs, add_gated
from .gather import Chunks, Gather, cut_queries, find_item, first_item, item_steps, launches, picks_a_tile
from .interval import widths
from .launch import Kernel
from .layout import Layout
from .tiles import add_products, dot_tiles, load_tiles, scale_tiles, store_tiles, zero_tiles


def partial_bytes(q: Tensor) -> int:
    """Bytes of partial results that are held at once (more where a single query of one head needs more).

    Larger chunks are faster, but they count in the backward pass's peak: so they grow with the inputs.
    """
    return max(1 << 28, min(1 << 30, 3 * q.numel() * q.element_size()))


def pick_bytes(q: Tensor, v: Tensor) -> int:
    """What one (query, slot)'s partial result takes, of the output or of dq."""
    return q.shape[2] // v.shape[2] * max(q.shape[-1], v.shape[-1]) * q.element_size()


def find_chunks(q: Tensor, v: Tensor, parts: int, slots: int) -> Chunks:
    """How the queries are cut, the same in both passes."""
    return cut_queries(q.shape[0], q.shape[1], v.shape[2], parts, slots, pick_bytes(q, v), partial_bytes(q))


@triton.jit
def pick_rows(order, row, rows, first_pick, HQ, SLOTS: tl.constexpr, G: tl.constexpr, BM: tl.constexpr):
    """Of the BM rows from `row` on of the picks that begin at `order`: whether they are among the first `rows`, the
    query's row, counted from the KV head's first one in the text, and the result's, counted `(query of the chunk, slot,
    head of the group)`. Behind the last one it is that one again, so that all can be read.

    Args:
        first_pick: the chunk's first one.
    """
    r = row + tl.arange(0, BM)
    exists = r < rows
    r = tl.minimum(r, rows - 1).to(tl.uint32)  # without a sign it is divided in fewer steps
    pick = tl.load(order + r // G)
    # 2^31 rows of a text, which would not fit 32 bits, would take 64 GB a tensor
    query = pick.to(tl.uint32) // SLOTS * HQ + r % G
    partial = (pick - first_pick).to(tl.uint32) * G + r % G
    return exists, query.to(tl.int64), partial.to(tl.int64)


@Kernel
def selected_forward_kernel(
    q, k, v, order, offsets, part_first_ptr, part_end_ptr, partial, partial_lse, scale_log2,
    FIRST_LANE, T, S, HQ, HK, BH, PARTS, CHUNK, STEPS,
    G: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, WIDEST: tl.constexpr, PRECISION: tl.constexpr,
):
    """Softmax attention of MOST picks over their part alone: output and log2-sum-exp of each (query, slot, head)."""
    lane = FIRST_LANE + tl.program_id(1)
    part, first, last = find_item(offsets + lane * (PARTS + 1), tl.program_id(0), PARTS, STEPS, MOST)
    if first < last:
        batch, head = lane % BH // HK, lane % HK
        begin = tl.load(part_first_ptr + batch * PARTS + part)
        index = tl.arange(0, BN)
        inside = begin + index < tl.load(part_end_ptr + batch * PARTS + part)
        hide = tl.where(inside, 0.0, float("-inf"))
        origin = (batch.to(tl.int64) * S + begin) * HK + head
        keys = load_tiles(k + origin * DK, index, HK * DK, inside, DK, WIDEST)
        values = load_tiles(v + origin * DV, index, HK * DV, inside, DV, WIDEST)
        q += (batch.to(tl.int64) * T * HQ + head * G) * DK
        place = tl.program_id(1).to(tl.int64) * CHUNK * (SLOTS * G)
        partial += place * DV
        partial_lse += place
        order += first
        first_pick = lane // BH * CHUNK * SLOTS
        rows = (last - first) * G
        every = tl.full([BM], True, tl.int1)
        for row in tl.range(0, rows, BM):
            exists, query, target = pick_rows(order, row, rows, first_pick, HQ, SLOTS, G, BM)
            queries = load_tiles(q, query, DK, every, DK, WIDEST)
            logits = dot_tiles(queries, keys, PRECISION) * scale_log2 + hide[None, :]
            top = tl.max(logits, 1)
            weights = tl.exp2(logits - top[:, None])
            total = tl.sum(weights, 1)
            result = add_products(weights.to(values[0].dtype), values, zero_tiles(BM, DV, WIDEST), PRECISION)
            result = scale_tiles(result, (1.0 / total)[:, None])
            store_tiles(partial, target, DV, exists, result, DV, WIDEST)
            tl.store(partial_lse + target, top + tl.log2(total), mask=exists)


@triton.jit
def chunk_rows(
    relative_ptr, lane, T, HQ, HK, BH, CHUNK, G: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr,
    BLOCK: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, PARTS_A_BLOCK: tl.constexpr,
):
    """Of a program's BM (query, head of the group) of a lane: whether they exist, the row in `[B*T*HQ]`, the row of the
    first slot's result, how many slots hold a pick (those come first, and G rows further is the next one), and whether
    the query is real."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    token = lane // BH * CHUNK + r // G
    exists = (r < CHUNK * G) & (token < T)
    batch, head = lane % BH // HK, lane % HK
    relative = tl.load(relative_ptr + batch * T + token, mask=exists, other=-1)
    blocks = tl.where(relative < 0, 0, relative // BLOCK + 1)
    used = tl.maximum(tl.minimum(blocks, TOPK) - LOCAL, 0) * PARTS_A_BLOCK
    row = (batch * T + token).to(tl.int64) * HQ + head * G + r % G
    source = tl.program_id(1).to(tl.int64) * CHUNK * (SLOTS * G) + r // G * (SLOTS * G) + r % G
    return exists, row, source, used, relative >= 0


@Kernel
def merge_kernel(
    partial, partial_lse, relative_ptr, out_cmp, out_slc, out_win, lse, gates, out, FIRST_LANE, T, HQ, HK, BH, CHUNK,
    DV: tl.constexpr, DVP: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    LOCAL: tl.constexpr, TOPK: tl.constexpr, PARTS_A_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """Adds the partial results to what `out_slc` and `lse` hold of the local blocks: softmax over all of them (eq. 12).
    And writes the gated sum of the branches (eq. 5), as `combine_kernel` does."""
    exists, row, source, used, alive = chunk_rows(
        relative_ptr, FIRST_LANE + tl.program_id(1), T, HQ, HK, BH, CHUNK, G, SLOTS, BM, BLOCK, LOCAL, TOPK,
        PARTS_A_BLOCK,
    )
    acc = load_tile(out_slc, row, DV, exists, DV, DVP).to(tl.float32)
    top = tl.load(lse + row, mask=exists, other=0.0)
    total = tl.full([BM], 1.0, tl.float32)
    # the loads of later slots are under way meanwhile
    for slot in tl.range(0, tl.max(used), num_stages=STAGES):
        here = slot < used
        log_sum = tl.load(partial_lse + source + slot * G, mask=here, other=float("-inf"))
        x = load_tile(partial, source + slot * G, DV, here, DV, DVP).to(tl.float32)
        new = tl.maximum(top, log_sum)
        weight, factor = tl.exp2(log_sum - new), tl.exp2(top - new)
        acc = acc * factor[:, None] + weight[:, None] * x
        total = total * factor + weight
        top = new
    acc = (acc * (1.0 / total)[:, None]).to(out_slc.dtype.element_ty)  # the gate's gradient is of what is rounded
    store_tile(out_slc, row, DV, exists & (used > 0), acc, DV, DVP)
    tl.store(lse + row, top + tl.log2(total), mask=exists & (used > 0))
    summed = add_gated(tl.zeros([BM, DVP], tl.float32), out_cmp, gates, 0, row, alive, DV, DVP)
    gate = tl.load(gates + row * 3 + 1, mask=alive, other=0.0).to(tl.float32)
    summed += gate[:, None] * acc.to(tl.float32)
    summed = add_gated(summed, out_win, gates, 2, row, alive, DV, DVP)
    store_tile(out, row, DV, exists, summed, DV, DVP)


@Kernel
def selected_backward_kernel(
    q, k, v, order, offsets, part_first_ptr, part_end_ptr, dout, records,
    dq_partial, dk_partial, dv_partial, scale_log2, FIRST_LANE, T, S, HQ, HK, BH, PARTS, CHUNK, STEPS,
    G: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, WIDEST: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):
    """Of MOST picks: `dv = p^T dout` and `dk = ds^T q` summed, and `dq = ds k` of each (query, slot, head)."""
    lane = FIRST_LANE + tl.program_id(1)
    part, first, last = find_item(offsets + lane * (PARTS + 1), tl.program_id(0), PARTS, STEPS, MOST)
    if first < last:
        batch, head = lane % BH // HK, lane % HK
        begin = tl.load(part_first_ptr + batch * PARTS + part)
        index = tl.arange(0, BN)
        inside = begin + index < tl.load(part_end_ptr + batch * PARTS + part)
        origin = (batch.to(tl.int64) * S + begin) * HK + head
        keys = load_tiles(k + origin * DK, index, HK * DK, inside, DK, WIDEST)
        values = load_tiles(v + origin * DV, index, HK * DV, inside, DV, WIDEST)
        origin = batch.to(tl.int64) * T * HQ + head * G
        q += origin * DK
        dout += origin * DV
        records += origin * 3
        dq_partial += tl.program_id(1).to(tl.int64) * CHUNK * (SLOTS * G) * DK
        order += first
        first_pick = lane // BH * CHUNK * SLOTS
        rows = (last - first) * G
        every = tl.full([BM], True, tl.int1)
        dk_acc = zero_tiles(BN, DK, WIDEST)
        dv_acc = zero_tiles(BN, DV, WIDEST)
        for row in tl.range(0, rows, BM):
            exists, query, target = pick_rows(order, row, rows, first_pick, HQ, SLOTS, G, BM)
            queries = load_tiles(q, query, DK, every, DK, WIDEST)
            douts = load_tiles(dout, query, DV, every, DV, WIDEST)
            log_sum = tl.load(records + query * 3, mask=exists, other=float("inf"))  # of no weight
            gate = tl.load(records + query * 3 + 1)
            correct = tl.load(records + query * 3 + 2)
            # [BM, BN]: what belongs to a query is then one register a row, not one a column
            logits = dot_tiles(queries, keys, PRECISION) * scale_log2
            dots = dot_tiles(douts, values, PRECISION)
            # no key weighs more than 1. Those outside the part are zeros, which add nothing to dq while their weight is
            # finite, and what is summed of them for dk and dv nobody reads
            p = tl.exp2(tl.minimum(logits - log_sum[:, None], 0.0)) * gate[:, None]
            ds = (p * (dots - correct[:, None])).to(queries[0].dtype)
            dv_acc = add_products(tl.trans(p.to(douts[0].dtype)), douts, dv_acc, PRECISION)
            dk_acc = add_products(tl.trans(ds), queries, dk_acc, PRECISION)
            dq = add_products(ds, keys, zero_tiles(BM, DK, WIDEST), PRECISION)
            store_tiles(dq_partial, target, DK, exists, dq, DK, WIDEST)
        target = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * PART
        store_tiles(dk_partial + target * DK, index, DK, index < PART, dk_acc, DK, WIDEST)
        store_tiles(dv_partial + target * DV, index, DV, index < PART, dv_acc, DV, WIDEST)


@triton.jit
def add_items(
    partial, items, total, factor, tile, rows, row_stride, D: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Adds `factor` times the sum of `partial [items, PART, D]` to WIDTH numbers, the `tile`-th ones, of the first
    `rows` rows of `total`, which stand `row_stride` numbers apart."""
    index = tile * WIDTH + tl.arange(0, WIDTH)
    inside = (index // D < rows) & (index < PART * D)
    target = total + index // D * row_stride + index % D
    before = tl.load(target, mask=inside, other=0.0)
    acc = tl.zeros([WIDTH], tl.float32)
    for item in tl.range(0, items, AT_ONCE):
        several = item + tl.arange(0, AT_ONCE)
        source = several.to(tl.int64) * (PART * D)
        mask = (several < items)[:, None] & inside[None, :]
        acc += tl.sum(tl.load(partial + source[:, None] + index[None, :], mask=mask, other=0.0), 0)
    tl.store(target, before + factor * acc, mask=inside)


@Kernel
def sum_items_kernel(
    dk_partial, dv_partial, offsets, part_first_ptr, part_end_ptr, dk, dv, scale, FIRST_LANE, ITEMS, S, HK, BH, PARTS,
    MOST: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Adds the sums of a part's items, in a fixed order, to `dk` and `dv [B, S, Hk, *]`: WIDTH numbers of one of them.

    Those of dk count `scale` times.
    """
    part, lane = tl.program_id(0), FIRST_LANE + tl.program_id(1)
    batch, head = lane % BH // HK, lane % HK
    begin = tl.load(part_first_ptr + batch * PARTS + part)
    offsets += lane * (PARTS + 1)
    picks = tl.load(offsets + part + 1) - tl.load(offsets + part)
    if picks > 0:
        rows = tl.load(part_end_ptr + batch * PARTS + part) - begin
        place = tl.program_id(1).to(tl.int64) * ITEMS + first_item(offsets, tl.load(offsets), part, PARTS, MOST)
        items = (picks + MOST - 1) // MOST
        row = (batch.to(tl.int64) * S + begin) * HK + head
        OF_DK: tl.constexpr = (PART * DK + WIDTH - 1) // WIDTH
        tile = tl.program_id(2)
        if tile < OF_DK:
            partial = dk_partial + place * (PART * DK)
            add_items(partial, items, dk + row * DK, scale, tile, rows, HK * DK, DK, PART, WIDTH, AT_ONCE)
        else:
            partial = dv_partial + place * (PART * DV)
            add_items(partial, items, dv + row * DV, 1.0, tile - OF_DK, rows, HK * DV, DV, PART, WIDTH, AT_ONCE)


@Kernel
def sum_dq_kernel(
    partial, relative_ptr, dq_in, dq, scale, FIRST_LANE, T, HQ, HK, BH, CHUNK,
    DK: tl.constexpr, DKP: tl.constexpr, G: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    LOCAL: tl.constexpr, TOPK: tl.constexpr, PARTS_A_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """`dq = dq_in + scale * sum of the query's partial results`, in float32, rounded once."""
    exists, row, source, used, _ = chunk_rows(
        relative_ptr, FIRST_LANE + tl.program_id(1), T, HQ, HK, BH, CHUNK, G, SLOTS, BM, BLOCK, LOCAL, TOPK,
        PARTS_A_BLOCK,
    )
    before = load_tile(dq_in, row, DK, exists, DK, DKP)
    acc = tl.zeros([BM, DKP], tl.float32)
    # the loads of later slots are under way meanwhile
    for slot in tl.range(0, tl.max(used), num_stages=STAGES):
        acc += load_tile(partial, source + slot * G, DK, slot < used, DK, DKP).to(tl.float32)
    store_tile(dq, row, DK, exists, acc * scale + before, DK, DKP)


def gather_tiles(q: Tensor, v: Tensor, layout: Layout, backward: bool) -> dict:
    """Tile sizes: all keys of a part, and as many rows as the width of a row and the card's shared memory allow.

    Heads wider than WIDEST are in two tiles: dq is then written one half after the other, and a thread has half as many
    rows to find.
    """
    row, shared = bytes_a_row(q, v.shape[-1]), shared_memory(q.device)
    small, large = shared < SMALL_SHARED_MEMORY, shared >= LARGE_SHARED_MEMORY
    narrow = min(q.shape[-1], v.shape[-1]) <= 128  # keys or values
    if q.dtype == torch.float32:
        tiles = {"BM": 32 if row <= 512 else 16, "num_warps": 4, "num_stages": 1}
    elif row <= 128:
        tiles = {"BM": 64, "num_warps": 4, "num_stages": 5 if large else 3 if backward and not small else 1}
    elif row <= 256 and hopper(q.device):
        # of 80 or 96 numbers the rows of both tiles are found one by one: with a third stage they spill
        stages = 2 if backward and row < 256 else 3
        tiles = {"BM": 64, "WIDEST": 64 if backward else 128, "num_warps": 4, "num_stages": stages}
    elif row <= 256:
        tiles = {"BM": 64, "num_warps": 8 if backward and not large else 4, "num_stages": 1}
    elif row < 512 and (large if backward else not small) and narrow:  # two tiles, as of 192 numbers
        tiles = {"BM": 64, "num_warps": 8 if backward else 4, "num_stages": 2 if backward and hopper(q.device) else 1}
    else:
        little = small or (backward and row < 512 and not large)
        tiles = {"BM": 16 if little else 32, "num_warps": 8 if backward else 4, "num_stages": 1}
    return {"WIDEST": 128, **tiles, "BN": max(16, next_power_of_2(layout.part_size))}


def merge_shape(sizes: Sizes, layout: Layout, group: int, slots: int, dim: int) -> dict:
    """What the kernels that add up a query's partial results are told."""
    return {
        "G": group, "SLOTS": slots, "BLOCK": sizes.block_size, "LOCAL": sizes.local_blocks, "TOPK": sizes.topk,
        "PARTS_A_BLOCK": layout.parts_a_block, "BM": 32 if dim <= 64 else 16, "STAGES": 4, "num_warps": 4,
    }


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, gather: Gather, layout: Layout, sizes: Sizes, scale_log2: float,
    outs: Outputs, lse: Tensor, gates: Tensor,
) -> Tensor:
    """Adds the selected blocks that are not local to the second of the branches' `outs [B, T, Hq, Dv]` and to
    `lse [B, T, Hq]`, which hold those; returns the gated sum of the three, see `combine`."""
    heads, kv_heads, keys, value_dim = q.shape[2], k.shape[2], k.shape[1], v.shape[3]
    group, tokens, chunks = heads // kv_heads, q.shape[1], gather.chunks
    runs = launches(chunks, pick_bytes(q, v), partial_bytes(q))
    tiles = gather_tiles(q, v, layout, backward=False)
    most = picks_a_tile(16 * tiles["BM"], group)
    results = max(count for _, count in runs) * chunks.tokens * chunks.slots * group
    partial, partial_lse = q.new_empty(results, value_dim), q.new_empty(results, dtype=torch.float32)
    out = q.new_empty(*q.shape[:3], value_dim)
    merge = merge_shape(sizes, layout, group, chunks.slots, value_dim)
    per_chunk = chunks.lanes // chunks.count
    for first, count in runs:
        selected_forward_kernel[(gather.items(most), count)](
            q, k, v, gather.order, gather.offsets, layout.part_first, layout.part_end, partial, partial_lse,
            scale_log2, first, tokens, keys, heads, kv_heads, per_chunk, chunks.parts, chunks.tokens,
            item_steps(chunks.parts), G=group, SLOTS=chunks.slots, MOST=most, **widths(q, v), **tiles,
        )
        merge_kernel[(cdiv(chunks.tokens * group, merge["BM"]), count)](
            partial, partial_lse, layout.relative, *outs, lse, gates, out, first, tokens, heads, kv_heads, per_chunk,
            chunks.tokens, DV=value_dim, DVP=padded(value_dim), **merge,
        )
    return out


def selected_backward(
    q: Tensor, k: Tensor, v: Tensor, gather: Gather, layout: Layout, sizes: Sizes, dout: Tensor, records: Tensor,
    scale: float, scale_log2: float, dq_in: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:
    """Writes `dq = dq_in +` its share, and adds its share to dk and dv, `[B, S, Hk, *]` float32.

    Args:
        records: log2-sum-exp, gate and `dout . out` of each query, `[B, T, Hq, 3]` float32.
    """
    heads, kv_heads, keys, key_dim, value_dim = q.shape[2], k.shape[2], k.shape[1], k.shape[3], v.shape[3]
    group, tokens, chunks, part = heads // kv_heads, q.shape[1], gather.chunks, layout.part_size
    runs = launches(chunks, pick_bytes(q, v), partial_bytes(q))
    tiles = gather_tiles(q, v, layout, backward=True)
    most = picks_a_tile(64 * tiles["BM"], group)
    at_once, items = max(count for _, count in runs), gather.items(most)
    dq_partial = q.new_empty(at_once * chunks.tokens * chunks.slots * group, key_dim)
    dk_partial = q.new_empty(at_once, items, part, key_dim, dtype=torch.float32)
    dv_partial = q.new_empty(at_once, items, part, value_dim, dtype=torch.float32)
    merge = merge_shape(sizes, layout, group, chunks.slots, key_dim)
    per_chunk = chunks.lanes // chunks.count
    for first, count in runs:
        selected_backward_kernel[(items, count)](
            q, k, v, gather.order, gather.offsets, layout.part_first, layout.part_end, dout, records, dq_partial,
            dk_partial, dv_partial, scale_log2, first, tokens, keys, heads, kv_heads, per_chunk, chunks.parts,
            chunks.tokens, item_steps(chunks.parts), G=group, SLOTS=chunks.slots, MOST=most, PART=part,
            **widths(q, v), **tiles,
        )
        sum_items_kernel[(chunks.parts, count, cdiv(part * key_dim, 512) + cdiv(part * value_dim, 512))](
            dk_partial, dv_partial, gather.offsets, layout.part_first, layout.part_end, dk, dv, scale, first, items,
            keys, kv_heads, per_chunk, chunks.parts, MOST=most, DK=key_dim, DV=value_dim, PART=part, WIDTH=512,
            AT_ONCE=4, num_warps=4,
        )
        sum_dq_kernel[(cdiv(chunks.tokens * group, merge["BM"]), count)](
            dq_partial, layout.relative, dq_in, dq, scale, first, tokens, heads, kv_heads, per_chunk, chunks.tokens,
            DK=key_dim, DKP=padded(key_dim), **merge,
        )
