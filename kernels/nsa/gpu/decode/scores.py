"""Decoding, first launch: the compressed branch in splits, and the scores of every selection block (eqs. 7 to 9).

A split is a share of the entries that a row sees, the same for all splits whatever the row's fill. Compressed block `i`
overlaps the selection block in which it begins, and at most the next one (l <= l'), so the logits need not be kept: per
query, head and block a sum of weights remains, beside the logit that they are relative to: the softmax they belong to
is not known yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...placement import Placement
from ...sizes import Sizes
from ..common import (
    SMALL_SHARED_MEMORY,
    begin_next,
    bytes_a_row,
    cdiv,
    in_chain,
    load_tile,
    next_power_of_2,
    padded,
    precision,
    shared_memory,
    store_tile,
)
from .splits import split_count

# What differs from step to step of a growing cache: nothing is compiled anew for it.
GROWING = ["S", "SW", "SPLITS", "CMP", "ROWS", "TILES", "CHUNKS", "BLOCKS"]


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
def rows_of_split(T, heads, HK, SPLITS, BM: tl.constexpr):
    """What a program is for: a split, the row of the batch, the KV head, and BM of its rows (query t, head g).

    Programs that read the same past are neighbours.

    Returns:
        The split; `pair`, batch * HK + KV head, and both of these; `r [BM]`, the rows at `t * G + g`; which of them
        exist; and `row [BM]` int64, where each stands in `[B, T, heads]`.
    """
    group = heads // HK
    row_tiles = (T * group + BM - 1) // BM
    split, pair = tl.program_id(0) // row_tiles % SPLITS, tl.program_id(0) // row_tiles // SPLITS
    batch, kv_head = pair // HK, pair % HK
    r = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    row = (batch * T + r // group).to(tl.int64) * heads + kv_head * group + r % group
    return split, pair, batch, kv_head, r, r < T * group, row


@triton.jit
def softmax_step(top, total, logits):
    """`online_softmax_update` with `total [M, N]`, summed at the end only: each sum over N waits for all warps."""
    new = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(logits - safe[:, None])
    factor = tl.exp2(top - safe)
    return weights, factor, new, total * factor[:, None] + weights


@triton.jit
def store_partial(partial, partial_lse, row, exists, acc, top, total, DV: tl.constexpr, DVP: tl.constexpr):
    """One split's average and log2-sum-exp; -inf, and no average, for a row that saw nothing."""
    total = tl.sum(total, 1)
    seen = total > 0
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    store_tile(partial, row, DV, exists & seen, acc / tl.where(seen, total, 1.0)[:, None], DV, DVP)
    tl.store(partial_lse + row, lse, mask=exists)


