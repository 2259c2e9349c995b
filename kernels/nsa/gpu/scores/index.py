"""Blocks chosen by an index: the largest `q_index . k_index` of each block, no exponential, in one pass over the keys.

A program holds the index queries of some tokens with all heads of a group and walks over the past blocks. The heads'
maxima `[blocks, rows]` of this one tile stay in memory of the program's own; when the walk is over, each head's are
counted from its largest, the heads become one, and the best blocks are taken.
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
    cdiv,
    next_power_of_2,
    precision,
    processors,
    shared_memory,
    tile_width,
)
from ..launch import Kernel
from ..layout import Layout
from ..tiles import dot_tiles, load_tiles
from .selection import check_limits, count_blocks, new_selection

# The next best block is looked for among the best ones of so many sections of the past.
MOST_SECTIONS = 128


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
def best_of_document(
    q, k, base, row_own, own, mine, exists, maxima, sections, k_token, N,
    C: tl.constexpr, BT: tl.constexpr, GP: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, CHOSEN: tl.constexpr, KP: tl.constexpr,
    BC: tl.constexpr, SP: tl.constexpr, SECTION: tl.constexpr, UNROLL: tl.constexpr, PRECISION: tl.constexpr,
):
    """The chosen blocks of the queries `mine` of one document, `[BT, KP]`, rising; behind them, LAST."""
    LAST: tl.constexpr = 0x7FFFFFFF
    NONE: tl.constexpr = float("-inf")
    ROWS: tl.constexpr = BT * GP
    row, column = tl.arange(0, ROWS), tl.arange(0, BT)
    most = tl.max(tl.where(mine, own, 0))
    least = tl.min(tl.where(mine, own, LAST))
    tops = tl.full([ROWS, BJ], NONE, tl.float32)
    # blocks that are past for every query
    all_past = tl.minimum(least, most) // BJ * BJ
    for first in tl.range(0, all_past, BJ, loop_unroll_factor=UNROLL):
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

    # one score a token and block, in the place of its first heads' maxima; the largest of each section
    top = tl.where(exists, tl.max(tops, 1), float("inf"))
    for first in tl.range(0, most, BC):
        j = first + tl.arange(0, BC)
        at = maxima + j[None, :].to(tl.int64) * ROWS
        m = tl.load(at + row[:, None], mask=(j < most)[None, :], other=NONE)
        score = tl.max(tl.reshape(m - top[:, None], [BT, GP, BC]), 1)
        choosable = (j[None, :] >= INIT) & (j[None, :] <= own[:, None] - LOCAL) & mine[:, None]
        score = tl.where(choosable, score, NONE)
        tl.debug_barrier()
        tl.store(at + column[:, None], score, mask=(j < most)[None, :])
        section = first // SECTION + tl.arange(0, BC // SECTION)
        best = tl.max(tl.reshape(score, [BT, BC // SECTION, SECTION]), 2)
        tl.store(sections + section[None, :] * BT + column[:, None], best, mask=(section < N)[None, :])
    tl.debug_barrier()

    all_sections = tl.arange(0, SP)
    exist = (all_sections < (most + SECTION - 1) // SECTION)[None, :] & mine[:, None]
    best = tl.load(sections + all_sections[None, :] * BT + column[:, None], mask=exist, other=NONE)
    rank = tl.arange(0, KP)
    chosen = tl.full([BT, KP], LAST, tl.int32)
    for number in range(CHOSEN):
        value, section = tl.max(best, 1, return_indices=True, return_indices_tie_break_left=True)
        j = section[:, None] * SECTION + tl.arange(0, SECTION)[None, :]
        some = value > NONE
        at = maxima + j.to(tl.int64) * ROWS + column[:, None]
        score = tl.load(at, mask=some[:, None] & (j < most), other=NONE)
        # the last one taken from this section was better, or as good and before
        winner = tl.min(tl.where(score == value[:, None], j, LAST), 1)
        score = tl.where(j == winner[:, None], NONE, score)
        tl.store(at, score, mask=some[:, None] & (j == winner[:, None]))
        best = tl.where(all_sections[None, :] == section[:, None], tl.max(score, 1)[:, None], best)
        chosen = tl.where((rank == number)[None, :], tl.where(some, winner, LAST)[:, None], chosen)
        tl.debug_barrier()
    return tl.sort(chosen)


@Kernel
@triton.jit
def index_select_kernel(
    q, k, relative_ptr, document_ptr, selection, maxima, sections, T, S, HI, HK, HJ, TILES, BLOCKS, SLOTS, N,
    C: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, CHOSEN: tl.constexpr, KP: tl.constexpr,
    TOPK: tl.constexpr, TOPKP: tl.constexpr, BC: tl.constexpr, SP: tl.constexpr, SECTION: tl.constexpr,
    UNROLL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """The selected blocks of BT tokens of one KV head, one such tile after another."""
    LAST: tl.constexpr = 0x7FFFFFFF
    ROWS: tl.constexpr = BT * GP
    group = HI // HK
    maxima += tl.program_id(0).to(tl.int64) * BLOCKS * ROWS
    sections += tl.program_id(0).to(tl.int64) * N * BT
    rank, slot = tl.arange(0, KP)[None, :], tl.arange(0, TOPKP)
    for number in tl.range(tl.program_id(0), TILES, tl.num_programs(0)):
        # the last tokens, which see most, first
        tile = (TILES - 1 - number) // (tl.cdiv(TILES, tl.cdiv(T, BT)))
        pair = (TILES - 1 - number) % (tl.cdiv(TILES, tl.cdiv(T, BT)))
        batch, kv_head = pair // HK, pair % HK
        token = tile * BT + tl.arange(0, BT)
        relative = tl.load(relative_ptr + batch * T + token, mask=token < T, other=-1)
        own = tl.where(relative < 0, -1, relative // BLOCK)
        # head g of token t at row t * GP + g
        row = tl.arange(0, ROWS)
        row_token = tile * BT + row // GP
        exists = (row_token < T) & (row % GP < group)
        row_relative = tl.load(relative_ptr + batch * T + row_token, mask=exists, other=-1)
        exists = exists & (row_relative >= 0)
        row_own = tl.where(exists, row_relative // BLOCK, -1)
        head = (batch * T + row_token).to(tl.int64) * HI + kv_head * group + row % GP
        queries = load_tiles(q, head, C, exists, C)
        keys = k + (batch.to(tl.int64) * S * HJ + kv_head * HJ // HK) * C
        document = tl.load(document_ptr + batch * T + token, mask=token < T, other=LAST)
        if CHOSEN == 0:
            chosen = tl.full([BT, KP], LAST, tl.int32)
        elif PACKED:
            chosen = tl.full([BT, KP], LAST, tl.int32)
            row_document = tl.load(document_ptr + batch * T + row_token, mask=row_token < T, other=LAST)
            current = tl.min(document)
            while current < LAST:
                mine = document == current
                of_document = best_of_document(
                    queries, keys, current, row_own, own, mine, exists & (row_document == current), maxima, sections,
                    HJ * C, N, C, BT, GP, BJ, BLOCK, WIDTH, INIT, LOCAL, CHOSEN, KP, BC, SP, SECTION, UNROLL, PRECISION,
                )
                chosen = tl.where(mine[:, None], of_document, chosen)
                current = tl.min(tl.where(document > current, document, LAST))
        else:
            chosen = best_of_document(
                queries, keys, tl.min(document), row_own, own, own >= 0, exists, maxima, sections,
                HJ * C, N, C, BT, GP, BJ, BLOCK, WIDTH, INIT, LOCAL, CHOSEN, KP, BC, SP, SECTION, UNROLL, PRECISION,
            )
        free = tl.minimum(tl.maximum(own + 1 - INIT - LOCAL, 0), CHOSEN)
        place = selection + (((batch * T + token).to(tl.int64) * HK + kv_head) * SLOTS)[:, None]
        tl.store(place + INIT + rank, chosen, mask=(rank < free[:, None]) & (token < T)[:, None])
        # forced blocks and unused places; the chosen ones stand between the first and the local blocks
        behind = slot[None, :] - tl.minimum(own + 1, TOPK)[:, None]
        block = tl.where(slot[None, :] < INIT, slot[None, :], own[:, None] + 1 + behind)
        block = tl.where(behind < 0, block, -1)
        taken = (slot[None, :] >= INIT) & (slot[None, :] < INIT + free[:, None])
        tl.store(place + slot[None, :], block, mask=(slot < TOPK)[None, :] & (token < T)[:, None] & ~taken)
        tl.debug_barrier()


def index_tiles(q_index: Tensor, group: int) -> dict[str, int]:
    """Rows (heads of some queries) and columns (tokens) of a program, steps at once, and programs a processor.

    Args:
        group: index heads of a KV head, as a power of two.
    """
    row = tile_width(q_index.shape[-1]) * q_index.element_size()
    small = shared_memory(q_index.device) < SMALL_SHARED_MEMORY
    if q_index.dtype == torch.float32:
        return {"rows": 32, "columns": 32, "unroll": 1, "resident": 2, "num_warps": 4, "num_stages": 1}
    if row > 256 or (row > 128 and small):
        return {"rows": 64, "columns": 64, "unroll": 1, "resident": 2, "num_warps": 4, "num_stages": 2}
    if group < 4 or row > 64 or small:
        return {"rows": 128, "columns": 128, "unroll": 1, "resident": 2, "num_warps": 4, "num_stages": 3}
    # products of one step while another's are compared: 4 % faster
    return {"rows": 128, "columns": 64, "unroll": 2, "resident": 3, "num_warps": 4, "num_stages": 3}


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
    batch, tokens, heads, channels = q_index.shape
    keys, index_keys = k_index.shape[1:3]
    check_limits(heads // kv_heads, keys, sizes)
    blocks = count_blocks(keys, sizes)
    chosen = 0 if sizes.topk >= blocks else sizes.topk - sizes.init_blocks - sizes.local_blocks
    selection, topk = new_selection(q_index, kv_heads, keys, sizes)
    group = next_power_of_2(heads // kv_heads)
    tiles = index_tiles(q_index, group)
    width = max(2, min(tiles["columns"] // 4, next_power_of_2(sizes.block_size)))
    bt = max(1, tiles["rows"] // group)
    count = cdiv(tokens, bt) * batch * kv_heads
    programs = min(count, tiles["resident"] * processors(q_index.device))
    section = max(16, next_power_of_2(cdiv(blocks, MOST_SECTIONS)))
    sections = cdiv(blocks, section)
    # of each program its own: the heads' maxima of a tile's blocks, and the best score of each section
    maxima = q_index.new_empty(programs, blocks, bt * group, dtype=torch.float32)
    best = q_index.new_empty(programs, sections, bt, dtype=torch.float32)
    index_select_kernel[(programs,)](
        q_index, k_index, layout.relative, layout.document, selection, maxima, best, tokens, keys, heads, kv_heads,
        index_keys, count, blocks, sizes.topk, sections, C=channels, GP=group, BT=bt,
        BJ=tiles["columns"] // width, BLOCK=sizes.block_size, WIDTH=width, INIT=sizes.init_blocks,
        LOCAL=sizes.local_blocks, CHOSEN=chosen, KP=max(2, next_power_of_2(chosen)), TOPK=topk,
        TOPKP=next_power_of_2(topk), BC=max(64, section), SP=max(2, next_power_of_2(sections)), SECTION=section,
        UNROLL=tiles["unroll"], PACKED=layout.packed, PRECISION=precision(q_index.dtype), num_warps=tiles["num_warps"],
        num_stages=tiles["num_stages"],
    )
    return selection
