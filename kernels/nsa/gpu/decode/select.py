"""Decoding, second launch: the scores of the splits and heads together, and the selected blocks (eqs. 9 to 12).

Of both scorers: what they left is put together differently, and chosen from alike.

Several programs share the past of a query: each adds up its blocks' importance, and the last one that has it chooses
among all of them. A candidate is one int64, `(1 + the importance's bits) * 2^32 - number`: bits order as numbers do
that are not negative, and of equal ones the first is the largest. Not positive: none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...placement import Placement
from ...sizes import Sizes
from ..common import begin_next, cdiv, in_chain, next_power_of_2, wait_for_previous
from ..scores.selection import count_blocks
from .index import IndexScores
from .scores import GROWING, CompressedScores, row_place

# Blocks of a program.
AT_ONCE = 512
# Bundles of blocks that are ranked at a time, and blocks in all of the best bundles together.
BUNDLES = 256
CANDIDATES = 1024


@triton.jit
def head_importance(
    sums, carried, tops, lse, head, real, cells, first, SPLITS, ROWS, R, CELLS: tl.constexpr, TILE: tl.constexpr,
    SPLITSP: tl.constexpr, REACH: tl.constexpr, BJ: tl.constexpr,
):
    """The importance `[BJ]` of the blocks `first + i`, summed over the heads that are `real`.

    The pointers are those of head 0. `cells`: those up to the last visible entry's; the tiles that hold them are
    written completely. A sum is relative to its tile's `top`, and a tile's first block has more of its own in
    `carried`, so that equal importances of different tiles are equal up to rounding only.
    """
    split = tl.arange(0, SPLITSP)
    mask = (split < SPLITS)[None, :] & real[:, None]
    lses = tl.load(lse + head[:, None] + split[None, :].to(tl.int64) * ROWS, mask=mask, other=float("-inf"))
    top = tl.max(lses, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lses - top[:, None]), 1)
    # of a head that sees nothing, every weight is 0
    share = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    importance = tl.zeros([BJ // TILE, TILE], tl.float32)
    for s in tl.static_range(CELLS):
        # a tile has one block, or a block one cell
        tile = first * CELLS // TILE + tl.arange(0, BJ // TILE) * CELLS + s
        mask = (tile * TILE < cells)[:, None] & real[None, :]
        place = (tile * R)[:, None] + head[None, :]
        scale = tl.exp2(tl.load(tops + place, mask=mask, other=float("-inf")) - top[None, :]) * share[None, :]
        # in this order a thread has all heads of some blocks: what follows is spread over the threads
        source = sums + place[:, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
        importance += tl.sum(tl.load(source, mask=mask[:, :, None], other=0.0) * scale[:, :, None], 1)
        if REACH > 1:
            mask = ((tile >= CELLS) & ((tile - CELLS) * TILE < cells))[:, None] & real[None, :]
            place -= CELLS * R
            scale = tl.exp2(tl.load(tops + place, mask=mask, other=float("-inf")) - top[None, :]) * share[None, :]
            more = tl.sum(tl.load(carried + place, mask=mask, other=0.0) * scale, 1)
            importance += tl.where((tl.arange(0, TILE) == 0)[None, :], more[:, None], 0.0)
    return tl.reshape(importance, [BJ])


@triton.jit
def importance_bits(
    sums, carried, tops, lse, group, cells, first, low, high, SPLITS, ROWS, R, CELLS: tl.constexpr,
    TILE: tl.constexpr, SPLITSP: tl.constexpr, REACH: tl.constexpr, GC: tl.constexpr, BJ: tl.constexpr,
):
    """The importance of the blocks `first + i` as its bits, int32 `[BJ]`; -1 outside `[low, high)`."""
    importance = tl.zeros([BJ], tl.float32)
    for g in tl.range(0, group, GC):
        head = g + tl.arange(0, GC)
        importance += head_importance(
            sums, carried, tops, lse, head, head < group, cells, first, SPLITS, ROWS, R, CELLS, TILE, SPLITSP, REACH, BJ
        )
    # NaN, of whatever sign, counts as infinity: no candidate is lost
    bits = tl.minimum(importance.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    j = first + tl.arange(0, BJ)
    return tl.where((j >= low) & (j < high), bits, -1)


@triton.jit
def index_bits(
    maxima, tops, group, first, low, high, SPLITS, R, SPLITSP: tl.constexpr, GC: tl.constexpr, BJ: tl.constexpr
):
    """How near the heads' largest products come to each head's largest of all, as bits that order as numbers do.

    Int32 `[BJ]`, of the blocks `first + i`; -1 outside `[low, high)`. The pointers are those of head 0.
    """
    split, j = tl.arange(0, SPLITSP), first + tl.arange(0, BJ)
    candidate = (j >= low) & (j < high)
    distance = tl.full([BJ], float("inf"), tl.float32)
    for g in tl.range(0, group, GC):
        head = g + tl.arange(0, GC)
        real = head < group
        mask = (split < SPLITS)[:, None] & real[None, :]
        top = tl.max(tl.load(tops + split[:, None] * R + head[None, :], mask=mask, other=float("-inf")), 0)
        mask = candidate[:, None] & real[None, :]
        m = tl.load(maxima + j[:, None] * R + head[None, :], mask=mask, other=float("-inf"))
        distance = tl.minimum(distance, tl.min(tl.where(real, top, float("inf"))[None, :] - m, 1))
    bits = 0x7F800000 - tl.minimum(distance.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    return tl.where(candidate, bits, -1)


@triton.jit
def best_candidates(bits, number, KP: tl.constexpr):
    """The KP best candidates of those with these importances and numbers, the best first."""
    return tl.topk(((bits.to(tl.int64) + 1) << 32) - number, KP)


@triton.jit
def number_of(candidate):
    """The number of the block or bundle that a candidate stands for."""
    return (-candidate & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def best_bundles(bits, first, end, KP: tl.constexpr, BUNDLE: tl.constexpr, BUNDLESP: tl.constexpr):
    """The KP best of the BUNDLESP bundles from `first` on. A bundle of BUNDLE blocks counts as its best block."""
    bundle = first + tl.arange(0, BUNDLESP)
    block = bundle[:, None] * BUNDLE + tl.arange(0, BUNDLE)[None, :]
    # past the first-level cache: others wrote them meanwhile
    block_bits = tl.load(bits + block, mask=block < end, other=-1, cache_modifier=".cg")
    return best_candidates(tl.max(block_bits, 1), bundle, KP)


@triton.jit
def best_blocks(bits, end, KP: tl.constexpr, BUNDLE: tl.constexpr, BUNDLESP: tl.constexpr, ONCE: tl.constexpr):
    """The KP best of the first `end` blocks, whose importances are at `bits`.

    They are all in the KP best bundles: the best block of a better bundle comes before every block of a worse one.
    ONCE: there are no more than BUNDLESP bundles.
    """
    best = best_bundles(bits, 0, end, KP, BUNDLE, BUNDLESP)
    if not ONCE:
        for first in tl.range(BUNDLESP, (end + BUNDLE - 1) // BUNDLE, BUNDLESP):
            more = best_bundles(bits, first, end, KP, BUNDLE, BUNDLESP)
            best = tl.topk(tl.reshape(tl.join(best, more), [2 * KP]), KP)
    block = number_of(best)[:, None] * BUNDLE + tl.arange(0, BUNDLE)[None, :]
    block_bits = tl.load(bits + block, mask=(best > 0)[:, None] & (block < end), other=-1, cache_modifier=".cg")
    return best_candidates(tl.reshape(block_bits, [KP * BUNDLE]), tl.reshape(block, [KP * BUNDLE]), KP)


@triton.jit
def store_chosen(selection, best, blocks, FREE: tl.constexpr, KP: tl.constexpr):
    """The FREE best blocks, ascending, -1 behind them."""
    free = tl.arange(0, KP)
    # none is behind all blocks
    chosen = tl.sort(tl.where((free < FREE) & (best > 0), number_of(best), blocks))
    tl.store(selection + free, tl.where(chosen < blocks, chosen, -1), mask=free < FREE)


@triton.jit(do_not_specialize=GROWING)
def decode_select_kernel(
    sums, carried, tops, lse, starts, lengths, importance, arrived, selection, SPLITS, T, S, HQ, HK, ROWS, TILES,
    CHUNKS, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TOPK: tl.constexpr, SLOTSP: tl.constexpr, KP: tl.constexpr, BUNDLE: tl.constexpr,
    BUNDLESP: tl.constexpr, ONCE: tl.constexpr,
    ALONE: tl.constexpr, BJ: tl.constexpr, GC: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
    TILE: tl.constexpr, SPLITSP: tl.constexpr, SCORES: tl.constexpr, INDEX: tl.constexpr,
    GP: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One program: BJ blocks, a chunk of what one query of one KV head may choose. Without SCORES no block is ever
    chosen by its importance. With INDEX they are from an index: `sums` are its maxima, of TILES blocks, HQ its heads.

    `importance [B * T * Hk, CHUNKS * BJ]` int32, its bits; `arrived [B * T * Hk]` int32 is 0, and counts chunks. ALONE:
    there is one chunk, and neither is used. A row that is not as long needs fewer chunks.
    """
    RATIO: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = KERNEL // STRIDE
    FREE: tl.constexpr = TOPK - INIT - LOCAL
    # what was written last is read first: where not all of it stays in the cache, that does
    chunk, place = tl.program_id(0) % CHUNKS, (tl.num_programs(0) - 1 - tl.program_id(0)) // CHUNKS
    kv_head, query = place % HK, place // HK
    batch, group = query // T, HQ // HK
    _, first_query = row_place(starts, lengths, batch, T, S)
    relative = first_query + query % T
    blocks = tl.where(relative >= 0, relative // BLOCK + 1, 0)
    selection += place.to(tl.int64) * TOPK
    slot = tl.arange(0, SLOTSP)
    count = tl.minimum(blocks, TOPK)
    forced = slot >= 0
    last = chunk == 0
    wait_for_previous(OVERLAP)
    begin_next(OVERLAP)
    if SCORES:
        if blocks > TOPK:
            end = blocks - LOCAL
            needed = (end + BJ - 1) // BJ
            if chunk < needed:
                pair = (batch * HK + kv_head).to(tl.int64)
                if INDEX:
                    rows = T * GP
                    sums += pair * TILES * rows + query % T * GP
                    tops += pair * SPLITS * rows + query % T * GP
                    bits = index_bits(sums, tops, group, chunk * BJ, INIT, end, SPLITS, rows, SPLITSP, GC, BJ)
                else:
                    row, rows = query % T * group, T * group
                    entry = tl.maximum(relative - (KERNEL - 1), 0) // STRIDE
                    # how many were written
                    cells = tl.where(relative >= KERNEL - 1, entry // RATIO * CELLS + entry % RATIO // CELL + 1, 0)
                    first = pair * TILES * rows + row
                    lse += query.to(tl.int64) * HQ + kv_head * group
                    bits = importance_bits(
                        sums + first * TILE, carried + first, tops + first, lse, group, cells, chunk * BJ, INIT, end,
                        SPLITS, ROWS, rows, CELLS, TILE, SPLITSP, REACH, GC, BJ,
                    )
                j = chunk * BJ + tl.arange(0, BJ)
                if ALONE:
                    store_chosen(selection + INIT, best_candidates(bits, j, KP), blocks, FREE, KP)
                else:
                    importance += place.to(tl.int64) * CHUNKS * BJ
                    tl.store(importance + j, bits)
                    # all of it is there before it counts
                    tl.debug_barrier()
                    last = tl.atomic_add(arrived + place, 1, sem="acq_rel") == needed - 1
                    if last:
                        best = best_blocks(importance, end, KP, BUNDLE, BUNDLESP, ONCE)
                        store_chosen(selection + INIT, best, blocks, FREE, KP)
            forced = (slot < INIT) | (slot >= TOPK - LOCAL)
    if last:
        # the first blocks and the local ones; all there are, where those are not more than may be selected
        block = tl.where((slot < INIT) | (blocks <= TOPK), slot, blocks + slot - count)
        tl.store(selection + slot, tl.where(slot < count, block, -1), mask=(slot < TOPK) & forced)


def select_shape(heads: int, chosen: int, blocks: int, tile: int) -> dict[str, int]:
    """How many blocks and heads a program takes at a time, how many it keeps, and of what bundles."""
    kept = max(2, next_power_of_2(chosen))
    at_once = max(16, tile, kept, min(AT_ONCE, next_power_of_2(blocks)))
    together = max(1, min(next_power_of_2(heads), 8192 // at_once))
    size = max(1, min(16, CANDIDATES // kept))
    bundles = max(kept, min(BUNDLES, next_power_of_2(cdiv(blocks, size))))
    return {
        "KP": kept, "BJ": at_once, "GC": together, "BUNDLE": size, "BUNDLESP": bundles,
        "ONCE": blocks <= bundles * size, "ALONE": blocks <= at_once, "num_warps": 4,
    }


def decode_select(
    scores: CompressedScores | IndexScores | None, placement: Placement, keys: int, sizes: Sizes,
    shape: dict[str, int], arrived: Tensor, selection: Tensor, first: bool,
) -> None:
    """Fills `selection [B, T, Hk, topk]` int32: ascending, -1 = unused.

    Args:
        scores: of whichever scorer; None where no block is ever chosen by its importance.
        shape: `select_shape`'s.
        arrived: `[B, T, Hk]` int32, zeros; of no use afterwards.
        first: whether this launch is the chain's first.
    """
    batch, tokens, kv_heads, _ = selection.shape
    blocks, index = count_blocks(keys, sizes), isinstance(scores, IndexScores)
    chunks = 1 if scores is None else cdiv(blocks, shape["BJ"])
    importance = torch.empty(*arrived.shape, chunks, shape["BJ"], dtype=torch.int32, device=arrived.device)
    sums = carried = tops = lse = arrived
    splits, heads, cells = 1, kv_heads, (1, 1, 1)
    if isinstance(scores, IndexScores):
        sums, tops, heads = scores
        splits = tops.shape[1]
    elif scores is not None:
        sums, carried, tops, lse, splits, cells = scores
        heads = lse.shape[-1]
    decode_select_kernel[(batch * tokens * kv_heads * chunks,)](
        sums, carried, tops, lse, placement.starts, placement.lengths, importance, arrived, selection, splits,
        tokens, keys, heads, kv_heads, batch * tokens * heads, sums.shape[1], chunks,
        KERNEL=sizes.kernel_size, STRIDE=sizes.kernel_stride, BLOCK=sizes.block_size, INIT=sizes.init_blocks,
        LOCAL=sizes.local_blocks, TOPK=sizes.topk, SLOTSP=next_power_of_2(sizes.topk), CELL=cells[0], CELLS=cells[1],
        TILE=cells[2], SPLITSP=next_power_of_2(splits), SCORES=scores is not None, INDEX=index,
        GP=next_power_of_2(heads // kv_heads), **shape,
        **in_chain(selection.device, first),
    )
