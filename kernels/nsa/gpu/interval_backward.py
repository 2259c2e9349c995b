"""The gradients of attention over one run of keys (`interval.py`): of the queries, and of keys and values.

The functions take one branch, or at once two over the same keys whose runs end together: the local blocks and the
window. The first one is the near one, whose keys are few; should they be more, only time is lost. Of the branches are
given, side by side, the runs `[branches, 2, B, T]` and what belongs to a query (log2-sum-exp, gate, `dout . out`),
`rows [branches, B, Hq, 3, T]` float32.

No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LARGE_SHARED_MEMORY,
    SMALL_SHARED_MEMORY,
    bytes_a_row,
    cdiv,
    lower_bound,
    search_steps,
    shared_memory,
)
from .interval import border, first_tile, tile_bounds, widths
from .launch import Kernel
from .layout import Layout
from .tiles import add_products, add_tiles, dot_tiles, load_tiles, scale_tiles, store_tiles, zero_tiles


@triton.jit
def weight_gradient(logits, dots, lse, gate, correction, seen, MASKED: tl.constexpr):
    """`p` and `ds` of softmax attention whose output enters a sum with weight `gate`; both 0 where not `seen`.

    With `dots = dout v^T`, which must be finite, and `correction = dout . o`: `p = gate * softmax`,
    `ds = p * (dots - correction)`. Without MASKED everything is seen.
    """
    p = tl.exp2(logits - lse) * gate
    if MASKED:
        p = tl.where(seen, p, 0.0)
    return p, p * (dots - correction)


@triton.jit
def load_rows(rows, head, t, T, mask):
    """Log2-sum-exp, gate and correction of the queries `t` of head `head` (of all rows), of one branch's `rows`."""
    rows += head.to(tl.int64) * 3 * T + t
    log_sum = tl.load(rows, mask=mask, other=0.0)
    gate = tl.load(rows + T, mask=mask, other=0.0)
    return log_sum, gate, tl.load(rows + 2 * T, mask=mask, other=0.0)


