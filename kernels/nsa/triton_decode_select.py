"""Decoding, second launch: the scores of the splits and heads together, and the selected blocks (eqs. 9 to 12)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .sizes import Sizes
from .triton_common import begin_next, following, next_power_of_2, wait_for_previous
from .triton_decode_compressed import GROWING, row_place

# Blocks that are looked at together; a program takes that many after another.
AT_ONCE = 2048


@triton.jit
def head_importance(
    sums, carried, lse, head, real, cells, first, SPLITS, ROWS, R, CELLS: tl.constexpr, TILE: tl.constexpr,
    SPLITSP: tl.constexpr, REACH: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """The importance `[BJ]` of the blocks `first + i`, summed over the heads that are `real`.

    The pointers are those of head 0. `cells`: how many hold something, written in whole tiles. The first block of a
    tile has more of its sum in `carried`, so that equal sums are equal up to rounding only.
    """
    split = tl.arange(0, SPLITSP)
    mask = (split < SPLITS)[None, :] & real[:, None]
    lses = tl.load(lse + head[:, None] + split[None, :].to(tl.int64) * ROWS, mask=mask, other=float("-inf"))
    importance = tl.zeros([BJ], tl.float32)
    for s in tl.static_range(CELLS):
        cell = (first + tl.arange(0, BJ)) * CELLS + s
        # whole tiles, so that neighbours are read together
        mask = real[:, None] & (cell // TILE * TILE < cells)[None, :]
        # asked for before the logarithms are summed
        place = (cell // TILE * R * TILE + cell % TILE)[None, :]
        mine = tl.load(sums + head[:, None] * TILE + place, mask=mask, other=float("-inf"))
        if s == 0:
            top = tl.max(lses, 1)
            safe = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(tl.exp2(lses - safe[:, None]), 1)
            # of a head that sees nothing, every weight is 0
            log_sum = tl.where(total > 0, safe + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
        importance += tl.sum(tl.exp2(mine - log_sum[:, None]), 0)
        if REACH > 1:
            j = first + tl.arange(0, BJ // TILE) * TILE
            tile = (j * CELLS + s) // TILE
            mask = real[:, None] & ((j > 0) & ((tile - CELLS) * TILE < cells))[None, :]
            other = tl.load(carried + head[:, None] + (tile * R)[None, :], mask=mask, other=float("-inf"))
            more = tl.sum(tl.exp2(other - log_sum[:, None]), 0)
            begins = (tl.arange(0, TILE) == 0)[None, :]
            importance += tl.reshape(tl.where(begins, more[:, None], 0.0), [BJ])
    return importance


@triton.jit
def block_keys(
    sums, carried, lse, group, cells, first, low, high, SPLITS, ROWS, R, CELLS: tl.constexpr,
    TILE: tl.constexpr, SPLITSP: tl.constexpr, REACH: tl.constexpr, GC: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """The importance of the blocks `first + i` as int32 `[BJ]` in the same order; -1 outside `[low, high)`."""
    importance = tl.zeros([BJ], tl.float32)
    for g in tl.range(0, group, GC):
        head = g + tl.arange(0, GC)
        importance += head_importance(
            sums, carried, lse, head, head < group, cells, first, SPLITS, ROWS, R, CELLS, TILE, SPLITSP, REACH, BJ
        )  # fmt: skip
    j = first + tl.arange(0, BJ)
    return tl.where((j >= low) & (j < high), importance.to(tl.int32, bitcast=True), -1)


@triton.jit
def store_chosen(
    selection, keys, first, least, equal, above_before, equal_before, FREE: tl.constexpr, BJ: tl.constexpr
):
    """Stores which of the blocks `first + i` have a key above `least`, or are among the first `equal` that have it.

    No more than FREE are stored, even if keys came out otherwise than when `least` was found.

    Returns how many of each there are, with those of earlier blocks.
    """
    is_above, is_equal = (keys > least).to(tl.int32), (keys == least).to(tl.int32)
    # both counts in one number: BJ is less than 2^16
    count = is_above + (is_equal << 16)
    before = tl.cumsum(count, 0) - count
    above, same = above_before + (before & 0xFFFF), equal_before + (before >> 16)
    chosen = (keys > least) | ((keys == least) & (same < equal))
    place = above + tl.minimum(same, equal)
    tl.store(selection + place, first + tl.arange(0, BJ), mask=chosen & (place < FREE))
    return above_before + tl.sum(is_above, 0), equal_before + tl.sum(is_equal, 0)


@triton.jit(do_not_specialize=GROWING)
def decode_select_kernel(
    sums, carried, lse, starts, lengths, selection, SPLITS, T, S, HQ, HK, ROWS, TILES, SLOTS,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TOPK: tl.constexpr, SLOTSP: tl.constexpr, KP: tl.constexpr, BJ: tl.constexpr, GC: tl.constexpr,
    CELL: tl.constexpr, CELLS: tl.constexpr, TILE: tl.constexpr, SPLITSP: tl.constexpr,
    SCORES: tl.constexpr, ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one query of one KV head. Without SCORES no block is ever chosen by its importance.

    First the least importance that is chosen, then the blocks above it and the first of those that have just that.
    """
    begin_next(OVERLAP)
    RATIO: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = KERNEL // STRIDE
    FREE: tl.constexpr = TOPK - INIT - LOCAL
    kv_head, query = tl.program_id(0) % HK, tl.program_id(0) // HK
    batch, group = query // T, HQ // HK
    _, first_query = row_place(starts, lengths, batch, T, S)
    relative = first_query + query % T
    blocks = tl.where(relative >= 0, relative // BLOCK + 1, 0)
    selection += tl.program_id(0).to(tl.int64) * SLOTS
    slot = tl.arange(0, SLOTSP)
    count = tl.minimum(blocks, TOPK)
    forced = slot >= 0
    wait_for_previous(OVERLAP)
    if SCORES:
        if blocks > TOPK:
            last = tl.maximum(relative - (KERNEL - 1), 0) // STRIDE
            # how many were written
            cells = tl.where(relative >= KERNEL - 1, last // RATIO * CELLS + last % RATIO // CELL + 1, 0)
            rows, row = T * group, query % T * group
            tiles = (batch * HK + kv_head).to(tl.int64) * TILES
            sums += (tiles * rows + row) * TILE
            carried += (tiles + (batch * HK + kv_head) * CELLS) * rows + row
            lse += query.to(tl.int64) * HQ + kv_head * group
            end = blocks - LOCAL
            if ONCE:
                keys = block_keys(
                    sums, carried, lse, group, cells, 0, INIT, end, SPLITS, ROWS, rows, CELLS, TILE, SPLITSP, REACH,
                    GC, BJ,
                )  # fmt: skip
                best = tl.topk(keys, KP)
            else:
                best = tl.full([KP], -1, tl.int32)
                for first in tl.range(0, end, BJ):
                    some = block_keys(
                        sums, carried, lse, group, cells, first, INIT, end, SPLITS, ROWS, rows, CELLS, TILE, SPLITSP,
                        REACH, GC, BJ,
                    )  # fmt: skip
                    best = tl.topk(tl.reshape(tl.join(best, tl.topk(some, KP)), [2 * KP]), KP)
            among = tl.arange(0, KP) < FREE
            least = tl.min(tl.where(among, best, 0x7FFFFFFF), 0)
            equal = FREE - tl.sum((among & (best > least)).to(tl.int32), 0)
            if ONCE:
                store_chosen(selection + INIT, keys, 0, least, equal, 0, 0, FREE, BJ)
            else:
                above_before, equal_before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
                for first in tl.range(0, end, BJ):
                    # once more, instead of keeping them
                    again = block_keys(
                        sums, carried, lse, group, cells, first, INIT, end, SPLITS, ROWS, rows, CELLS, TILE, SPLITSP,
                        REACH, GC, BJ,
                    )  # fmt: skip
                    above_before, equal_before = store_chosen(
                        selection + INIT, again, first, least, equal, above_before, equal_before, FREE, BJ
                    )
            forced = (slot < INIT) | (slot >= TOPK - LOCAL)
    # the first blocks and the local ones; all there are, where those are not more than may be selected
    block = tl.where((slot < INIT) | (blocks <= TOPK), slot, blocks + slot - count)
    tl.store(selection + slot, tl.where(slot < count, block, -1), mask=(slot < SLOTS) & forced)


def select_shape(heads: int, chosen: int, blocks: int, tile: int) -> dict[str, int]:
    """How many blocks and heads a program takes at a time."""
    kept = max(2, next_power_of_2(chosen))
    at_once = max(16, tile, kept, min(AT_ONCE, next_power_of_2(blocks)))
    together = max(1, min(next_power_of_2(heads), 32768 // at_once))
    return {
        "KP": kept,
        "BJ": at_once,
        "GC": together,
        "num_warps": 16 if at_once > 1024 else 8 if at_once >= 512 else 4,
    }


def decode_select(
    partial_lse: Tensor, splits: int, starts: Tensor | None, lengths: Tensor | None, keys: int, sizes: Sizes,
    cell: tuple[int, int, int], scores: tuple[Tensor, ...] | None, selection: Tensor,
) -> None:  # fmt: skip
    """Fills `selection [B, T, Hk, topk]` int32: ascending, -1 = unused.

    Args:
        partial_lse: `[at least splits, B, T, Hq]`, of the compressed branch.
        scores: as `compressed_partials` writes them; None where no block is ever chosen by its importance.
    """
    _, batch, tokens, heads = partial_lse.shape
    kv_heads = selection.shape[2]
    blocks = (keys - 1) // sizes.block_size + 1
    sums, carried = scores or (partial_lse, partial_lse)
    chosen = 0 if scores is None else sizes.topk - sizes.init_blocks - sizes.local_blocks
    shape = select_shape(heads // kv_heads, chosen, blocks, cell[2])
    decode_select_kernel[(batch * tokens * kv_heads,)](
        sums, carried, partial_lse, starts, lengths, selection, splits, tokens, keys, heads, kv_heads,
        batch * tokens * heads, sums.shape[1], sizes.topk,
        KERNEL=sizes.kernel_size, STRIDE=sizes.kernel_stride, BLOCK=sizes.block_size, INIT=sizes.init_blocks,
        LOCAL=sizes.local_blocks, TOPK=sizes.topk, SLOTSP=next_power_of_2(sizes.topk), CELL=cell[0],
        CELLS=cell[1], TILE=cell[2], SPLITSP=next_power_of_2(splits), SCORES=scores is not None,
        ONCE=blocks <= shape["BJ"], **shape, **following(selection.device),
    )  # fmt: skip
