"""What both scorers share: the limits, the tiles that programs take, and top-k (eqs. 11 and 12) over a tile's scores.

A program takes one tile after another, BT tokens of one KV head, and keeps the scores of a tile's blocks in memory of
its own. The best block is looked for among the best ones of sections of the past, which then gets its second best.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...sizes import Sizes
from ..common import cdiv, next_power_of_2, processors

MOST_CHOSEN = 256
MOST_HEADS = 128
MOST_SECTIONS = 64
# What all programs keep together. With 4 heads a group, blocks of 64 and an H100: .3 GB at 65,536 tokens.
MOST_BYTES = 1 << 30


@triton.jit
def find_tile(number, TILES, T, HK, BT: tl.constexpr):
    """First token, row and KV head of a tile; the last tokens, which see most, come first."""
    pairs = TILES // tl.cdiv(T, BT)
    backwards = TILES - 1 - number
    pair = backwards % pairs
    return backwards // pairs * BT, pair // HK, pair % HK


@triton.jit
def as_neighbours(x):
    """`x [R, C]` with each row in lanes that are neighbours. After float32's products there are others in between, and
    Triton, which is not told, would sum over those (3.6 and 3.7)."""
    column = tl.broadcast_to(tl.arange(0, x.shape[1])[None, :], x.shape)
    return tl.gather(x, column, 1)


@triton.jit
def store_scores(score, choosable, scores, first, most, N, BT: tl.constexpr, BC: tl.constexpr, SECTION: tl.constexpr):
    """Keeps `score [BT, BC]`, of the blocks `[first, first + BC)` before `most`, in `scores [BT, N * SECTION]`: -inf of
    blocks that are not `choosable`. Returns what is kept."""
    row, j = tl.arange(0, BT)[:, None], first + tl.arange(0, BC)[None, :]
    # NaN and -inf are the least number: places are never left unwritten, whatever the queries and keys are
    score = tl.where(choosable, tl.where(score > -3e38, score, -3e38), float("-inf"))
    tl.store(scores + row * (N * SECTION) + j, score, mask=j < most)
    return score


@triton.jit
def store_sections(score, sections, first, N, BT: tl.constexpr, BC: tl.constexpr, SECTION: tl.constexpr):
    """The largest of each section of what `store_scores` returned, whole sections: `sections [BT, N]`."""
    row, section = tl.arange(0, BT)[:, None], first // SECTION + tl.arange(0, BC // SECTION)[None, :]
    best = tl.max(tl.reshape(score, [BT, BC // SECTION, SECTION]), 2)
    tl.store(sections + row * N + section, best, mask=section < N)


@triton.jit
def take_best(
    scores, sections, row, mine, most, N, CHOSEN: tl.constexpr, KP: tl.constexpr, SP: tl.constexpr,
    SECTION: tl.constexpr,
):
    """The CHOSEN blocks before `most` with the largest scores above -inf, of equal ones the first: `[R, KP]`, rising,
    and behind them the largest int32, of the rows `[R]` of `store_scores`; `mine`: which of them choose at all."""
    LAST: tl.constexpr = 0x7FFFFFFF
    NONE: tl.constexpr = float("-inf")
    scores += row[:, None] * (N * SECTION)
    all_sections, rank = tl.arange(0, SP)[None, :], tl.arange(0, KP)[None, :]
    exist = mine[:, None] & (all_sections < (most + SECTION - 1) // SECTION)
    best = tl.load(sections + row[:, None] * N + all_sections, mask=exist, other=NONE)
    chosen = tl.full([row.shape[0], KP], LAST, tl.int32)
    for number in range(CHOSEN):
        value, section = tl.max(best, 1, return_indices=True, return_indices_tie_break_left=True)
        j = section[:, None] * SECTION + tl.arange(0, SECTION)[None, :]
        some = value > NONE
        score = tl.load(scores + j, mask=some[:, None] & (j < most), other=NONE)
        # the last one taken from this section was better, or as good and before
        winner = tl.min(tl.where(score == value[:, None], j, LAST), 1)
        score = tl.where(j == winner[:, None], NONE, score)
        if row.shape[0] * SECTION < 128:  # fewer scores than threads: several read each of them
            tl.debug_barrier()
        tl.store(scores + j, score, mask=some[:, None] & (j == winner[:, None]))
        best = tl.where(all_sections == section[:, None], tl.max(score, 1)[:, None], best)
        chosen = tl.where(rank == number, tl.where(some, winner, LAST)[:, None], chosen)
        tl.debug_barrier()
    return tl.sort(chosen)


@triton.jit
def store_best(
    scores, sections, selection, relative_ptr, document_ptr, current, first_token, most, batch, kv_head, T, HK, SLOTS,
    N, BT: tl.constexpr, INIT: tl.constexpr, CHOSEN: tl.constexpr, KP: tl.constexpr, SP: tl.constexpr,
    SECTION: tl.constexpr, ROWS: tl.constexpr,
):
    """Writes the chosen blocks of the tile's tokens of the document `current` into `selection [B, T, Hk, SLOTS]`."""
    rank = tl.arange(0, KP)[None, :]
    for first_row in tl.range(0, BT, ROWS):
        row = first_row + tl.arange(0, ROWS)
        token = first_token + row
        relative = tl.load(relative_ptr + batch * T + token, mask=token < T, other=-1)
        mine = (relative >= 0) & (tl.load(document_ptr + batch * T + token, mask=token < T, other=-1) == current)
        chosen = take_best(scores, sections, row, mine, most, N, CHOSEN, KP, SP, SECTION)
        place = selection + ((batch * T + token).to(tl.int64) * HK + kv_head) * SLOTS + INIT
        tl.store(place[:, None] + rank, chosen, mask=chosen < 0x7FFFFFFF)


