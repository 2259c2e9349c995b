"""Attention over the selected blocks, one query after another: for large groups (eq. 12).

The heads of a group share a query's blocks, and enough of them are the rows of a matrix product. Nothing is written
but the result, while the other order (`selected.py`) has a partial result for each query and block; but each query
reads its blocks again, whatever the group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import Sizes
from .common import (
    SMALL_SHARED_MEMORY,
    bytes_a_row,
    next_power_of_2,
    online_softmax_update,
    shared_memory,
)
from .interval import widths
from .launch import Kernel
from .layout import Layout
from .tiles import add_products, dot_tiles, finish_softmax, load_tiles, scale_tiles, store_tiles, zero_tiles

# Heads of a group from which this order is the faster one: partial results grow with the query heads, reading the
# blocks with the KV heads. Groups of 16, 64 heads of 128, 65,536 tokens, H100: 17.4 ms here, 23.6 there with the local
# blocks.
LEAST_GROUP = 12


@triton.jit
def block_step(
    acc, top, total, queries, k, v, begin, inside, HK, scale_log2, DK: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """The keys `[begin, begin + BN)` of the document; all of them seen unless MASKED."""
    index = tl.arange(0, BN)
    keys = load_tiles(k + tl.cast(begin, tl.int64) * HK * DK, index, HK * DK, inside, DK)
    logits = dot_tiles(queries, keys, PRECISION) * scale_log2
    if MASKED:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    weights, factor, top, total = online_softmax_update(top, total, logits)
    values = load_tiles(v + tl.cast(begin, tl.int64) * HK * DV, index, HK * DV, inside, DV)
    acc = add_products(weights.to(values[0].dtype), values, scale_tiles(acc, factor[:, None]), PRECISION)
    return acc, top, total


@Kernel
@triton.jit
def query_major_kernel(
    q, k, v, selection, relative_ptr, document_ptr, out, lse, scale_log2, T, S, HQ, HK, SLOTS,
    DK: tl.constexpr, DV: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one query with all heads of a group, over its blocks; the own block, partly seen, comes last."""
    t = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // HK, tl.program_id(1) % HK
    group = HQ // HK
    relative = tl.load(relative_ptr + batch * T + t)
    document = tl.load(document_ptr + batch * T + t)
    row, index = tl.arange(0, GP), tl.arange(0, BN)
    real = row < tl.where(relative >= 0, group, 0)
    origin = (batch * T + t).to(tl.int64) * HQ + head * group
    queries = load_tiles(q + origin * DK, row, DK, real, DK)
    selection += ((batch * T + t).to(tl.int64) * HK + head) * SLOTS
    k += ((batch.to(tl.int64) * S + document) * HK + head) * DK
    v += ((batch.to(tl.int64) * S + document) * HK + head) * DV
    acc = zero_tiles(GP, DV)
    top = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    # a block is taken in tiles of BN tokens; what stands behind the block belongs to the next one
    TILES_A_BLOCK: tl.constexpr = (BLOCK + BN - 1) // BN
    others = tl.minimum(tl.maximum(relative, 0) // BLOCK, SLOTS - 1)
    for i in tl.range(0, others * TILES_A_BLOCK):
        offset = i % TILES_A_BLOCK * BN
        begin = tl.load(selection + i // TILES_A_BLOCK) * BLOCK + offset
        acc, top, total = block_step(
            acc, top, total, queries, k, v, begin, offset + index < BLOCK, HK, scale_log2, DK, DV, BN, BLOCK % BN != 0,
            PRECISION,
        )
    own = tl.maximum(relative, 0) // BLOCK * BLOCK
    for begin in tl.range(own, relative + 1, BN, num_stages=1):
        acc, top, total = block_step(
            acc, top, total, queries, k, v, begin, begin + index <= relative, HK, scale_log2, DK, DV, BN, True,
            PRECISION,
        )
    result, log_sum = finish_softmax(acc, top, total)
    store_tiles(out + origin * DV, row, DV, row < group, result, DV)
    tl.store(lse + origin + row, log_sum, mask=row < group)


def takes_query_major(q: Tensor, k: Tensor) -> bool:
    """Whether the group is large enough for this order."""
    return q.shape[2] // k.shape[2] >= LEAST_GROUP


def query_major_tiles(q: Tensor, v: Tensor, block_size: int) -> dict:
    """Tile sizes: keys of a block at a time; the rows are the group's heads."""
    wide = q.dtype == torch.float32 or bytes_a_row(q, v.shape[-1]) > 256
    small = shared_memory(q.device) < SMALL_SHARED_MEMORY
    return {
        "BN": max(16, min(32, next_power_of_2(block_size))),
        "num_warps": 4 if wide else 2, "num_stages": 2 if wide or small else 3,
    }


def query_major_forward(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor, layout: Layout, sizes: Sizes, scale_log2: float
) -> tuple[Tensor, Tensor]:
    """Output `[B, T, Hq, Dv]` in q's dtype and log2-sum-exp `[B, T, Hq]` float32 of the selected branch."""
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    query_major_kernel[(tokens, batch * kv_heads)](
        q, k, v, selection, layout.relative, layout.document, out, lse, scale_log2, tokens, k.shape[1], heads,
        kv_heads, selection.shape[-1], GP=max(16, next_power_of_2(heads // kv_heads)), BLOCK=sizes.block_size,
        **widths(q, v), **query_major_tiles(q, v, sizes.block_size),
    )
    return out, lse
