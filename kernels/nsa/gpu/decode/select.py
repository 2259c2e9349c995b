"""Decoding, second launch: the scores of the splits and heads together, and the selected blocks (eqs. 9 to 12).

Several programs share the past of a query: each adds up its blocks' importance, and the last one that has it chooses
among all of them. A candidate is one int64, `(1 + the importance's bits) * 2^32 - number`: bits order as numbers do
that are not negative, and of equal ones the first is the largest. Not positive: none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...placement import Placement
from ...sizes import Sizes
from ..common import begin_next, cdiv, following, next_power_of_2, wait_for_previous
from .scores import GROWING, row_place

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
    TILE: tl.constexpr, SPLITSP: tl.constexpr, SCORES: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One program: BJ blocks, a chunk of what one query of one KV head may choose. Without SCORES no block is ever
    chosen by its importance.

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
                entry = tl.maximum(relative - (KERNEL - 1), 0) // STRIDE
                # how many were written
                cells = tl.where(relative >= KERNEL - 1, entry // RATIO * CELLS + entry % RATIO // CELL + 1, 0)
                rows, row = T * group, query % T * group
                tiles = (batch * HK + kv_head).to(tl.int64) * TILES
                sums += (tiles * rows + row) * TILE
                carried += tiles * rows + row
                tops += tiles * rows + row
                lse += query.to(tl.int64) * HQ + kv_head * group
                bits = importance_bits(
                    sums, carried, tops, lse, group, cells, chunk * BJ, INIT, end, SPLITS, ROWS, rows, CELLS, TILE,
                    SPLITSP, REACH, GC, BJ,
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
    partial_lse: Tensor, splits: int, placement: Placement, keys: int, sizes: Sizes,
    cell: tuple[int, int, int], scores: tuple[Tensor, ...] | None, shape: dict[str, int], importance: Tensor,
    arrived: Tensor, selection: Tensor,
) -> None:
    """Fills `selection [B, T, Hk, topk]` int32: ascending, -1 = unused.

    Args:
        partial_lse: `[at least splits, B, T, Hq]`, of the compressed branch.
        scores: as `compressed_partials` writes them; None where no block is ever chosen by its importance.
        shape: `select_shape`'s.
        importance: `[B, T, Hk, chunks, BJ]` int32, `chunks` of `BJ` blocks being all there are; room to work in.
        arrived: `[B, T, Hk]` int32, zeros; of no use afterwards.
    """
    _, batch, tokens, heads = partial_lse.shape
    kv_heads = selection.shape[2]
    chunks = importance.shape[3]
    sums, carried, tops = scores or (partial_lse,) * 3
    decode_select_kernel[(batch * tokens * kv_heads * chunks,)](
        sums, carried, tops, partial_lse, placement.starts, placement.lengths, importance, arrived, selection, splits,
        tokens, keys, heads, kv_heads, batch * tokens * heads, sums.shape[1], chunks,
        KERNEL=sizes.kernel_size, STRIDE=sizes.kernel_stride, BLOCK=sizes.block_size, INIT=sizes.init_blocks,
        LOCAL=sizes.local_blocks, TOPK=sizes.topk, SLOTSP=next_power_of_2(sizes.topk), CELL=cell[0], CELLS=cell[1],
        TILE=cell[2], SPLITSP=next_power_of_2(splits), SCORES=scores is not None, **shape,
        **following(selection.device),
    )
