"""Decoding with an index, first launch: the largest product of each index head with the keys of each block, in splits.

Nothing but the index's own keys is read of the past, in 16 or 8 bits. What each head's maxima are counted from, its
largest of all, is known when all splits have ended: the selection takes care of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...placement import Placement
from ...sizes import Sizes
from ..common import begin_next, cdiv, in_chain, next_power_of_2, precision, tile_width, wait_for_previous
from ..scores.index import block_maxima
from ..scores.selection import count_blocks
from ..tiles import load_tiles
from .scores import GROWING, row_place, rows_of_split, strides
from .splits import split_count

# Programs that a processor holds at a time: each has little in flight.
RESIDENT = 8


@triton.jit(do_not_specialize=GROWING)
def index_maxima_kernel(
    q, k, scales, starts, lengths, maxima, tops, arrived, T, S, HI, HK, HJ, BLOCKS, SPLITS, k_batch, k_token, k_head,
    s_batch, s_token, s_head, C: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One program: a split of one KV head's blocks, for BM of the rows (query t, index head g) at `t * G + g`.

    `maxima [B * Hk, BLOCKS, T, GP]` float32, of the blocks before a row's own, -inf for the others up to the last one
    that any row sees; `tops [B * Hk, SPLITS, T, GP]`, each row's largest in the split. GP is G or more, a power of two,
    so that the heads of a query are read together. `arrived [B, T, Hk]` is set to 0.
    """
    group = HI // HK
    split, pair, batch, kv_head, r, exists, row = rows_of_split(T, HI, HK, SPLITS, BM)
    start, first_query = row_place(starts, lengths, batch, T, S)
    relative = first_query + r // group
    seeing = exists & (relative >= 0)
    own = tl.where(seeing, relative // BLOCK, 0)
    most = tl.max(own)
    queries = load_tiles(q, row, C, seeing, C)
    key_head = (kv_head * HJ // HK).to(tl.int64)
    k += batch.to(tl.int64) * k_batch + key_head * k_head + start.to(tl.int64) * k_token
    if scales is not None:
        scales += batch.to(tl.int64) * s_batch + key_head * s_head + start.to(tl.int64) * s_token
    place = r // group * GP + r % group
    maxima += pair.to(tl.int64) * BLOCKS * T * GP + place[:, None]
    share = ((most + BJ - 1) // BJ + SPLITS - 1) // SPLITS * BJ
    top = tl.full([BM], float("-inf"), tl.float32)
    for first in tl.range(split * share, tl.minimum((split + 1) * share, most), BJ):
        m = block_maxima(
            queries, k, scales, first * BLOCK, most - first, k_token, s_token, C, BM, BJ, BLOCK, WIDTH, True, PRECISION
        )
        j = first + tl.arange(0, BJ)
        m = tl.where(j[None, :] < own[:, None], m, float("-inf"))
        top = tl.maximum(top, tl.max(m, 1))
        tl.store(maxima + j[None, :] * (T * GP), m, mask=exists[:, None] & (j < most)[None, :])
    wait_for_previous(OVERLAP)
    begin_next(OVERLAP)
    tl.store(tops + (pair * SPLITS + split).to(tl.int64) * T * GP + place, top, mask=exists)
    if split == 0:
        tl.store(arrived + (batch * T + r // group) * HK + kv_head, 0, mask=exists & (r % group == 0))


class IndexScores(NamedTuple):
    """What the selection needs: the kernel's `maxima` and `tops`, and the number of index heads."""

    maxima: Tensor
    tops: Tensor
    heads: int


def index_tiles(q_index: Tensor, rows: int) -> dict[str, int]:
    """Rows and tokens of a program at a time."""
    wide = tile_width(q_index.shape[-1]) * q_index.element_size() > 256
    most = max(16, next_power_of_2(rows))
    if q_index.dtype == torch.float32:
        return {"BM": 16, "BN": 32 if wide else 64, "num_warps": 4, "num_stages": 2}
    return {"BM": min(64, most), "BN": 64 if wide else 128, "num_warps": 2 if most <= 16 else 4, "num_stages": 3}


def index_maxima(
    q_index: Tensor, k_index: Tensor, scales: Tensor | None, kv_heads: int, placement: Placement, sizes: Sizes,
    arrived: Tensor, first: bool,
) -> IndexScores:
    """The maxima of all blocks, and zeros in `arrived [B, T, Hk]` int32.

    Args:
        q_index: `[B, T, Hi, c]`, contiguous.
        k_index: `[B, S, Hj, c]`, Hj = Hk or 1, in q_index's dtype or int8; any strides but that of c.
        scales: `[B, S, Hj]` bfloat16 with int8 keys.
        first: whether this launch is the chain's first.
    """
    (batch, tokens, heads, channels), (keys, index_keys) = q_index.shape, k_index.shape[1:3]
    blocks, rows = count_blocks(keys, sizes), tokens * (heads // kv_heads)
    tiles = index_tiles(q_index, rows)
    width = min(tiles["BN"], max(16, next_power_of_2(sizes.block_size)))
    at_once, row_tiles = tiles.pop("BN") // width, cdiv(rows, tiles["BM"])
    splits = split_count(batch * kv_heads * row_tiles, cdiv(blocks, at_once), q_index.device, RESIDENT)
    heads_a_query = next_power_of_2(heads // kv_heads)
    maxima = q_index.new_empty(batch * kv_heads, blocks, tokens, heads_a_query, dtype=torch.float32)
    tops = q_index.new_empty(batch * kv_heads, splits, tokens, heads_a_query, dtype=torch.float32)
    index_maxima_kernel[(splits * batch * kv_heads * row_tiles,)](
        q_index, k_index, scales, placement.starts, placement.lengths, maxima, tops, arrived, tokens, keys, heads,
        kv_heads, index_keys, blocks, splits, *strides(k_index), *((0, 0, 0) if scales is None else strides(scales)),
        C=channels, GP=heads_a_query, BJ=at_once, BLOCK=sizes.block_size, WIDTH=width,
        PRECISION=precision(q_index.dtype), **tiles, **in_chain(q_index.device, first),
    )
    return IndexScores(maxima, tops, heads)