@triton.jit(do_not_specialize=GROWING)
def compressed_kernel(
    q, k, v, starts, lengths, partial, partial_lse, sums, carried, tops, arrived, scale_log2, T, S, HQ, HK, ROWS, TILES,
    SPLITS, k_batch, k_token, k_head, v_batch, v_token, v_head,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
    SCORES: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One program: a split of one KV head's entries, for BM of the rows (query t, head g) at `t * G + g`.

    A cell is the run of at most CELL entries that begin in one selection block, or one of the CELLS runs of a block
    that holds more; a tile of BN places takes whole cells. `sums [B * Hk, TILES, T * G, cells of a tile]` float32: for
    each cell the sum of `exp2(logit - top) * overlap / d` over its entries and, within the tile, over those that reach
    into it from the block before. `carried` and `tops [B * Hk, TILES, T * G]`: what a tile leaves for the block after
    its last one, and its `top`, the largest logit of the split up to there. `arrived [B, T, Hk]` is set to 0. What a
    program writes at a time lies together: scattered writes slow the reads down.
    """
    RATIO: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = KERNEL // STRIDE
    TILE: tl.constexpr = BN // CELL
    group = HQ // HK
    split, pair, batch, kv_head, r, exists, row = rows_of_split(T, HQ, HK, SPLITS, BM)
    if split == 0:
        tl.store(arrived + (batch * T + r // group) * HK + kv_head, 0, mask=exists & (r % group == 0))
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
    total = tl.zeros([BM, BN], tl.float32)
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
        weights, factor, top, total = softmax_step(top, total, logits)
        values = load_tile(v + first.to(tl.int64) * v_token, entry, v_token, inside, DV, DVP)
        acc = tl.dot(weights.to(values.dtype), values, acc * factor[:, None], input_precision=PRECISION)
        if SCORES:
            target = (pair.to(tl.int64) * TILES + tile) * (T * group) + r
            safe = tl.where(top == float("-inf"), 0.0, top)
            tl.store(tops + target, safe, mask=exists, eviction_policy="evict_last")
            mine = weights * tl.minimum(RATIO - inner, REACH).to(tl.float32)[None, :]
            mine = tl.sum(tl.reshape(mine, [BM, TILE, CELL]), 2)
            if REACH > 1:
                other = weights * tl.maximum(inner + REACH - RATIO, 0).to(tl.float32)[None, :]
                other = tl.sum(tl.reshape(other, [BM, TILE, CELL]), 2)
                # of the last cell, what is left for the next tile comes to the first place
                before = tl.gather(other, ((place + TILE - 1) % TILE)[None, :] + tl.zeros([BM, 1], tl.int32), 1)
                mine += tl.where(place > 0, before, 0.0)
                only, rest = exists[:, None] & (place == 0)[None, :], carried + target[:, None] + 0 * place[None, :]
                tl.store(rest, before, mask=only, eviction_policy="evict_last")
            target = target[:, None] * TILE + place[None, :]
            tl.store(sums + target, mine, mask=exists[:, None], eviction_policy="evict_last")
    begin_next(OVERLAP)
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


class CompressedScores(NamedTuple):
    """What the selection needs: the kernel's `sums`, `carried` and `tops`, and the splits' log2-sum-exps.

    Attributes:
        sums, carried, tops: see the kernel.
        lse: `[at least splits, B, T, Hq]`.
        splits: how many there are.
        cells: entries of a cell, cells of a block, cells of a tile.
    """

    sums: Tensor
    carried: Tensor
    tops: Tensor
    lse: Tensor
    splits: int
    cells: tuple[int, int, int]


class CompressedShape(NamedTuple):
    """How the compressed branch is cut.

    Attributes:
        tile: `compressed_tiles`.
        cells: entries of a cell, cells of a block, cells of a tile.
        tiles: how many of them a row has at most.
        splits: programs that share them.
    """

    tile: dict[str, int]
    cells: tuple[int, int, int]
    tiles: int
    splits: int


def compressed_shape(q: Tensor, v_cmp: Tensor, blocks: int, sizes: Sizes) -> CompressedShape:
    """How the compressed branch of `q [B, T, Hq, Dk]` is cut, where a row has at most so many blocks."""
    (batch, tokens, heads, _), kv_heads = q.shape, v_cmp.shape[2]
    rows = tokens * (heads // kv_heads)
    tile = compressed_tiles(q, v_cmp, rows)
    cell, cells = cell_shape(sizes, tile["BN"])
    tiles = cdiv(blocks * cells, tile["BN"] // cell)
    splits = split_count(batch * kv_heads * cdiv(rows, tile["BM"]), tiles, q.device)
    return CompressedShape(tile, (cell, cells, tile["BN"] // cell), tiles, splits)


def compressed_partials(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, placement: Placement, keys: int, sizes: Sizes, scale_log2: float,
    shape: CompressedShape, partial: Tensor, partial_lse: Tensor, chooses: bool, arrived: Tensor,
) -> CompressedScores | None:
    """Writes the first splits of `partial [splits.., B, T, Hq, Dv]` and `partial_lse`, and zeros to
    `arrived [B, T, Hk]` int32.

    Returns:
        The scores; None where it `chooses` nothing.
    """
    batch, tokens, heads, key_dim = q.shape
    kv_heads, value_dim = k_cmp.shape[2], v_cmp.shape[3]
    (tile, cells, tiles, splits), rows = shape, tokens * (heads // kv_heads)
    sums = carried = tops = partial_lse
    if chooses:
        # float32 for 16-bit inputs too: in float16 blocks that nearly tie change places, in 24 bits it is slower
        sums, carried, tops = (
            partial_lse.new_empty(batch * kv_heads, tiles, *more) for more in ((rows, cells[2]), (rows,), (rows,))
        )
    programs = splits * batch * kv_heads * cdiv(rows, tile["BM"])
    compressed_kernel[(programs,)](
        q, k_cmp, v_cmp, placement.starts, placement.lengths, partial, partial_lse, sums, carried, tops, arrived,
        scale_log2, tokens, keys, heads, kv_heads, batch * tokens * heads, sums.shape[1], splits, *strides(k_cmp),
        *strides(v_cmp), DK=key_dim, DKP=padded(key_dim), DV=value_dim, DVP=padded(value_dim), KERNEL=sizes.kernel_size,
        STRIDE=sizes.kernel_stride, BLOCK=sizes.block_size, CELL=cells[0], CELLS=cells[1], SCORES=chooses,
        PRECISION=precision(q.dtype), **tile, **in_chain(q.device, first=True),
    )
    return CompressedScores(sums, carried, tops, partial_lse, splits, cells) if chooses else None
