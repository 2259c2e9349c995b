"""Decoding, first launch: the compressed branch in splits, and the scores of every selection block (eqs. 7 to 9).

A split is a share of the entries that a row sees, the same for all splits whatever the row's fill. Compressed block `i`
overlaps the selection block in which it begins, and at most the next one (l <= l'), so the logits need not be kept: per
query, head and block a sum of weights remains, as a logarithm, since the softmax it belongs to is not known yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import Sizes
from .triton_common import (
    SMALL_SHARED_MEMORY,
    begin_next,
    bytes_a_row,
    cdiv,
    load_tile,
    next_power_of_2,
    online_softmax_update,
    overlaps,
    padded,
    precision,
    shared_memory,
    store_tile,
)

# What differs from step to step of a growing cache: nothing is compiled anew for it.
GROWING = ["S", "SW", "SPLITS", "CMP", "ROWS", "TILES"]


@triton.jit
def row_place(starts, lengths, batch, T, S):
    """The first position of the row's tokens, and its first query's position counted from there."""
    start = tl.full([], 0, tl.int32)
    if starts is not None:
        start = tl.load(starts + batch)
    end = S
    if lengths is not None:
        end = tl.load(lengths + batch)
    return start, end - T - start


@triton.jit
def store_partial(partial, partial_lse, row, exists, acc, top, total, DV: tl.constexpr, DVP: tl.constexpr):
    """One split's average and log2-sum-exp; -inf, and no average, for a row that saw nothing."""
    seen = total > 0
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    store_tile(partial, row, DV, exists & seen, acc / tl.where(seen, total, 1.0)[:, None], DV, DVP)
    tl.store(partial_lse + row, lse, mask=exists)