@triton.jit
def halves(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The upper and the lower half of `x [ROWS, WIDTH]`."""
    return tl.split(tl.permute(tl.reshape(x, [2, ROWS // 2, WIDTH]), (1, 2, 0)))


@triton.jit
def load_four(x, stride, t, mask, COUNT: tl.constexpr, BM: tl.constexpr):
    """COUNT of four vectors, `stride` apart, at `t [BM]`.

    They are one tile, and of no fewer numbers than there are threads: what is smaller Triton reads in the layout that
    the products want, each thread 16 or 32 numbers that many others read too. That was a third of all instructions.
    """
    ROWS: tl.constexpr = max(4, 256 // BM)
    which = tl.arange(0, ROWS)[:, None]
    x = tl.load(x + which * stride + t[None, :], mask=mask[None, :] & (which < COUNT), other=0)
    if ROWS == 16:
        x, _ = halves(x, 16, BM)
    if ROWS >= 8:
        x, _ = halves(x, 8, BM)
    upper, lower = halves(x, 4, BM)
    first, second = tl.split(tl.trans(upper))
    third, fourth = tl.split(tl.trans(lower))
    return first, second, third, fourth


@triton.jit
def dq_step(
    acc, queries, douts, k, v, n, lowest, last, low, near_low, high, rows, near_rows, k_stride, v_stride, scale_log2,
    DK: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BOTH: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc + sum_n ds k` over the keys `[n, n + BN)`; all of them in all queries' run unless MASKED.

    Of both branches if BOTH. `rows` and `near_rows` are what `load_rows` gives.
    """
    index = tl.arange(0, BN)
    inside = ((n + index >= lowest) & (n + index < last)) if MASKED else tl.full([BN], True, tl.int1)
    keys = load_tiles(k + tl.cast(n, tl.int64) * k_stride, index, k_stride, inside, DK)
    values = load_tiles(v + tl.cast(n, tl.int64) * v_stride, index, v_stride, inside, DV)
    logits = dot_tiles(queries, keys, PRECISION) * scale_log2
    dots = dot_tiles(douts, values, PRECISION)
    key = n + index[None, :]
    before_end = key < high[:, None]
    log_sum, gate, correction = rows
    _, ds = weight_gradient(
        logits, dots, log_sum[:, None], gate[:, None], correction[:, None], (key >= low[:, None]) & before_end, MASKED
    )
    if BOTH:
        log_sum, gate, correction = near_rows
        _, near_ds = weight_gradient(
            logits, dots, log_sum[:, None], gate[:, None], correction[:, None],
            (key >= near_low[:, None]) & before_end, True,
        )
        ds += near_ds
    return add_products(ds.to(keys[0].dtype), keys, acc, PRECISION)


@Kernel
def interval_dq_kernel(
    q, k, v, runs_ptr, dout, rows_ptr, dq, scale, scale_log2, T, N, HQ, HK,
    DK: tl.constexpr, DV: tl.constexpr, BOTH: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dq = scale * sum_n ds k` (added to what `dq` holds if ADD); one program: BM queries of one head.

    BOTH: of two branches, the near one first.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // HQ, tl.program_id(1) % HQ
    of_runs = (tl.num_programs(1) // HQ).to(tl.int64) * T  # how far low and high are apart
    kv_head = head // (HQ // HK)
    row = tl.arange(0, BM)
    t = tile * BM + row
    exists = t < T
    runs = runs_ptr + batch * T + t
    near_low = tl.load(runs, mask=exists, other=0)
    high = tl.load(runs + of_runs, mask=exists, other=0)
    low = tl.load(runs + 2 * of_runs, mask=exists, other=0) if BOTH else near_low
    lowest, first, middle, end, last = tile_bounds(low, high, exists, N, BN)
    sees = high > low
    if BOTH:
        nearest = tl.min(tl.where(sees, near_low, N))
        lowest = tl.minimum(lowest, nearest)
        first = first_tile(lowest, middle, BN)
        # keys that any query sees by the near branch too are taken as those on the border are
        end = tl.minimum(end, middle + tl.maximum(nearest - middle, 0) // BN * BN)

    origin = (batch * T + tile * BM).to(tl.int64) * HQ + head
    queries = load_tiles(q + origin * DK, row, HQ * DK, sees, DK)
    douts = load_tiles(dout + origin * DV, row, HQ * DV, sees, DV)
    near_rows = load_rows(rows_ptr, batch * HQ + head, t, T, sees)
    far_rows = near_rows
    if BOTH:
        far_rows = load_rows(rows_ptr + of_runs * HQ * 3, batch * HQ + head, t, T, sees)
    k += (batch.to(tl.int64) * N * HK + kv_head) * DK
    v += (batch.to(tl.int64) * N * HK + kv_head) * DV
    acc = zero_tiles(BM, DK)
    for n in tl.range(middle, end, BN):
        acc = dq_step(
            acc, queries, douts, k, v, n, lowest, last, low, near_low, high, far_rows, near_rows, HK * DK, HK * DV,
            scale_log2, DK, DV, BN, False, False, PRECISION,
        )
    for i in tl.range(0, middle - first + tl.maximum(last - end, 0), BN):
        acc = dq_step(
            acc, queries, douts, k, v, border(i, first, middle, end), lowest, last, low, near_low, high, far_rows,
            near_rows, HK * DK, HK * DV, scale_log2, DK, DV, BN, BOTH, True, PRECISION,
        )
    acc = scale_tiles(acc, scale)
    if ADD:
        acc = add_tiles(acc, load_tiles(dq + origin * DK, row, HQ * DK, exists, DK))
    store_tiles(dq + origin * DK, row, HQ * DK, exists, acc, DK)


@triton.jit
def dkv_step(
    dk_acc, dv_acc, keys, values, q, dout, runs, rows, t, stop, start, batch, head, of_runs, scale_log2, T, HQ,
    DK: tl.constexpr, DV: tl.constexpr, BOTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds `ds^T q` and `p^T dout` of the queries `[t, t + BM)` before `stop`.

    Of both branches if BOTH; without MASKED only of the last one, by which all see all keys, and none by the near one.
    Everything is transposed, `[BN, BM]`, so that `p^T` and `ds^T` go from registers into the products.
    """
    row = tl.arange(0, BM)
    exists = (t + row < stop) if MASKED else tl.full([BM], True, tl.int1)
    query = (batch * T + t).to(tl.int64) * HQ + head
    queries = load_tiles(q + query * DK, row, HQ * DK, exists, DK)
    douts = load_tiles(dout + query * DV, row, HQ * DV, exists, DV)
    logits = dot_tiles(keys, queries, PRECISION) * scale_log2
    dots = dot_tiles(values, douts, PRECISION)
    # behind the products, or what is read would be in registers all the while
    rows += (batch * HQ + head).to(tl.int64) * 3 * T
    last = rows + of_runs * HQ * 3 if BOTH else rows
    log_sum, gate, correction, _ = load_four(last, T, t + row, exists, 3, BM)
    seen, near_seen = exists[None, :], exists[None, :]
    if MASKED:
        near_low, high, low, _ = load_four(runs + batch * T, of_runs, t + row, exists, 3 if BOTH else 2, BM)
        if not BOTH:
            low = near_low
        key = start + tl.arange(0, BN)[:, None]
        before_end = key < high[None, :]
        seen = (key >= low[None, :]) & before_end
        near_seen = (key >= near_low[None, :]) & before_end
    p, ds = weight_gradient(logits, dots, log_sum[None, :], gate[None, :], correction[None, :], seen, MASKED)
    if BOTH and MASKED:
        near_log_sum, near_gate, near_correction, _ = load_four(rows, T, t + row, exists, 3, BM)
        near_p, near_ds = weight_gradient(
            logits, dots, near_log_sum[None, :], near_gate[None, :], near_correction[None, :], near_seen, True
        )
        p += near_p
        ds += near_ds
    dv_acc = add_products(p.to(douts[0].dtype), douts, dv_acc, PRECISION)
    dk_acc = add_products(ds.to(queries[0].dtype), queries, dk_acc, PRECISION)
    return dk_acc, dv_acc


@triton.jit
def next_head(which, head, splits, group):
    """The next of a group's heads, and after the last one the first of the next tile. (A division takes longer.)"""
    more = head + 1 < group
    return tl.where(more, which, which + splits), tl.where(more, head + 1, 0)


@Kernel
def interval_dkv_kernel(
    q, k, v, runs_ptr, borders, dout, rows_ptr, dk_in, dv_in, dk, dv, scale, scale_log2, T, N, HQ, HK, TILES,
    DK: tl.constexpr, DV: tl.constexpr, BOTH: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dv = sum p^T dout`, `dk = scale * sum ds^T q` over queries and heads of the group, plus `dv_in`, `dk_in` if ADD.

    One program: BN keys of one KV head and every `num_programs(2)`-th tile of the queries that see any of them.
    BOTH: of two branches, the near one first.
    """
    tile, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    batch, kv_head = tl.program_id(1) // HK, tl.program_id(1) % HK
    batches, group = tl.num_programs(1) // HK, HQ // HK
    of_runs = batches.to(tl.int64) * T  # how far low and high are apart
    start = tile * BN
    index = tl.arange(0, BN)
    exists = start + index < N
    origin = (batch.to(tl.int64) * N + start) * HK + kv_head
    borders += (batch * TILES + tile) * 4
    near_end = tl.load(borders + 3)
    if BOTH:
        borders += batches * TILES * 4
    first, middle = tl.load(borders), tl.load(borders + 1)
    middle_end, end = tl.load(borders + 2), tl.load(borders + 3)
    stop = tl.maximum(end, near_end)
    if BOTH:
        # queries up to the last one that sees a key by the near branch are taken as those on the border are
        middle = tl.minimum(first + tl.cdiv(near_end - first, BM) * BM, stop)
    middle_end = middle + tl.maximum(middle_end - middle, 0) // BM * BM
    # what none of these queries sees may be anything, NaN too, and is not read
    least = tl.load(runs_ptr + batch * T + first, mask=first < stop, other=0)
    most = tl.load(runs_ptr + of_runs + batch * T + stop - 1, mask=first < stop, other=0)
    if BOTH:
        least = tl.minimum(least, tl.load(runs_ptr + 2 * of_runs + batch * T + first, mask=first < stop, other=0))
    read = exists & (start + index >= least) & (start + index < most)
    keys = load_tiles(k + origin * DK, index, HK * DK, read, DK)
    values = load_tiles(v + origin * DV, index, HK * DV, read, DV)

    dk_acc = zero_tiles(BN, DK)
    dv_acc = zero_tiles(BN, DV)
    # tiles of queries that all see all keys; of each tile the heads one after another
    tiles = tl.cdiv(tl.maximum((middle_end - middle) // BM - split, 0), splits)
    which, head = split, 0
    for _ in tl.range(0, tiles * group):
        dk_acc, dv_acc = dkv_step(
            dk_acc, dv_acc, keys, values, q, dout, runs_ptr, rows_ptr, middle + which * BM, end, start, batch,
            kv_head * group + head, of_runs, scale_log2, T, HQ, DK, DV, BOTH, BM, BN, False, PRECISION,
        )
        which, head = next_head(which, head, splits, group)
    # those on either side
    before = tl.cdiv(middle - first, BM)
    tiles = tl.cdiv(tl.maximum(before + tl.cdiv(tl.maximum(end - middle_end, 0), BM) - split, 0), splits)
    which, head = split, 0
    for _ in tl.range(0, tiles * group):
        dk_acc, dv_acc = dkv_step(
            dk_acc, dv_acc, keys, values, q, dout, runs_ptr, rows_ptr,
            tl.where(which < before, first + which * BM, middle_end + (which - before) * BM),
            tl.where(which < before, middle, end), start, batch, kv_head * group + head, of_runs, scale_log2, T, HQ,
            DK, DV, BOTH, BM, BN, True, PRECISION,
        )
        which, head = next_head(which, head, splits, group)
    dk_acc = scale_tiles(dk_acc, scale)
    if ADD:
        dk_acc = add_tiles(dk_acc, load_tiles(dk_in + origin * DK, index, HK * DK, exists, DK))
        dv_acc = add_tiles(dv_acc, load_tiles(dv_in + origin * DV, index, HK * DV, exists, DV))
    origin += split.to(tl.int64) * batches * N * HK
    store_tiles(dk + origin * DK, index, HK * DK, exists, dk_acc, DK)
    store_tiles(dv + origin * DV, index, HK * DV, exists, dv_acc, DV)


def backward_tiles(q: Tensor, v: Tensor, keys_outside: bool) -> dict:
    """Tile sizes of the backward passes: over the keys for each tile of queries, or the other way round."""
    row, shared = bytes_a_row(q, v.shape[-1]), shared_memory(q.device)
    small, large = shared < SMALL_SHARED_MEMORY, shared >= LARGE_SHARED_MEMORY
    narrow = min(q.shape[-1], v.shape[-1]) <= 128  # keys or values
    if q.dtype == torch.float32:
        outer, inner, warps, stages = (32, 16, 4, 1) if row <= 512 else (16, 16, 4, 1)
    elif 256 < row < 512 and not keys_outside and not small:  # two tiles, as of 192 numbers
        outer, inner, warps, stages = 128, 64 if narrow else 32 if large else 16, 8, 2
    elif 256 < row < 512 and narrow and not small:
        outer, inner, warps, stages = (128, 32, 8, 3) if large else (128, 16, 8, 2)
    elif row > 256:
        outer, inner, warps, stages = (32, 32, 4, 1) if small else (64, 32, 8, 2 if keys_outside else 1)
    elif not keys_outside:
        outer, inner, warps, stages = 64, 64, 4, 1 if small and row > 128 else 2
    elif row <= 128:
        outer, inner, warps, stages = (128, 64, 8, 3) if large else (64, 64, 4, 2 if small else 3)
    else:
        outer, inner, warps, stages = (64, 32, 4, 2) if small else (128, 64, 8, 3) if large else (128, 32, 8, 3)
    names = ("BN", "BM") if keys_outside else ("BM", "BN")
    tiles = {names[0]: outer, names[1]: inner, "num_warps": warps, "num_stages": stages}
    # For an A100 and heads of 128 the assembler gave a program of 8 warps 32 registers, unless told how many there are.
    return {**tiles, "maxnreg": 255} if keys_outside and warps == 8 else tiles


def interval_dq(
    q: Tensor, k: Tensor, v: Tensor, runs: Tensor, dout: Tensor, rows: Tensor, scale: float, scale_log2: float,
    dq: Tensor, *, add: bool,
) -> None:
    """Writes (or adds) the gradient of the queries into `dq [B, T, Hq, Dk]` float32.

    Args:
        runs, rows: of one branch or two, see above.
    """
    batch, tokens, heads, _ = q.shape
    tiles = backward_tiles(q, v, keys_outside=False)
    grid = (cdiv(tokens, tiles["BM"]), batch * heads)
    interval_dq_kernel[grid](
        q, k, v, runs, dout, rows, dq, scale, scale_log2, tokens, k.shape[1], heads, k.shape[2],
        BOTH=len(runs) == 2, ADD=add, **widths(q, v), **tiles,
    )


@Kernel
def borders_kernel(
    runs_ptr, borders, T, TILES, STEPS, BN: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Of the runs `[low, high)` in `runs_ptr [3, 2, B, T]` and each tile of BN keys, `borders [3, B, TILES, 4]`: first,
    middle, middle_end, end. The queries `[first, end)` see any of them, and those `[middle, middle_end)` all. They
    stand together, since `low` and `high` only rise."""
    batch, branch = tl.program_id(1), tl.program_id(2)
    tile = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    low = runs_ptr + (branch * 2 * tl.num_programs(1) + batch) * T
    high = low + tl.num_programs(1) * T
    start = tile * BN
    first = lower_bound(high, T, start + 1, STEPS)
    middle = lower_bound(high, T, start + BN, STEPS)
    middle_end = lower_bound(low, T, start + 1, STEPS)
    end = tl.maximum(lower_bound(low, T, start + BN, STEPS), first)
    middle = tl.minimum(middle, end)
    middle_end = tl.minimum(middle_end, end)
    borders += ((branch * tl.num_programs(1) + batch) * TILES + tile) * 4
    tl.store(borders, first, mask=tile < TILES)
    tl.store(borders + 1, middle, mask=tile < TILES)
    tl.store(borders + 2, middle_end, mask=tile < TILES)
    tl.store(borders + 3, end, mask=tile < TILES)


def find_borders(q: Tensor, v: Tensor, layout: Layout, keys: int) -> Tensor:
    """Which queries see the tiles of keys that `interval_dkv` takes, for the layout's three kinds of runs:
    `[3, B, tiles, 4]` int32.

    Args:
        keys: most keys of any.
    """
    tiles = backward_tiles(q, v, keys_outside=True)
    batch, tokens = layout.relative.shape
    count = cdiv(keys, tiles["BN"])
    borders = layout.runs.new_empty(3, batch, count, 4)
    borders_kernel[(cdiv(count, 64), batch, 3)](
        layout.runs, borders, tokens, count, search_steps(tokens), BN=tiles["BN"], AT_ONCE=64, num_warps=2,
    )
    return borders


@triton.jit
def sum_split(partial, out, tile, numbers, SPLITS, BM: tl.constexpr):
    """BM numbers of `out [numbers]`, the sum of `partial [SPLITS, numbers]` in order, rounded once."""
    index = tile.to(tl.int64) * BM + tl.arange(0, BM)
    acc = tl.zeros([BM], tl.float32)
    for _ in tl.range(0, SPLITS):
        acc += tl.load(partial + index, mask=index < numbers, other=0.0)
        partial += numbers
    tl.store(out + index, acc.to(out.dtype.element_ty), mask=index < numbers)


@Kernel
def sum_splits_kernel(
    dk_partial, dv_partial, dk, dv, ROWS, SPLITS, DK: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr
):
    """Sums of both, of ROWS keys: tiles of dk, then of dv."""
    rows = tl.cast(ROWS, tl.int64)
    tile, of_dk = tl.program_id(0), tl.cdiv(rows * DK, BM).to(tl.int32)
    if tile < of_dk:
        sum_split(dk_partial, dk, tile, rows * DK, SPLITS, BM)
    else:
        sum_split(dv_partial, dv, tile - of_dk, rows * DV, SPLITS, BM)


def sum_splits(dk_partial: Tensor, dv_partial: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sums of two tensors `[splits, ...]` float32 over the splits, in `dtype`."""
    dk, dv = (torch.empty_like(partial[0], dtype=dtype) for partial in (dk_partial, dv_partial))
    grid = (cdiv(dk.numel(), 512) + cdiv(dv.numel(), 512),)
    sum_splits_kernel[grid](
        dk_partial, dv_partial, dk, dv, dk.shape[:-1].numel(), len(dk_partial), DK=dk.shape[-1], DV=dv.shape[-1],
        BM=512, num_warps=4,
    )
    return dk, dv


def interval_dkv(
    q: Tensor, k: Tensor, v: Tensor, runs: Tensor, dout: Tensor, rows: Tensor, scale: float, scale_log2: float,
    borders: Tensor, *, dtype: torch.dtype, add: tuple[Tensor, Tensor] | None = None, few_keys: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of keys and values, `[B, N, Hk, *]` in `dtype`, plus `add` where given.

    Args:
        runs, rows: of one branch or two, see above.
        borders: as `find_borders` gives them for these runs, `[branches, B, tiles, 4]` int32.
        few_keys: there are far fewer keys than queries and each is seen by many of these: the queries are split over
            several programs, whose float32 sums are added in a fixed order.
    """
    batch, tokens, heads, key_dim = q.shape
    keys, kv_heads, value_dim = v.shape[1:]
    if keys == 0:
        return k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    tiles = backward_tiles(q, v, keys_outside=True)
    count = cdiv(keys, tiles["BN"])
    splits = 1
    if few_keys:
        splits = max(1, min(cdiv(1024, count * batch * kv_heads), cdiv(tokens, 4 * tiles["BM"])))
    shape = (batch, keys, kv_heads)
    if splits > 1:
        assert add is None
        dk = k.new_empty(splits, *shape, key_dim, dtype=torch.float32)
        dv = k.new_empty(splits, *shape, value_dim, dtype=torch.float32)
    else:
        dk, dv = k.new_empty(*shape, key_dim, dtype=dtype), k.new_empty(*shape, value_dim, dtype=dtype)
    dk_in, dv_in = add if add is not None else (dk, dv)
    interval_dkv_kernel[(count, batch * kv_heads, splits)](
        q, k, v, runs, borders, dout, rows, dk_in, dv_in, dk, dv, scale, scale_log2, tokens, keys, heads, kv_heads,
        borders.shape[2], BOTH=len(runs) == 2, ADD=add is not None, **widths(q, v), **tiles,
    )
    if splits > 1:
        return sum_splits(dk, dv, dtype)
    return dk, dv
