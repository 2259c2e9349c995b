"""Attention of every query over one run of keys `[low, high)`: the window, the compressed blocks and the local blocks.

`low` and `high` are int32 `[B, T]`, neither ever falls from one query of a row to the next that sees anything, and
`low = high = 0` for a query that sees nothing. No key outside the runs is read. No atomics: the same inputs give the
same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    SMALL_SHARED_MEMORY,
    bytes_a_row,
    finish_softmax,
    load_tile,
    online_softmax_update,
    padded,
    precision,
    shared_memory,
    store_tile,
)


@triton.jit
def forward_step(
    acc, top, total, q, k, v, n, last, low, high, k_stride, v_stride, scale_log2,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys `[n, n + BN)`; all of them seen by all queries unless MASKED."""
    index = tl.arange(0, BN)
    inside = (n + index < last) if MASKED else tl.full([BN], True, tl.int1)
    keys = load_tile(k + tl.cast(n, tl.int64) * k_stride, index, k_stride, inside, DK, DKP)
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
    if MASKED:
        seen = (n + index[None, :] >= low[:, None]) & (n + index[None, :] < high[:, None])
        logits = tl.where(seen, logits, float("-inf"))
    weights, factor, top, total = online_softmax_update(top, total, logits)
    values = load_tile(v + tl.cast(n, tl.int64) * v_stride, index, v_stride, inside, DV, DVP)
    acc = tl.dot(weights.to(values.dtype), values, acc * factor[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def tile_bounds(low, high, exists, N, BN: tl.constexpr):
    """Of a tile's runs: their union `[first, last)` and, aligned to BN from `first`, the part that all queries see."""
    sees = high > low
    first = tl.min(tl.where(sees, low, N))
    last = tl.max(tl.where(sees, high, 0))
    # a query that does not exist is never stored: it may see everything
    common_low = tl.max(tl.where(exists, low, 0))
    common_high = tl.min(tl.where(exists, high, N))
    middle = tl.minimum(first + tl.cdiv(tl.maximum(common_low - first, 0), BN) * BN, tl.maximum(first, last))
    end = middle + tl.maximum(common_high - middle, 0) // BN * BN
    return first, middle, end, last


@triton.jit
def interval_forward_kernel(
    q, k, v, low_ptr, high_ptr, out, lse, scale_log2, T, N, HQ, HK,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`out = softmax(q k^T * scale over [low, high)) v` and its log2-sum-exp; one program: BM queries of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest runs first
    batch, head = tl.program_id(1) // HQ, tl.program_id(1) % HQ
    kv_head = head // (HQ // HK)
    rows = tile * BM + tl.arange(0, BM)
    exists = rows < T
    low = tl.load(low_ptr + batch * T + rows, mask=exists, other=0)
    high = tl.load(high_ptr + batch * T + rows, mask=exists, other=0)
    first, middle, end, last = tile_bounds(low, high, exists, N, BN)

    origin = (batch * T + tile * BM).to(tl.int64) * HQ + head
    index = tl.arange(0, BM)
    queries = load_tile(q + origin * DK, index, HQ * DK, exists & (high > low), DK, DKP)
    k += (batch.to(tl.int64) * N * HK + kv_head) * DK
    v += (batch.to(tl.int64) * N * HK + kv_head) * DV
    acc = tl.zeros([BM, DVP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for n in tl.range(first, middle, BN):
        acc, top, total = forward_step(
            acc, top, total, queries, k, v, n, last, low, high, HK * DK, HK * DV, scale_log2,
            DK, DKP, DV, DVP, BN, True, PRECISION,
        )  # fmt: skip
    for n in tl.range(middle, end, BN):
        acc, top, total = forward_step(
            acc, top, total, queries, k, v, n, last, low, high, HK * DK, HK * DV, scale_log2,
            DK, DKP, DV, DVP, BN, False, PRECISION,
        )  # fmt: skip
    for n in tl.range(end, last, BN):
        acc, top, total = forward_step(
            acc, top, total, queries, k, v, n, last, low, high, HK * DK, HK * DV, scale_log2,
            DK, DKP, DV, DVP, BN, True, PRECISION,
        )  # fmt: skip
    result, log_sum = finish_softmax(acc, top, total)
    store_tile(out + origin * DV, index, HQ * DV, exists, result, DV, DVP)
    tl.store(lse + origin + index * HQ, log_sum, mask=exists)


@triton.jit
def weight_gradient(logits, seen, dots, lse, gate, correction):
    """`p` and `ds` of softmax attention whose output enters a sum with weight `gate`; both 0 where not `seen`.

    With `dots = dout v^T`, which must be finite, and `correction = dout . o`: `p = gate * softmax`,
    `ds = p * (dots - correction)`.
    """
    p = tl.exp2(tl.where(seen, logits - lse, float("-inf"))) * gate
    return p, p * (dots - correction)


@triton.jit
def interval_dq_kernel(
    q, k, v, low_ptr, high_ptr, dout, lse, gates, correction, dq, scale, scale_log2, T, N, HQ, HK,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BRANCH: tl.constexpr,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq = scale * sum_n ds k` (added to what `dq` holds if ADD); one program: BM queries of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // HQ, tl.program_id(1) % HQ
    kv_head = head // (HQ // HK)
    rows = tile * BM + tl.arange(0, BM)
    exists = rows < T
    low = tl.load(low_ptr + batch * T + rows, mask=exists, other=0)
    high = tl.load(high_ptr + batch * T + rows, mask=exists, other=0)
    sees = high > low
    first = tl.min(tl.where(sees, low, N))
    last = tl.max(tl.where(sees, high, 0))

    origin = (batch * T + tile * BM).to(tl.int64) * HQ + head
    row = tl.arange(0, BM)
    queries = load_tile(q + origin * DK, row, HQ * DK, sees, DK, DKP)
    douts = load_tile(dout + origin * DV, row, HQ * DV, sees, DV, DVP)
    log_sum = tl.load(lse + origin + row * HQ, mask=sees, other=0.0)
    gate = tl.load(gates + (origin + row * HQ) * 3 + BRANCH, mask=sees, other=0.0).to(tl.float32)
    correct = tl.load(correction + (origin + row * HQ) * 3 + BRANCH, mask=sees, other=0.0)
    k += (batch.to(tl.int64) * N * HK + kv_head) * DK
    v += (batch.to(tl.int64) * N * HK + kv_head) * DV
    acc = tl.zeros([BM, DKP], tl.float32)
    index = tl.arange(0, BN)
    for n in tl.range(first, last, BN):
        inside = n + index < last
        keys = load_tile(k + tl.cast(n, tl.int64) * HK * DK, index, HK * DK, inside, DK, DKP)
        values = load_tile(v + tl.cast(n, tl.int64) * HK * DV, index, HK * DV, inside, DV, DVP)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        dots = tl.dot(douts, tl.trans(values), input_precision=PRECISION)
        seen = (n + index[None, :] >= low[:, None]) & (n + index[None, :] < high[:, None])
        _, ds = weight_gradient(logits, seen, dots, log_sum[:, None], gate[:, None], correct[:, None])
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    acc *= scale
    if ADD:
        acc += load_tile(dq + origin * DK, row, HQ * DK, exists, DK, DKP)
    store_tile(dq + origin * DK, row, HQ * DK, exists, acc, DK, DKP)


@triton.jit
def interval_dkv_kernel(
    q, k, v, low_ptr, high_ptr, first_query, end_query, dout, lse, gates, correction, dk_in, dv_in, dk, dv,
    scale, scale_log2, T, N, HQ, HK, BATCH,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BRANCH: tl.constexpr,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dv = sum p^T dout`, `dk = scale * sum ds^T q` over queries and heads of the group, plus `dv_in`, `dk_in` if ADD.

    One program: BN keys of one KV head and every `num_programs(2)`-th tile of the queries that see any of them.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    batch, kv_head = tl.program_id(1) // HK, tl.program_id(1) % HK
    group = HQ // HK
    start = tile * BN
    index = tl.arange(0, BN)
    exists = start + index < N
    origin = (batch.to(tl.int64) * N + start) * HK + kv_head
    first = tl.load(first_query + batch * tl.num_programs(0) + tile)
    end = tl.load(end_query + batch * tl.num_programs(0) + tile)
    # what none of these queries sees may be anything, NaN too, and is not read
    least = tl.load(low_ptr + batch * T + first, mask=first < end, other=0)
    most = tl.load(high_ptr + batch * T + end - 1, mask=first < end, other=0)
    read = exists & (start + index >= least) & (start + index < most)
    keys = load_tile(k + origin * DK, index, HK * DK, read, DK, DKP)
    values = load_tile(v + origin * DV, index, HK * DV, read, DV, DVP)
    tiles = tl.cdiv(tl.maximum(end - first - split * BM, 0), BM * tl.num_programs(2))

    dk_acc = tl.zeros([BN, DKP], tl.float32)
    dv_acc = tl.zeros([BN, DVP], tl.float32)
    row = tl.arange(0, BM)
    for i in tl.range(0, tiles * group):
        t = first + (split + (i // group) * tl.num_programs(2)) * BM
        low = tl.load(low_ptr + batch * T + t + row, mask=t + row < end, other=0)
        high = tl.load(high_ptr + batch * T + t + row, mask=t + row < end, other=0)
        sees = high > low
        query = (batch * T + t).to(tl.int64) * HQ + kv_head * group + i % group
        queries = load_tile(q + query * DK, row, HQ * DK, sees, DK, DKP)
        douts = load_tile(dout + query * DV, row, HQ * DV, sees, DV, DVP)
        log_sum = tl.load(lse + query + row * HQ, mask=sees, other=0.0)
        gate = tl.load(gates + (query + row * HQ) * 3 + BRANCH, mask=sees, other=0.0).to(tl.float32)
        correct = tl.load(correction + (query + row * HQ) * 3 + BRANCH, mask=sees, other=0.0)
        # [BM, BN]: what belongs to a query is then one register a row, not one a column
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        dots = tl.dot(douts, tl.trans(values), input_precision=PRECISION)
        seen = (start + index[None, :] >= low[:, None]) & (start + index[None, :] < high[:, None])
        p, ds = weight_gradient(logits, seen, dots, log_sum[:, None], gate[:, None], correct[:, None])
        dv_acc = tl.dot(tl.trans(p.to(douts.dtype)), douts, dv_acc, input_precision=PRECISION)
        dk_acc = tl.dot(tl.trans(ds.to(queries.dtype)), queries, dk_acc, input_precision=PRECISION)
    dk_acc *= scale
    if ADD:
        dk_acc += load_tile(dk_in + origin * DK, index, HK * DK, exists, DK, DKP).to(tl.float32)
        dv_acc += load_tile(dv_in + origin * DV, index, HK * DV, exists, DV, DVP).to(tl.float32)
    origin += split.to(tl.int64) * BATCH * N * HK
    store_tile(dk + origin * DK, index, HK * DK, exists, dk_acc, DK, DKP)
    store_tile(dv + origin * DV, index, HK * DV, exists, dv_acc, DV, DVP)


def widths(q: Tensor, v: Tensor) -> dict:
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    return {
        "DK": key_dim, "DKP": padded(key_dim), "DV": value_dim, "DVP": padded(value_dim),
        "PRECISION": precision(q.dtype),
    }  # fmt: skip


def forward_tiles(q: Tensor, v: Tensor) -> dict:
    """Tile sizes of the forward pass, fixed by the width of a row and the card's shared memory."""
    row, small = bytes_a_row(q, v.shape[-1]), shared_memory(q.device) < SMALL_SHARED_MEMORY
    if q.dtype == torch.float32:  # no matrix units: what is in flight are registers
        tiles = {"BM": 32, "BN": 32 if row <= 512 else 16, "num_warps": 4, "num_stages": 1}
    elif row <= 256:
        tiles = {"BM": 128 if row <= 128 else 64, "BN": 64, "num_warps": 4, "num_stages": 2 if small else 3}
    else:
        tiles = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
    return {**tiles, "BM": max(16, min(tiles["BM"], triton.next_power_of_2(q.shape[1])))}


def backward_tiles(q: Tensor, v: Tensor, keys_outside: bool) -> dict:
    """Tile sizes of the backward passes: over the keys for each tile of queries, or the other way round."""
    row, small = bytes_a_row(q, v.shape[-1]), shared_memory(q.device) < SMALL_SHARED_MEMORY
    if q.dtype == torch.float32:
        outer, inner, warps, stages = (32, 16, 4, 1) if row <= 512 else (16, 16, 4, 1)
    elif row <= 256:
        outer, inner, warps, stages = 64, 64, 4, 1 if small and row > 128 else 2
    else:
        outer, inner, warps, stages = (32, 32, 4, 1) if small else (64, 32, 8, 1)
    if keys_outside:
        return {"BN": outer, "BM": inner, "num_warps": warps, "num_stages": stages}
    return {"BM": outer, "BN": inner, "num_warps": warps, "num_stages": stages}


def interval_forward(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale_log2: float) -> tuple:
    """Output `[B, T, Hq, Dv]` in q's dtype and log2-sum-exp `[B, T, Hq]` float32."""
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    tiles = forward_tiles(q, v)
    grid = (triton.cdiv(tokens, tiles["BM"]), batch * heads)
    interval_forward_kernel[grid](
        q, k, v, low, high, out, lse, scale_log2, tokens, k.shape[1], heads, k.shape[2], **widths(q, v), **tiles
    )
    return out, lse


def interval_dq(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, dout: Tensor, lse: Tensor, gates: Tensor,
    correction: Tensor, branch: int, scale: float, scale_log2: float, dq: Tensor, add: bool,
) -> None:  # fmt: skip
    """Writes (or adds) the gradient of the queries into `dq [B, T, Hq, Dk]` float32."""
    batch, tokens, heads, _ = q.shape
    tiles = backward_tiles(q, v, keys_outside=False)
    grid = (triton.cdiv(tokens, tiles["BM"]), batch * heads)
    interval_dq_kernel[grid](
        q, k, v, low, high, dout, lse, gates, correction, dq, scale, scale_log2, tokens, k.shape[1], heads,
        k.shape[2], BRANCH=branch, ADD=add, **widths(q, v), **tiles,
    )  # fmt: skip


def interval_dkv(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, dout: Tensor, lse: Tensor, gates: Tensor,
    correction: Tensor, branch: int, scale: float, scale_log2: float, *, dtype: torch.dtype,
    add: tuple[Tensor, Tensor] | None = None, few_keys: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of keys and values, `[B, N, Hk, *]` in `dtype`, plus `add` where given.

    Args:
        few_keys: there are far fewer keys than queries and each is seen by many of these: the queries are split over
            several programs, whose float32 sums are added in a fixed order.
    """
    batch, tokens, heads, key_dim = q.shape
    keys, kv_heads, value_dim = v.shape[1:]
    if keys == 0:
        return k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    tiles = backward_tiles(q, v, keys_outside=True)
    count = triton.cdiv(keys, tiles["BN"])
    start = torch.arange(count, device=q.device, dtype=torch.int32) * tiles["BN"]
    # the queries that see a tile stand together, since `low` and `high` only rise
    first = torch.searchsorted(high, start.expand(batch, -1).contiguous(), right=True, out_int32=True)
    end = torch.searchsorted(low, (start + tiles["BN"]).expand(batch, -1).contiguous(), out_int32=True)
    splits = 1
    if few_keys:
        splits = max(1, min(triton.cdiv(1024, count * batch * kv_heads), triton.cdiv(tokens, 4 * tiles["BM"])))
    shape = (batch, keys, kv_heads)
    if splits > 1:
        assert add is None
        dk = k.new_empty(splits, *shape, key_dim, dtype=torch.float32)
        dv = k.new_empty(splits, *shape, value_dim, dtype=torch.float32)
    else:
        dk, dv = k.new_empty(*shape, key_dim, dtype=dtype), k.new_empty(*shape, value_dim, dtype=dtype)
    dk_in, dv_in = add if add is not None else (dk, dv)
    interval_dkv_kernel[(count, batch * kv_heads, splits)](
        q, k, v, low, high, first, end, dout, lse, gates, correction, dk_in, dv_in, dk, dv, scale, scale_log2,
        tokens, keys, heads, kv_heads, batch, BRANCH=branch, ADD=add is not None, **widths(q, v), **tiles,
    )  # fmt: skip
    if splits > 1:
        return dk.sum(0).to(dtype), dv.sum(0).to(dtype)
    return dk, dv
