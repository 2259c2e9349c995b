"""Blocks chosen by an index: the largest `q_index . k_index` of each block, no exponential, in one pass over the keys.

A program holds the index queries of some tokens with all heads of a group and walks over the past blocks. When the walk
is over, each head's maxima are counted from its largest, the heads become one, and the best blocks are taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import Sizes
from ..common import (
    SMALL_SHARED_MEMORY,
    next_power_of_2,
    precision,
    shared_memory,
    tile_width,
)
from ..launch import Kernel
from ..layout import Layout
from ..tiles import dot_tiles, load_tiles
from .selection import (
    as_neighbours,
    check_limits,
    find_tile,
    new_scratch,
    new_selection,
    plan_selection,
    store_best,
    store_forced,
    store_scores,
    store_sections,
)


@triton.jit
def block_maxima(
    q, k, scales, first_token, blocks, k_token, s_token, C: tl.constexpr, ROWS: tl.constexpr, BJ: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """The largest product of each query with the keys of each of BJ blocks, `[ROWS, BJ]` float32.

    Args:
        scales: of keys in 8 bits, `s_token` apart; None for others.
        first_token: of the first block.
        blocks: how many of them there are, read with MASKED only; what is said of the others means nothing.
    """
    # In a product of the matrix units the columns 8 i + 2 n and 8 i + 2 n + 1 belong to the n-th of four threads: these
    # are of one block, so that each thread finds a block's maximum alone.
    SIDE: tl.constexpr = min(BJ, 4)
    column = tl.arange(0, BJ * WIDTH)
    block = column // (WIDTH * SIDE) * SIDE + column // 2 % SIDE
    first_token = tl.cast(first_token, tl.int64)
    k += first_token * k_token
    m = tl.full([ROWS, BJ], float("-inf"), tl.float32)
    # blocks of more than WIDTH tokens in several steps, smaller ones several at a time
    for step in tl.static_range((BLOCK + WIDTH - 1) // WIDTH):
        place = step * WIDTH + column // (2 * SIDE) % (WIDTH // 2) * 2 + column % 2
        inside = place < BLOCK
        if MASKED:
            inside = inside & (block < blocks)
        token = block * BLOCK + place
        keys = load_tiles(k, token, k_token, inside, C)
        # whole numbers up to 127 are exact in every type
        products = dot_tiles(q, keys, PRECISION)
        if scales is not None:
            scale = tl.load(scales + (first_token + token) * s_token, mask=inside, other=0.0)
            products *= scale.to(tl.float32)[None, :]
        if BLOCK % WIDTH != 0:
            products = tl.where((place < BLOCK)[None, :], products, float("-inf"))
        products = tl.reshape(products, [ROWS, BJ // SIDE, WIDTH // 2, SIDE, 2])
        m = tl.maximum(m, tl.reshape(tl.max(tl.max(products, 4), 2), [ROWS, BJ]))
    return m


@triton.jit
def score_document(
    q, k, base, row_own, own, mine, exists, maxima, scores, sections, most, k_token, N, C: tl.constexpr,
    BT: tl.constexpr, GP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, BC: tl.constexpr, SECTION: tl.constexpr, PRECISION: tl.constexpr,
):
    """Scores of the blocks of one document for its queries, `mine`; `most`: blocks that any of them has behind it."""
    NONE: tl.constexpr = float("-inf")
    ROWS: tl.constexpr = BT * GP
    row = tl.arange(0, ROWS)
    tops = tl.full([ROWS, BJ], NONE, tl.float32)
    # blocks that are past for every query
    all_past = tl.minimum(tl.min(tl.where(mine, own, most)), most) // BJ * BJ
    for first in tl.range(0, all_past, BJ):
        m = block_maxima(
            q, k, None, base + first * BLOCK, BJ, k_token, 0, C, ROWS, BJ, BLOCK, WIDTH, False, PRECISION
        )
        tops = tl.maximum(tops, m)
        j = first + tl.arange(0, BJ)
        tl.store(maxima + j[None, :].to(tl.int64) * ROWS + row[:, None], m)
    for first in tl.range(all_past, most, BJ):
        j = first + tl.arange(0, BJ)
        left = most - first
        m = block_maxima(
            q, k, None, base + first * BLOCK, left, k_token, 0, C, ROWS, BJ, BLOCK, WIDTH, True, PRECISION
        )
        tops = tl.maximum(tops, tl.where(j[None, :] < row_own[:, None], m, NONE))
        tl.store(maxima + j[None, :].to(tl.int64) * ROWS + row[:, None], m, mask=(j < most)[None, :])
    tl.debug_barrier()

    # one score a token and block
    if PRECISION == "ieee":
        tops = as_neighbours(tops)
    top = tl.where(exists, tl.max(tops, 1), float("inf"))
    for first in tl.range(0, most, BC):
        j = first + tl.arange(0, BC)[None, :]
        m = tl.load(maxima + j.to(tl.int64) * ROWS + row[:, None], mask=j < most, other=NONE)
        score = tl.max(tl.reshape(m - top[:, None], [BT, GP, BC]), 1)
        choosable = (j >= INIT) & (j <= own[:, None] - LOCAL) & mine[:, None]
        score = store_scores(score, choosable, scores, first, most, N, BT, BC, SECTION)
        store_sections(score, sections, first, N, BT, BC, SECTION)


@Kernel
def index_select_kernel(
    q, k, relative_ptr, document_ptr, selection, maxima, scores, sections, T, S, HI, HK, HJ, TILES, BLOCKS,
    SLOTS, N, C: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, CHOSEN: tl.constexpr, KP: tl.constexpr,
    TOPK: tl.constexpr, TOPKP: tl.constexpr, BC: tl.constexpr, SP: tl.constexpr, SECTION: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):
    """The selected blocks of BT tokens of one KV head, one such tile after another."""
    LAST: tl.constexpr = 0x7FFFFFFF
    group = HI // HK
    maxima += tl.program_id(0).to(tl.int64) * BLOCKS * (BT * GP)
    scores += tl.program_id(0).to(tl.int64) * BT * N * SECTION
    sections += tl.program_id(0).to(tl.int64) * BT * N
    for number in tl.range(tl.program_id(0), TILES, tl.num_programs(0)):
        first, batch, kv_head = find_tile(number, TILES, T, HK, BT)
        token = first + tl.arange(0, BT)
        relative = tl.load(relative_ptr + batch * T + token, mask=token < T, other=-1)
        own = tl.where(relative < 0, -1, relative // BLOCK)
        store_forced(selection, own, token, batch, kv_head, T, HK, SLOTS, INIT, LOCAL, CHOSEN, TOPK, TOPKP)
        if CHOSEN > 0:
            # head g of token t at row t * GP + g
            row = tl.arange(0, BT * GP)
            row_token = first + row // GP
            exists = (row_token < T) & (row % GP < group)
            row_relative = tl.load(relative_ptr + batch * T + row_token, mask=exists, other=-1)
            exists = exists & (row_relative >= 0)
            row_own = tl.where(exists, row_relative // BLOCK, -1)
            head = (batch * T + row_token).to(tl.int64) * HI + kv_head * group + row % GP
            queries = load_tiles(q, head, C, exists, C)
            keys = k + (batch.to(tl.int64) * S * HJ + kv_head * HJ // HK) * C
            # one document of the tile after another: their blocks are counted from different places
            document = tl.load(document_ptr + batch * T + token, mask=token < T, other=LAST)
            row_document = tl.load(document_ptr + batch * T + row_token, mask=row_token < T, other=LAST)
            current = tl.min(document)
            while current < LAST:
                mine = (document == current) & (own >= 0)
                most = tl.max(tl.where(mine, own, 0))
                score_document(
                    queries, keys, current, row_own, own, mine, exists & (row_document == current), maxima, scores,
                    sections, most, HJ * C, N, C, BT, GP, BJ, BLOCK, WIDTH, INIT, LOCAL, BC, SECTION, PRECISION,
                )
                tl.debug_barrier()
                store_best(
                    scores, sections, selection, relative_ptr, document_ptr, current, first, most, batch, kv_head, T,
                    HK, SLOTS, N, BT, INIT, CHOSEN, KP, SP, SECTION, ROWS,
                )
                tl.debug_barrier()
                current = tl.min(tl.where(document > current, document, LAST))


def index_tiles(q_index: Tensor) -> dict[str, int]:
    """Rows (heads of some queries) and columns (tokens, of how many blocks at least) of a program, and programs a
    processor."""
    row = tile_width(q_index.shape[-1]) * q_index.element_size()
    small = shared_memory(q_index.device) < SMALL_SHARED_MEMORY
    if q_index.dtype == torch.float32:
        return {"rows": 32, "columns": 32, "side": 1, "resident": 2, "num_warps": 4, "num_stages": 1}
    if row > 256 or (row > 128 and small):
        return {"rows": 64, "columns": 64, "side": 1, "resident": 2, "num_warps": 4, "num_stages": 2}
    if row > 64:
        tiles = {"rows": 128, "columns": 128, "side": 4, "resident": 2, "num_warps": 4, "num_stages": 2}
        return {**tiles, "maxnreg": 255}  # or the assembler gives 32 for blocks of 128 on an A100
    # registers for three programs: where one waits for its products, others compare theirs
    stages = 2 if small else 3
    return {"rows": 128, "columns": 64, "side": 4, "resident": 3, "num_warps": 4, "num_stages": stages, "maxnreg": 168}


def fit_blocks(tiles: dict[str, int], q_index: Tensor, block_size: int) -> dict[str, int]:
    """The tiles with fewer blocks at a time or fewer stages where all keys of the blocks, which each stage holds, would
    take more than three fifths of shared memory."""
    room = shared_memory(q_index.device) * 3 // 5
    block = block_size * tile_width(q_index.shape[-1]) * q_index.element_size()
    side = tiles["side"]
    while side > 1 and side * block * tiles["num_stages"] > room:
        side //= 2
    fits = side * block * tiles["num_stages"] <= room
    return {**tiles, "side": side, "num_stages": tiles["num_stages"] if fits else 1}


class IndexInputs(NamedTuple):
    """What an index is scored from; see `nsa_attention`.

    Attributes:
        q_index: `[B, T, Hi, c]`.
        k_index: `[B, S, Hj, c]`, Hj = Hk or 1.
        kv_heads: Hk.
    """

    q_index: Tensor
    k_index: Tensor
    kv_heads: int


def select_by_index(inputs: IndexInputs, layout: Layout, sizes: Sizes) -> Tensor:
    """The scorer of an index.

    Returns:
        The selection `[B, T, Hk, topk]` int32, ascending, -1 = unused.

    Raises:
        ValueError: more index heads share a KV head, or more blocks are to be chosen, than the kernel takes.
    """
    q_index, k_index, kv_heads = inputs
    _, tokens, heads, channels = q_index.shape
    keys, index_keys = k_index.shape[1:3]
    check_limits(heads // kv_heads, keys, sizes)
    group = next_power_of_2(heads // kv_heads)
    tiles = fit_blocks(index_tiles(q_index), q_index, sizes.block_size)
    columns, bt = tiles.pop("columns"), max(1, tiles.pop("rows") // group)
    plan = plan_selection(q_index, kv_heads, keys, sizes, bt, bt * group, tiles.pop("resident"))
    width = max(2, min(columns // tiles.pop("side"), next_power_of_2(sizes.block_size)))
    selection = new_selection(q_index, kv_heads, keys, sizes)
    index_select_kernel[(plan.programs,)](
        q_index, k_index, layout.relative, layout.document, selection, *new_scratch(q_index, plan), tokens, keys,
        heads, kv_heads, index_keys, plan.tiles, plan.blocks, sizes.topk, plan.sections, **plan.shape,
        C=channels, GP=group, BC=max(64, plan.shape["SECTION"]), BJ=columns // width, WIDTH=width,
        PRECISION=precision(q_index.dtype), **tiles,
    )
    return selection
