"""Decoding, second launch: the scores of the splits and heads together, and the selected blocks (eqs. 9 to 12)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .sizes import Sizes
from .triton_common import next_power_of_2
from .triton_decode_compressed import GROWING, row_place

# Blocks that are sorted at once; a program takes that many after another.
AT_ONCE = 2048


@triton.jit
def head_importance(
    sums, carried, lse, row, real, cells, first, low, high, SPLITS, ROWS, WIDTH, CARRIED, CELLS: tl.constexpr,
    TILE: tl.constexpr, SPLITSP: tl.constexpr, REACH: tl.constexpr, GC: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """The importance `[BJ]` of the blocks `first + i`, summed over GC heads: their rows `row`, `real` the true ones.

    Only blocks in `[low, high)` are asked for. `cells` were written, in whole tiles; the first block of a tile has more
    of its sum in `carried`.
    """
    split = tl.arange(0, SPLITSP)
    mask = (split < SPLITS)[None, :] & real[:, None]
    lses = tl.load(lse + row[:, None] + split[None, :].to(tl.int64) * ROWS, mask=mask, other=float("-inf"))
    top = tl.max(lses, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lses - safe[:, None]), 1)
    # of a head that sees nothing, every weight is 0
    log_sum = tl.where(total > 0, safe + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    importance = tl.zeros([BJ], tl.float32)
    for s in tl.static_range(CELLS):
        j = first + tl.arange(0, BJ)
        cell = j * CELLS + s
        asked = (j >= low) & (j < high) & (cell // TILE * TILE < cells)
        mask = real[:, None] & asked[None, :]
        mine = tl.load(sums + row[:, None] * WIDTH + cell[None, :], mask=mask, other=float("-inf"))
        importance += tl.sum(tl.exp2(mine - log_sum[:, None]), 0)
        if REACH > 1:
            j = first + tl.arange(0, BJ // TILE) * TILE
            tile = (j * CELLS + s) // TILE
            asked = (j >= low) & (j < high) & (j > 0) & ((tile - CELLS) * TILE < cells)
            mask = real[:, None] & asked[None, :]
            other = tl.load(carried + row[:, None] * CARRIED + tile[None, :], mask=mask, other=float("-inf"))
            more = tl.sum(tl.exp2(other - log_sum[:, None]), 0)
            begins = (tl.arange(0, TILE) == 0)[None, :]
            importance += tl.reshape(tl.where(begins, more[:, None], 0.0), [BJ])
    return importance


@triton.jit(do_not_specialize=GROWING)
def decode_select_kernel(
    sums, carried, lse, starts, lengths, selection, SPLITS, T, S, HQ, HK, ROWS, WIDTH, CARRIED, SLOTS,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TOPK: tl.constexpr, SLOTSP: tl.constexpr, KP: tl.constexpr, BJ: tl.constexpr, GC: tl.constexpr,
    CELL: tl.constexpr, CELLS: tl.constexpr, TILE: tl.constexpr, SPLITSP: tl.constexpr,
    SCORES: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """One program: one query of one KV head. Without SCORES no block is ever chosen by its importance.

    A key holds a block's importance above and its inverted index below: no two are equal, ties go to the lower index.
    """
    LAST: tl.constexpr = 0x7FFFFFFF
    RATIO: tl.constexpr = BLOCK // STRIDE
    kv_head, query = tl.program_id(0) % HK, tl.program_id(0) // HK
    batch, group = query // T, HQ // HK
    _, first_query = row_place(starts, lengths, batch, T, S)
    relative = first_query + query % T
    blocks = tl.where(relative >= 0, relative // BLOCK + 1, 0)
    selection += tl.program_id(0).to(tl.int64) * SLOTS
    slot = tl.arange(0, SLOTSP)
    count = tl.minimum(blocks, TOPK)
    chosen = slot < 0
    if SCORES:
        if blocks > TOPK:
            last = tl.maximum(relative - (KERNEL - 1), 0) // STRIDE
            # how many were written
            cells = tl.where(relative >= KERNEL - 1, last // RATIO * CELLS + last % RATIO // CELL + 1, 0)
            best = tl.full([KP], -1, tl.int64)
            for first in tl.range(0, blocks - LOCAL, BJ):
                j = first + tl.arange(0, BJ)
                candidate = (j >= INIT) & (j < blocks - LOCAL)
                importance = tl.zeros([BJ], tl.float32)
                for g in tl.range(0, group, GC):
                    head = g + tl.arange(0, GC)
                    row = query.to(tl.int64) * HQ + kv_head * group + head
                    importance += head_importance(
                        sums, carried, lse, row, head < group, cells, first, INIT, blocks - LOCAL, SPLITS, ROWS, WIDTH,
                        CARRIED, CELLS, TILE, SPLITSP, KERNEL // STRIDE, GC, BJ,
                    )  # fmt: skip
                key = (importance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (j ^ LAST).to(tl.int64)
                found = tl.topk(tl.where(candidate, key, -1), KP)
                if ONCE:
                    best = found
                else:
                    best = tl.topk(tl.reshape(tl.join(best, found), [2 * KP]), KP)
            rank = tl.arange(0, KP)
            index = tl.where(rank < TOPK - INIT - LOCAL, (best.to(tl.int32) & LAST) ^ LAST, LAST)
            tl.store(selection + INIT + rank, tl.sort(index), mask=rank < TOPK - INIT - LOCAL)
            chosen = (slot >= INIT) & (slot < TOPK - LOCAL)
    # the first blocks and the local ones; all there are, where those are not more than may be selected
    block = tl.where((slot < INIT) | (blocks <= TOPK), slot, blocks + slot - count)
    tl.store(selection + slot, tl.where(slot < count, block, -1), mask=(slot < SLOTS) & ~chosen)


def select_shape(heads: int, chosen: int, blocks: int, tile: int) -> dict[str, int]:
    """How many blocks and heads a program takes at a time."""
    kept = max(2, next_power_of_2(chosen))
    at_once = max(16, tile, kept, min(AT_ONCE, next_power_of_2(blocks)))
    together = max(1, min(next_power_of_2(heads), 8192 // at_once))
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
        batch * tokens * heads, sums.shape[-1], carried.shape[-1], sizes.topk,
        KERNEL=sizes.kernel_size, STRIDE=sizes.kernel_stride, BLOCK=sizes.block_size, INIT=sizes.init_blocks,
        LOCAL=sizes.local_blocks, TOPK=sizes.topk, SLOTSP=next_power_of_2(sizes.topk), CELL=cell[0],
        CELLS=cell[1], TILE=cell[2], SPLITSP=next_power_of_2(splits), SCORES=scores is not None,
        ONCE=blocks <= shape["BJ"], **shape,
    )  # fmt: skip
