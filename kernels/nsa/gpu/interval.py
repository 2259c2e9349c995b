"""Attention of every query over one run of keys `[low, high)`: the window, the entries and the local blocks.

`low` and `high` are int32 `[B, T]`, neither ever falls from one query of a row to the next that sees anything, and
`low = high = 0` for a query that sees nothing. No key outside the runs is read. No atomics: the same inputs give the
same bits.

Two branches over the same keys whose runs end together, as window and local blocks do, are taken at once: the longer
softmax goes on where the shorter one is done.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    SMALL_SHARED_MEMORY,
    bytes_a_row,
    cdiv,
    next_power_of_2,
    online_softmax_update,
    precision,
    shared_memory,
)
from .launch import Kernel
from .tiles import add_products, dot_tiles, finish_softmax, load_tiles, scale_tiles, store_tiles, zero_tiles


@triton.jit
def forward_step(
    acc, top, total, q, k, v, n, lowest, last, low, high, k_stride, v_stride, scale_log2,
    DK: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """The keys `[n, n + BN)`; all of them seen by all queries unless MASKED."""
    index = tl.arange(0, BN)
    inside = ((n + index >= lowest) & (n + index < last)) if MASKED else tl.full([BN], True, tl.int1)
    keys = load_tiles(k + tl.cast(n, tl.int64) * k_stride, index, k_stride, inside, DK)
    logits = dot_tiles(q, keys, PRECISION) * scale_log2
    if MASKED:
        seen = (n + index[None, :] >= low[:, None]) & (n + index[None, :] < high[:, None])
        logits = tl.where(seen, logits, float("-inf"))
    weights, factor, top, total = online_softmax_update(top, total, logits)
    values = load_tiles(v + tl.cast(n, tl.int64) * v_stride, index, v_stride, inside, DV)
    acc = add_products(weights.to(values[0].dtype), values, scale_tiles(acc, factor[:, None]), PRECISION)
    return acc, top, total


@triton.jit
def tile_bounds(low, high, exists, N, BN: tl.constexpr):
    """Of a tile's runs: their union `[lowest, last)` and, a multiple of BN, the part `[middle, end)` that all see.

    Tiles of BN keys begin at `first`, at `lowest` or less than BN before it, and one of them at `middle`.
    """
    sees = high > low
    lowest = tl.min(tl.where(sees, low, N))
    last = tl.max(tl.where(sees, high, 0))
    # a query that does not exist is never stored: it may see everything
    common_low = tl.max(tl.where(exists, low, 0))
    common_high = tl.min(tl.where(exists, high, N))
    common = tl.maximum(common_high - common_low, 0) // BN * BN
    middle = tl.where(common > 0, common_low, lowest)
    return lowest, first_tile(lowest, middle, BN), middle, middle + common, last


@triton.jit
def first_tile(lowest, middle, BN: tl.constexpr):
    """Where tiles of BN keys begin that hold `lowest` and of which one begins at `middle`."""
    return middle - tl.cdiv(middle - lowest, BN) * BN


@triton.jit
def border(i, first, middle, end):
    """Where the `i`-th number of `[first, middle)` and, going on, of `[end, ...)` stands."""
    return tl.where(i < middle - first, first + i, end + i - (middle - first))


@Kernel
def interval_forward_kernel(
    q, k, v, low_ptr, high_ptr, near_low_ptr, out, lse, near_out, near_lse, scale_log2, T, N, HQ, HK,
    DK: tl.constexpr, DV: tl.constexpr, BOTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out = softmax(q k^T * scale over [low, high)) v` and its log2-sum-exp; one program: BM queries of one head.

    BOTH: of the runs `[near_low, high)` too, which lie within the others: `near_out` and `near_lse`.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest runs first
    batch, head = tl.program_id(1) // HQ, tl.program_id(1) % HQ
    kv_head = head // (HQ // HK)
    rows = tile * BM + tl.arange(0, BM)
    exists = rows < T
    low = tl.load(low_ptr + batch * T + rows, mask=exists, other=0)
    high = tl.load(high_ptr + batch * T + rows, mask=exists, other=0)
    sees = high > low

    origin = (batch * T + tile * BM).to(tl.int64) * HQ + head
    index = tl.arange(0, BM)
    queries = load_tiles(q + origin * DK, index, HQ * DK, sees, DK)
    k += (batch.to(tl.int64) * N * HK + kv_head) * DK
    v += (batch.to(tl.int64) * N * HK + kv_head) * DV
    acc = zero_tiles(BM, DV)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if BOTH:
        near_low = tl.load(near_low_ptr + batch * T + rows, mask=exists, other=0)
        lowest = tl.min(tl.where(sees, near_low, N))
        last = tl.max(tl.where(sees, high, 0))
        for n in tl.range(lowest, last, BN):
            acc, top, total = forward_step(
                acc, top, total, queries, k, v, n, lowest, last, near_low, high, HK * DK, HK * DV, scale_log2, DK, DV,
                BN, True, PRECISION,
            )
        result, log_sum = finish_softmax(acc, top, total)
        store_tiles(near_out + origin * DV, index, HQ * DV, exists, result, DV)
        tl.store(near_lse + origin + index * HQ, log_sum, mask=exists)
        high = near_low  # the keys that are left
    lowest, first, middle, end, last = tile_bounds(low, high, exists, N, BN)
    for n in tl.range(middle, end, BN):
        acc, top, total = forward_step(
            acc, top, total, queries, k, v, n, lowest, last, low, high, HK * DK, HK * DV, scale_log2, DK, DV, BN,
            False, PRECISION,
        )
    # what only some see, on either side
    for i in tl.range(0, middle - first + tl.maximum(last - end, 0), BN):
        acc, top, total = forward_step(
            acc, top, total, queries, k, v, border(i, first, middle, end), lowest, last, low, high, HK * DK, HK * DV,
            scale_log2, DK, DV, BN, True, PRECISION,
        )
    result, log_sum = finish_softmax(acc, top, total)
    store_tiles(out + origin * DV, index, HQ * DV, exists, result, DV)
    tl.store(lse + origin + index * HQ, log_sum, mask=exists)


def widths(q: Tensor, v: Tensor) -> dict:
    """What every kernel is told: numbers of a key and of a value, and how products are taken."""
    return {"DK": q.shape[-1], "DV": v.shape[-1], "PRECISION": precision(q.dtype)}


def forward_tiles(q: Tensor, v: Tensor, long_runs: bool) -> dict:
    """Tile sizes of the forward pass, fixed by the width of a row and the card's shared memory."""
    row, small = bytes_a_row(q, v.shape[-1]), shared_memory(q.device) < SMALL_SHARED_MEMORY
    if q.dtype == torch.float32:  # no matrix units: what is in flight are registers
        tiles = {"BM": 32, "BN": 32 if row <= 512 else 16, "num_warps": 4, "num_stages": 1}
    elif 128 < row <= 256 and long_runs and not small:
        tiles = {"BM": 128, "BN": 128, "num_warps": 8, "num_stages": 3}
    elif row <= 256:
        tiles = {"BM": 128 if row <= 128 else 64, "BN": 64, "num_warps": 4, "num_stages": 2 if small else 3}
    elif row < 512 and not small:  # two tiles, as of 192 numbers
        tiles = {"BM": 128 if long_runs else 64, "BN": 64, "num_warps": 8 if long_runs else 4, "num_stages": 2}
    else:
        tiles = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
    return {**tiles, "BM": max(16, min(tiles["BM"], next_power_of_2(q.shape[1])))}


def interval_forward(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale_log2: float, *, long_runs: bool = False,
    near: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Output `[B, T, Hq, Dv]` in q's dtype and log2-sum-exp `[B, T, Hq]` float32; those of `near` behind them.

    Args:
        long_runs: most runs are many tiles long, so that larger tiles pay.
        near: where the runs of another branch begin, `[B, T]`: they end as the others do and are no longer.
    """
    batch, tokens, heads, _ = q.shape
    found = [
        q.new_empty(batch, tokens, heads, *dim, dtype=dtype)
        for _ in range(1 if near is None else 2)
        for dim, dtype in (((v.shape[-1],), q.dtype), ((), torch.float32))
    ]
    tiles = forward_tiles(q, v, long_runs and tokens >= 1024)
    grid = (cdiv(tokens, tiles["BM"]), batch * heads)
    interval_forward_kernel[grid](
        q, k, v, low, high, low if near is None else near, *found[:2], *found[-2:], scale_log2, tokens, k.shape[1],
        heads, k.shape[2], BOTH=near is not None, **widths(q, v), **tiles,
    )
    return tuple(found)
