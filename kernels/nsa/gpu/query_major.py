"""Attention over the selected blocks, one query after another: for large groups (eq. 12).

The heads of a group share a query's blocks, and enough of them are the rows of a matrix product. Nothing is written
but the result, while the other order (`selected.py`) has a partial result for each query and block; but each query
reads its blocks again, whatever the group. The local blocks are attended to as runs of keys (`interval.py`); here are
the others, all of whose keys lie before the query.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..sizes import Sizes
from .common import (
    LARGE_SHARED_MEMORY,
    SMALL_SHARED_MEMORY,
    bytes_a_row,
    next_power_of_2,
    online_softmax_update,
    shared_memory,
)
from .interval import widths
from .launch import Kernel
from .layout import Layout
from .tiles import add_products, add_tiles, dot_tiles, load_tiles, scale_tiles, store_tiles, zero_tiles

# Heads of a group from which this order is the faster one: partial results grow with the query heads, reading the
# blocks with the KV heads. Groups of 16, 64 heads of 128, 65,536 tokens, H100: 14.9 ms here; half as many heads take
# 8.5 there.
LEAST_GROUP = 12


@Kernel
def query_major_kernel(
    q, k, v, selection, relative_ptr, document_ptr, out, lse, scale_log2, T, S, HQ, HK,
    DK: tl.constexpr, DV: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr,
    TOPK: tl.constexpr, PRECISION: tl.constexpr,
):
    """One program: one query with all heads of a group, over its blocks that are not local, added to what `out` and
    `lse` hold of those."""
    t = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // HK, tl.program_id(1) % HK
    group = HQ // HK
    # a block is taken in tiles of BN tokens; what stands behind the block belongs to the next one
    TILES_A_BLOCK: tl.constexpr = (BLOCK + BN - 1) // BN
    relative = tl.load(relative_ptr + batch * T + t)
    tiles = (tl.minimum(relative // BLOCK + 1, TOPK) - LOCAL) * TILES_A_BLOCK
    if (relative >= 0) & (tiles > 0):
        document = tl.load(document_ptr + batch * T + t)
        row, index = tl.arange(0, GP), tl.arange(0, BN)
        real = row < group
        origin = (batch * T + t).to(tl.int64) * HQ + head * group
        queries = load_tiles(q + origin * DK, row, DK, real, DK)
        selection += ((batch * T + t).to(tl.int64) * HK + head) * TOPK
        k += ((batch.to(tl.int64) * S + document) * HK + head) * DK
        v += ((batch.to(tl.int64) * S + document) * HK + head) * DV
        acc = add_tiles(zero_tiles(GP, DV), load_tiles(out + origin * DV, row, DV, real, DV))
        top = tl.load(lse + origin + row, mask=real, other=0.0)
        total = tl.full([GP], 1.0, tl.float32)
        for i in tl.range(0, tiles):
            offset = i % TILES_A_BLOCK * BN
            begin = (tl.load(selection + i // TILES_A_BLOCK) * BLOCK + offset).to(tl.int64)
            inside = (offset + index < BLOCK) if BLOCK % BN != 0 else tl.full([BN], True, tl.int1)
            keys = load_tiles(k + begin * HK * DK, index, HK * DK, inside, DK)
            logits = dot_tiles(queries, keys, PRECISION) * scale_log2
            if BLOCK % BN != 0:
                logits = tl.where(inside[None, :], logits, float("-inf"))
            weights, factor, top, total = online_softmax_update(top, total, logits)
            values = load_tiles(v + begin * HK * DV, index, HK * DV, inside, DV)
            acc = add_products(weights.to(values[0].dtype), values, scale_tiles(acc, factor[:, None]), PRECISION)
        store_tiles(out + origin * DV, row, DV, real, scale_tiles(acc, (1.0 / total)[:, None]), DV)
        tl.store(lse + origin + row, top + tl.log2(total), mask=real)


def takes_query_major(q: Tensor, k: Tensor) -> bool:
    """Whether the group is large enough for this order."""
    return q.shape[2] // k.shape[2] >= LEAST_GROUP


def query_major_tiles(q: Tensor, v: Tensor, block_size: int) -> dict:
    """Tile sizes: keys of a block at a time; the rows are the group's heads."""
    wide = q.dtype == torch.float32 or bytes_a_row(q, v.shape[-1]) > 256
    shared = shared_memory(q.device)
    stages = 2 if wide or shared < SMALL_SHARED_MEMORY else 5 if shared >= LARGE_SHARED_MEMORY else 3
    return {
        "BN": max(16, min(32, next_power_of_2(block_size))), "num_warps": 4 if wide else 2, "num_stages": stages
    }


def query_major_forward(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor, layout: Layout, sizes: Sizes, scale_log2: float, out: Tensor,
    lse: Tensor,
) -> None:
    """Adds the selected blocks that are not local to `out [B, T, Hq, Dv]` and `lse [B, T, Hq]`, which hold those."""
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    query_major_kernel[(tokens, batch * kv_heads)](
        q, k, v, selection, layout.relative, layout.document, out, lse, scale_log2, tokens, k.shape[1], heads,
        kv_heads, GP=max(16, next_power_of_2(heads // kv_heads)), BLOCK=sizes.block_size, LOCAL=sizes.local_blocks,
        TOPK=sizes.topk, **widths(q, v), **query_major_tiles(q, v, sizes.block_size),
    )
