"""Decoding, third launch: the selected blocks and the window, in splits; the tokens of both are read once (eq. 12)."""

from __future__ import annotations

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
    wait_for_previous,
)
from ..scores.selection import count_blocks
from .scores import GROWING, row_place, softmax_step, store_partial, strides


@triton.jit
def add_values(acc, top, total, logits, seen, values, PRECISION: tl.constexpr):
    """The online softmax over the keys that are `seen [BN]`, and their values."""
    logits = tl.where(seen[None, :], logits, float("-inf"))
    weights, factor, top, total = softmax_step(top, total, logits)
    acc = tl.dot(weights.to(values.dtype), values, acc * factor[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def logits_and_values(
    queries, k, v, first, index, inside, k_token, v_token, scale_log2,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PRECISION: tl.constexpr,
):
    """The logits `[BM, BN]` of the keys `first + index` and their values `[BN, DVP]`; zero where not `inside`."""
    first = tl.cast(first, tl.int64)
    keys = load_tile(k + first * k_token, index, k_token, inside, DK, DKP)
    values = load_tile(v + first * v_token, index, v_token, inside, DV, DVP)
    return tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale_log2, values


@triton.jit
def near_tiles(
    relative, WINDOW, BLOCK: tl.constexpr, LOCAL: tl.constexpr, BN: tl.constexpr, SHARED: tl.constexpr,
):
    """What one query attends to before its selection is known.

    Returns the window's first token, the block that holds it, the first block that both branches attend to here (from
    it on the selected branch has nothing left to do), and the number of tiles of BN tokens.
    """
    TILES_A_BLOCK: tl.constexpr = (BLOCK + BN - 1) // BN
    own = tl.maximum(relative, 0) // BLOCK
    low = tl.maximum(relative - (WINDOW - 1), 0)
    first_block = low // BLOCK
    if SHARED:
        both = tl.maximum(first_block, own - (LOCAL - 1))
        count = tl.where(relative >= 0, (own - first_block + 1) * TILES_A_BLOCK, 0)
    else:
        both = own + 1
        count = tl.where(relative >= 0, (relative - low) // BN + 1, 0)
    return low, first_block, both, count


@triton.jit(do_not_specialize=GROWING)
def decode_selected_kernel(
    q, k, v, k_win, v_win, selection, starts, lengths, partial, partial_lse, scale_log2, T, S, SW, HQ, HK, ROWS,
    SLOTS, WINDOW, SPLITS, k_batch, k_token, k_head, v_batch, v_token, v_head,
    kw_batch, kw_token, kw_head, vw_batch, vw_token, vw_head,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr, LOCAL: tl.constexpr, SLOTSP: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program: a split of one query's tiles (BN tokens of a block), for BM heads of the group.

    First the window, which needs no selection: its own run of keys from `k_win`, or, if SHARED, the blocks that it
    touches, of which the local ones are for both branches. Then the other selected blocks.
    """
    begin_next(OVERLAP)
    TILES_A_BLOCK: tl.constexpr = (BLOCK + BN - 1) // BN
    group = HQ // HK
    head_tiles = (group + BM - 1) // BM
    split, place = tl.program_id(0) // head_tiles % SPLITS, tl.program_id(0) // head_tiles // SPLITS
    batch, query, kv_head = place // HK // T, place // HK, place % HK
    start, first_query = row_place(starts, lengths, batch, T, S)
    relative = first_query + query % T
    head = tl.program_id(0) % head_tiles * BM + tl.arange(0, BM)
    exists = head < group
    seeing = head < tl.where(relative >= 0, group, 0)
    row = query.to(tl.int64) * HQ + kv_head * group + head
    queries = load_tile(q, row, DK, seeing, DK, DKP)
    k += batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head + start.to(tl.int64) * k_token
    v += batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head + start.to(tl.int64) * v_token
    low, first_block, both, near = near_tiles(relative, WINDOW, BLOCK, LOCAL, BN, SHARED)
    share = (near + SPLITS - 1) // SPLITS
    begin = split * share
    end = tl.minimum(begin + share, near)

    index = tl.arange(0, BN)
    acc_slc, acc_win = tl.zeros([BM, DVP], tl.float32), tl.zeros([BM, DVP], tl.float32)
    top_slc, top_win = tl.full([BM], float("-inf"), tl.float32), tl.full([BM], float("-inf"), tl.float32)
    total_slc, total_win = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    if SHARED:
        for tile in tl.range(begin, end):
            block = first_block + tile // TILES_A_BLOCK
            offset = tile % TILES_A_BLOCK * BN
            token = block * BLOCK + offset + index
            inside = (offset + index < BLOCK) & (token <= relative)
            in_window = inside & (token >= low)
            inside = inside & (token >= both * BLOCK)
            logits, values = logits_and_values(
                queries, k, v, block * BLOCK + offset, index, inside | in_window, k_token, v_token, scale_log2,
                DK, DKP, DV, DVP, PRECISION,
            )
            acc_slc, top_slc, total_slc = add_values(acc_slc, top_slc, total_slc, logits, inside, values, PRECISION)
            acc_win, top_win, total_win = add_values(acc_win, top_win, total_win, logits, in_window, values, PRECISION)
    else:
        k_win += batch.to(tl.int64) * kw_batch + kv_head.to(tl.int64) * kw_head
        v_win += batch.to(tl.int64) * vw_batch + kv_head.to(tl.int64) * vw_head
        missing = start - (S - SW)  # of the first token, its place in k_win
        for tile in tl.range(begin, end):
            first = low + tile * BN
            inside = first + index <= relative
            logits, values = logits_and_values(
                queries, k_win, v_win, missing + first, index, inside, kw_token, vw_token, scale_log2,
                DK, DKP, DV, DVP, PRECISION,
            )
            acc_win, top_win, total_win = add_values(acc_win, top_win, total_win, logits, inside, values, PRECISION)

    wait_for_previous(OVERLAP)
    selection += place.to(tl.int64) * SLOTS
    slot = tl.arange(0, SLOTSP)
    picked = tl.load(selection + slot, mask=slot < SLOTS, other=-1)
    far = tl.sum(((picked >= 0) & (picked < both)).to(tl.int32), 0) * TILES_A_BLOCK
    far_share = (far + SPLITS - 1) // SPLITS
    for tile in tl.range(split * far_share, tl.minimum((split + 1) * far_share, far)):
        offset = tile % TILES_A_BLOCK * BN
        first = tl.load(selection + tile // TILES_A_BLOCK) * BLOCK + offset
        inside = (offset + index < BLOCK) & (first + index <= relative)
        logits, values = logits_and_values(
            queries, k, v, first, index, inside, k_token, v_token, scale_log2, DK, DKP, DV, DVP, PRECISION
        )
        acc_slc, top_slc, total_slc = add_values(acc_slc, top_slc, total_slc, logits, inside, values, PRECISION)

    origin = split.to(tl.int64) * ROWS
    store_partial(partial + origin * DV, partial_lse + origin, row, exists, acc_slc, top_slc, total_slc, DV, DVP)
    origin += SPLITS * ROWS
    store_partial(partial + origin * DV, partial_lse + origin, row, exists, acc_win, top_win, total_win, DV, DVP)


def selected_tiles(q: Tensor, v: Tensor, group: int, sizes: Sizes) -> dict[str, int]:
    """Heads and tokens of a program at a time; there are two sums of values [BM, Dv] in registers."""
    row, small = bytes_a_row(q, v.shape[-1]), shared_memory(q.device) < SMALL_SHARED_MEMORY
    block = max(16, next_power_of_2(sizes.block_size))
    if q.dtype == torch.float32:
        tiles = {"BM": 16, "BN": 32 if row <= 256 else 16, "num_warps": 4 if row <= 256 else 8, "num_stages": 2}
    elif row <= 256:
        tiles = {"BM": 16 if group <= 16 else 32, "BN": 64, "num_warps": 4, "num_stages": 2 if small else 3}
    else:
        tiles = {"BM": 16, "BN": 32, "num_warps": 4, "num_stages": 2 if small else 3}
    return {**tiles, "BN": min(tiles["BN"], block)}


def most_tiles(sizes: Sizes, places: int, keys: int, shared: bool) -> int:
    """Tiles of at most `places` tokens that a query may have."""
    tiles_a_block, blocks = -(-sizes.block_size // places), count_blocks(keys, sizes)
    window = min(sizes.window_size, keys)
    if not shared:
        return min(sizes.topk, blocks) * tiles_a_block + (window - 1) // places + 1
    near = min(blocks, (window - 1) // sizes.block_size + 2)
    return (near + min(blocks, sizes.topk)) * tiles_a_block


def selected_partials(
    q: Tensor, k: Tensor, v: Tensor, k_win: Tensor | None, v_win: Tensor | None, selection: Tensor,
    placement: Placement, sizes: Sizes, scale_log2: float, tiles: dict[str, int], splits: int,
    partial: Tensor, partial_lse: Tensor,
) -> None:
    """Writes the selected branch's splits of `partial [2 * splits, B, T, Hq, Dv]` and, behind them, the window's."""
    batch, tokens, heads, key_dim = q.shape
    keys, kv_heads, value_dim = k.shape[1], k.shape[2], v.shape[3]
    near_k, near_v = (k, v) if k_win is None or v_win is None else (k_win, v_win)
    programs = splits * batch * tokens * kv_heads * cdiv(heads // kv_heads, tiles["BM"])
    decode_selected_kernel[(programs,)](
        q, k, v, near_k, near_v, selection, placement.starts, placement.lengths, partial, partial_lse, scale_log2,
        tokens, keys, near_k.shape[1], heads, kv_heads, batch * tokens * heads, sizes.topk, sizes.window_size, splits,
        *strides(k), *strides(v), *strides(near_k), *strides(near_v), DK=key_dim, DKP=padded(key_dim), DV=value_dim,
        DVP=padded(value_dim), BLOCK=sizes.block_size, LOCAL=sizes.local_blocks, SLOTSP=next_power_of_2(sizes.topk),
        SHARED=k_win is None, PRECISION=precision(q.dtype), **tiles, **in_chain(q.device),
    )