@triton.jit(do_not_specialize=GROWING)
def compressed_kernel(
    q, k, v, starts, lengths, partial, partial_lse, sums, carried, scale_log2, T, S, HQ, HK, ROWS, TILES,
    SPLITS, k_batch, k_token, k_head, v_batch, v_token, v_head,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
    SCORES: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: a split of one KV head's entries, for BM of the rows (query t, head g) at `t * G + g`.

    A cell is the run of at most CELL entries that begin in one selection block, or one of the CELLS runs of a block
    that holds more; a tile of BN places takes whole cells. `sums [B * Hk, TILES, T * G, cells of a tile]` float32: for
    each cell, log2 of the sum of `exp2(logit) * overlap / d` over its entries and, within the tile, over those that
    reach into it from the block before. `carried [B * Hk, TILES + CELLS, T * G]`: what a tile leaves for the block
    after its last one. What a program writes at a time lies together: scattered writes slow the reads down.
    """
    begin_next(OVERLAP)
    RATIO: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = KERNEL // STRIDE
    TILE: tl.constexpr = BN // CELL
    group = HQ // HK
    # programs that read the same entries are neighbours
    row_tiles = (T * group + BM - 1) // BM
    split, pair = tl.program_id(0) // row_tiles % SPLITS, tl.program_id(0) // row_tiles // SPLITS
    batch, kv_head = pair // HK, pair % HK
    r = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    exists = r < T * group
    row = (batch * T + r // group).to(tl.int64) * HQ + kv_head * group + r % group
    _, first_query = row_place(starts, lengths, batch, T, S)
    past = first_query + r // group - (KERNEL - 1)
    visible = tl.where(exists & (past >= 0), past // STRIDE + 1, 0)
    most = tl.max(visible)
    queries = load_tile(q, row, DK, exists & (past >= 0), DK, DKP)
    k += batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v += batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head

    last = tl.maximum(most - 1, 0)
    cells = tl.where(most > 0, last // RATIO * CELLS + last % RATIO // CELL + 1, 0)
    tiles = (cells + TILE - 1) // TILE
    share = (tiles + SPLITS - 1) // SPLITS
    begin = split * share
    index, place = tl.arange(0, BN), tl.arange(0, TILE)
    acc = tl.zeros([BM, DVP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for tile in tl.range(begin, tl.minimum(begin + share, tiles)):
        first = tile * TILE // CELLS * RATIO
        if RATIO == CELL:
            inner, entry = index % CELL, index
        else:
            cell = tile * TILE + index // CELL
            inner = cell % CELLS * CELL + index % CELL
            entry = cell // CELLS * RATIO + inner - first
        inside = (inner < RATIO) & (first + entry < most)
        keys = load_tile(k + first.to(tl.int64) * k_token, entry, k_token, inside, DK, DKP)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2
        seen = inside[None, :] & (first + entry[None, :] < visible[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        weights, factor, top, total = online_softmax_update(top, total, logits)
        values = load_tile(v + first.to(tl.int64) * v_token, entry, v_token, inside, DV, DVP)
        acc = tl.dot(weights.to(values.dtype), values, acc * factor[:, None], input_precision=PRECISION)
        if SCORES:
            safe = tl.where(top == float("-inf"), 0.0, top)
            mine = weights * tl.minimum(RATIO - inner, REACH).to(tl.float32)[None, :]
            mine = tl.sum(tl.reshape(mine, [BM, TILE, CELL]), 2)
            if REACH > 1:
                other = weights * tl.maximum(inner + REACH - RATIO, 0).to(tl.float32)[None, :]
                other = tl.sum(tl.reshape(other, [BM, TILE, CELL]), 2)
                left = tl.gather(other, tl.maximum(place - 1, 0)[None, :] + tl.zeros([BM, 1], tl.int32), 1)
                mine += tl.where(place > 0, left, 0.0)
                rest = tl.sum(tl.where(place == TILE - 1, other, 0.0), 1)
                target = (pair.to(tl.int64) * (TILES + CELLS) + tile + CELLS) * (T * group) + r
                tl.store(carried + target, tl.log2(rest) + safe, mask=exists)
            target = ((pair.to(tl.int64) * TILES + tile) * (T * group) + r)[:, None] * TILE + place[None, :]
            tl.store(sums + target, tl.log2(mine) + safe[:, None], mask=exists[:, None])
    origin = split.to(tl.int64) * ROWS
    store_partial(partial + origin * DV, partial_lse + origin, row, exists, acc, top, total, DV, DVP)


def compressed_tiles(q: Tensor, v: Tensor, rows: int) -> dict[str, int]:
    """Rows and entries of a program at a time: 64 entries of 256 bytes are in flight twice."""
    row, small = bytes_a_row(q, v.shape[-1]), shared_memory(q.device) < SMALL_SHARED_MEMORY
    most = max(16, next_power_of_2(rows))
    if q.dtype == torch.float32:
        tiles = {"BM": 16, "BN": 32 if row <= 256 else 16, "num_warps": 4 if row <= 256 else 8, "num_stages": 2}
    elif row <= 256:
        tiles = {"BM": 32 if small else 64, "BN": 64, "num_warps": 4, "num_stages": 2 if small else 3}
    else:
        tiles = {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 2 if small else 3}
    return {**tiles, "BM": min(tiles["BM"], most)}


def cell_shape(sizes: Sizes, places: int) -> tuple[int, int]:
    """Entries of a cell (a power of two) and cells of a block, where a tile has that many places."""
    ratio = sizes.block_size // sizes.kernel_stride
    cell = min(next_power_of_2(ratio), places)
    return cell, -(-ratio // cell)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of `[B, S, H, D]`, whose numbers of a head are neighbours: those of the rows, tokens and heads."""
    return x.stride(0), x.stride(1), x.stride(2)


def compressed_partials(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, starts: Tensor | None, lengths: Tensor | None, keys: int, sizes: Sizes,
    scale_log2: float, tiles: dict[str, int], splits: int, partial: Tensor, partial_lse: Tensor,
    scores: tuple[Tensor, ...] | None,
) -> None:  # fmt: skip
    """Writes splits 0 to `splits - 1` of `partial [splits.., B, T, Hq, Dv]` and `partial_lse`, and `scores`.

    Args:
        scores: the kernel's `sums` and `carried`; None where they choose nothing.
    """
    batch, tokens, heads, key_dim = q.shape
    kv_heads, value_dim = k_cmp.shape[2], v_cmp.shape[3]
    cell, cells = cell_shape(sizes, tiles["BN"])
    sums, carried = scores or (partial_lse, partial_lse)
    programs = splits * batch * kv_heads * cdiv(tokens * (heads // kv_heads), tiles["BM"])
    compressed_kernel[(programs,)](
        q, k_cmp, v_cmp, starts, lengths, partial, partial_lse, sums, carried, scale_log2, tokens, keys, heads,
        kv_heads, batch * tokens * heads, sums.shape[1], splits, *strides(k_cmp), *strides(v_cmp),
        DK=key_dim, DKP=padded(key_dim), DV=value_dim, DVP=padded(value_dim), KERNEL=sizes.kernel_size,
        STRIDE=sizes.kernel_stride, BLOCK=sizes.block_size, CELL=cell, CELLS=cells, SCORES=scores is not None,
        PRECISION=precision(q.dtype), OVERLAP=overlaps(q.device), **tiles,
    )  # fmt: skip