@triton.jit
def store_forced(
    selection, own, token, batch, kv_head, T, HK, SLOTS, INIT: tl.constexpr, LOCAL: tl.constexpr,
    CHOSEN: tl.constexpr, TOPK: tl.constexpr, TOPKP: tl.constexpr,
):
    """Writes the other of the first TOPK places for the tokens `[BT]`: the first blocks, behind the chosen ones the
    local ones, and -1 where nothing is left; `own` is a token's block, -1 for none."""
    slot = tl.arange(0, TOPKP)[None, :]
    place = selection + (((batch * T + token).to(tl.int64) * HK + kv_head) * SLOTS)[:, None]
    behind = slot - tl.minimum(own + 1, TOPK)[:, None]
    block = tl.where(slot < INIT, slot, own[:, None] + 1 + behind)
    block = tl.where(behind < 0, block, -1)
    free = tl.minimum(tl.maximum(own + 1 - INIT - LOCAL, 0), CHOSEN)[:, None]
    chosen = (slot >= INIT) & (slot < INIT + free)
    tl.store(place + slot, block, mask=(slot < TOPK) & (token < T)[:, None] & ~chosen)


def check_limits(group: int, keys: int, sizes: Sizes) -> None:
    """Whether the kernels take so many heads and blocks.

    Args:
        group: heads that share a KV head.
        keys: of a row.

    Raises:
        ValueError: more heads share a KV head, or more blocks are to be chosen, than the kernels take.
    """
    chosen = sizes.topk - sizes.init_blocks - sizes.local_blocks
    if sizes.topk * sizes.block_size < keys and chosen > MOST_CHOSEN:
        raise ValueError(
            f"backend='triton' chooses at most {MOST_CHOSEN} blocks by importance, got topk - init_blocks - "
            f"local_blocks = {chosen}: use larger blocks, or backend='reference'"
        )
    if group > MOST_HEADS:
        raise ValueError(
            f"backend='triton' takes at most {MOST_HEADS} query heads a KV head, got {group}: use backend='reference'"
        )


def count_blocks(keys: int, sizes: Sizes) -> int:
    """How many blocks a row of so many keys has."""
    return (keys - 1) // sizes.block_size + 1


def new_selection(queries: Tensor, kv_heads: int, keys: int, sizes: Sizes) -> Tensor:
    """The selection `[B, T, Hk, topk]` int32 of queries `[B, T, H, D]`, for a kernel to fill.

    Behind the number of blocks no place is ever used: those are -1 from the start.
    """
    shape = (*queries.shape[:2], kv_heads, sizes.topk)
    if sizes.topk > count_blocks(keys, sizes):
        return queries.new_full(shape, -1, dtype=torch.int32)
    return queries.new_empty(shape, dtype=torch.int32)


class Plan(NamedTuple):
    """How the queries are cut into tiles, and the constants of top-k.

    Attributes:
        programs: of the launch.
        tiles: all together.
        blocks: of a row.
        sections: of a row's blocks.
        rows: numbers that a program keeps of each block.
        shape: constants of the kernels.
    """

    programs: int
    tiles: int
    blocks: int
    sections: int
    rows: int
    shape: dict[str, int]


def plan_selection(
    queries: Tensor, kv_heads: int, keys: int, sizes: Sizes, tile_tokens: int, rows: int, resident: int
) -> Plan:
    """The plan for queries `[B, T, H, D]` over rows of `keys` keys.

    Args:
        tile_tokens: BT.
        rows: numbers that a program keeps of each block, besides the tokens' scores.
        resident: programs that a processor holds at a time; fewer where they would keep too much.
    """
    blocks = count_blocks(keys, sizes)
    chosen = 0 if sizes.topk >= blocks else max(0, sizes.topk - sizes.init_blocks - sizes.local_blocks)
    tiles = cdiv(queries.shape[1], tile_tokens) * queries.shape[0] * kv_heads
    section = max(16, next_power_of_2(cdiv(blocks, MOST_SECTIONS)))
    sections, topk = cdiv(blocks, section), min(sizes.topk, blocks)
    shape = {
        "BT": tile_tokens, "BLOCK": sizes.block_size, "INIT": sizes.init_blocks, "LOCAL": sizes.local_blocks,
        "CHOSEN": chosen, "KP": max(2, next_power_of_2(chosen)), "TOPK": topk, "TOPKP": next_power_of_2(topk),
        "SP": max(2, next_power_of_2(sections)), "SECTION": section,
        "ROWS": min(tile_tokens, 32),
    }
    count = processors(queries.device)
    resident = max(1, min(resident, MOST_BYTES // (4 * blocks * (rows + tile_tokens) * count)))
    return Plan(min(tiles, resident * count), tiles, blocks, sections, rows, shape)


def new_scratch(queries: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Each program's own memory, float32: numbers of each block `[programs, blocks, rows]`, the tokens' scores
    `[programs, BT, sections * SECTION]`, and the best ones of sections `[programs, BT, sections]`."""
    tokens = plan.shape["BT"]
    widths = plan.blocks * plan.rows, tokens * plan.sections * plan.shape["SECTION"], tokens * plan.sections
    counts = [cdiv(plan.programs * width, 4) * 4 for width in widths]  # each begins at a multiple of 16 bytes
    terms, scores, sections = queries.new_empty(sum(counts), dtype=torch.float32).split(counts)
    return terms, scores, sections
