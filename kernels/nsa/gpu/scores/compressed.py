"""Which blocks each query attends to: scores (eqs. 8 to 10) and top-k (eqs. 11 and 12) in one pass.

The scores `[Hk, T, blocks]` are never written: a program holds the queries of some tokens with all heads of a group,
walks over the blocks and keeps the best so far.
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
    bytes_a_row,
    cdiv,
    next_power_of_2,
    precision,
    shared_memory,
)
from ..launch import Kernel
from ..layout import Layout
from ..tiles import dot_tiles, load_tiles
from .selection import check_limits, count_blocks, new_selection


@triton.jit
def block_terms(
    q, lse, visible, k_cmp, base, first, visible_most, k_stride, scale_log2, DK: tl.constexpr, BT: tl.constexpr,
    GP: tl.constexpr, BJ: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """What the entries that begin in the blocks `[first, first + BJ)` say, summed over the heads.

    Entry `i` lies in the block `j` in which it begins and in the next one: of its weight
    `exp2(logit[i] - lse)`, `overlap(i, j) / d` counts for `j` and the rest of `l / d` for `j + 1`. Returns both sums,
    `[BT, BJ]`. Without MASKED they mean nothing where entry `i` is not visible.
    """
    RATIO: tl.constexpr = BLOCK // STRIDE
    RP: tl.constexpr = triton.next_power_of_2(BLOCK // STRIDE)
    index = tl.arange(0, BJ * RP)
    i = (first + index // RP) * RATIO + index % RP
    inside = (i >= 0) & (i < visible_most)
    if RP != RATIO:
        inside = inside & (index % RP < RATIO)
    keys = load_tiles(k_cmp, (base + i).to(tl.int64), k_stride, inside, DK)
    logits = dot_tiles(q, keys, PRECISION) * scale_log2
    weights = tl.exp2(logits - lse[:, None])
    if MASKED:
        weights = tl.where((i[None, :] >= 0) & (i[None, :] < visible[:, None]), weights, 0.0)
    weights = tl.reshape(weights, [BT, GP, BJ, RP])
    m = tl.arange(0, RP)
    strides = tl.where(m < RATIO, tl.minimum(BLOCK - m * STRIDE, KERNEL) // STRIDE, 0)
    rest = tl.where(m < RATIO, KERNEL // STRIDE - strides, 0)
    own = tl.sum(tl.sum(weights * strides.to(tl.float32)[None, None, None, :], 3), 1)
    return own, tl.sum(tl.sum(weights * rest.to(tl.float32)[None, None, None, :], 3), 1)


@triton.jit
def keep_best(best, importance, j, candidate, KP: tl.constexpr, BJ: tl.constexpr):
    """The best of `best [BT, KP]`, which rises, and the candidates among the blocks `j`.

    A key holds the importance above and the inverted index below: no two are equal, ties go to the lower index.
    """
    NONE: tl.constexpr = -(1 << 62)
    key = (importance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (j ^ 0x7FFFFFFF)[None, :].to(tl.int64)
    key = tl.where(candidate, key, NONE)
    if KP <= BJ:
        if tl.max((tl.max(key, 1) > tl.min(best, 1)).to(tl.int32)) > 0:
            # of two sorted runs, one rising and one falling, the larger of each pair are the best of both
            best = tl.sort(tl.maximum(best, tl.topk(key, KP, dim=1)), dim=1)
    else:
        # the largest is taken as long as any row wants it
        worst, largest = tl.min(best, 1), tl.max(key, 1)
        while tl.max((largest > worst).to(tl.int32)) > 0:
            taken = (largest > worst)[:, None]
            best = tl.where(taken & (best == worst[:, None]), largest[:, None], best)
            key = tl.where(taken & (key == largest[:, None]), NONE, key)
            worst, largest = tl.min(best, 1), tl.max(key, 1)
    return best


@triton.jit
def best_of_document(
    best, q, lse, visible, k_cmp, base, own, mine, k_stride, scale_log2, DK: tl.constexpr, BT: tl.constexpr,
    GP: tl.constexpr, BJ: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
):
    """`best` and those of the blocks `[INIT, own - LOCAL]` of the queries `mine` of one document."""
    # With two local blocks, a block that may be chosen and the next one are past, and so is every entry that
    # reaches into it; the first blocks are the only ones with a part before the text.
    MASKED: tl.constexpr = LOCAL < 2
    most, seen = tl.max(tl.where(mine, own, -1)), tl.max(visible)
    column = tl.arange(0, BJ)[None, :]
    before = tl.zeros([BT], tl.float32)
    if INIT > 0 and KERNEL > STRIDE:
        # what the block before the first one leaves for it
        FEW: tl.constexpr = triton.cdiv(16, triton.next_power_of_2(BLOCK // STRIDE))
        _, first_rest = block_terms(
            q, lse, visible, k_cmp, base, INIT - FEW, seen, k_stride, scale_log2, DK, BT, GP, FEW, KERNEL, STRIDE,
            BLOCK, True, PRECISION,
        )
        before = tl.sum(tl.where(tl.arange(0, FEW)[None, :] == FEW - 1, first_rest, 0.0), 1)
    for first in tl.range(INIT, most - LOCAL + 1, BJ):
        importance, rest = block_terms(
            q, lse, visible, k_cmp, base, first, seen, k_stride, scale_log2, DK, BT, GP, BJ, KERNEL, STRIDE, BLOCK,
            MASKED, PRECISION,
        )
        if KERNEL > STRIDE:
            left = tl.gather(rest, tl.maximum(column - 1, 0) + tl.zeros([BT, 1], tl.int32), 1)
            importance += tl.where(column == 0, before[:, None], left)
            before = tl.sum(tl.where(column == BJ - 1, rest, 0.0), 1)
        j = first + tl.arange(0, BJ)
        best = keep_best(best, importance, j, (j[None, :] <= own[:, None] - LOCAL) & mine[:, None], KP, BJ)
    return best


@Kernel
@triton.jit
def select_kernel(
    q, k_cmp, lse, relative_ptr, document_ptr, cmp_low_ptr, selection, scale_log2, T, N, HQ, HK, SLOTS,
    DK: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, CHOSEN: tl.constexpr,
    KP: tl.constexpr, TOPK: tl.constexpr, TOPKP: tl.constexpr, EVERY: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The selected blocks of BT tokens of one KV head; EVERY: there are no more blocks than may be selected."""
    LAST: tl.constexpr = 0x7FFFFFFF
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, kv_head = tl.program_id(1) // HK, tl.program_id(1) % HK
    group = HQ // HK
    token = tile * BT + tl.arange(0, BT)
    relative = tl.load(relative_ptr + batch * T + token, mask=token < T, other=-1)
    own = tl.where(relative < 0, -1, relative // BLOCK)
    # what may be chosen: the blocks [INIT, own - LOCAL]
    free = tl.minimum(tl.maximum(own + 1 - INIT - LOCAL, 0), CHOSEN)
    slot = tl.arange(0, TOPKP)
    place = selection + (((batch * T + token).to(tl.int64) * HK + kv_head) * SLOTS)[:, None]

    if CHOSEN > 0 and not EVERY:
        # rows of the tile: head g of token t at t * GP + g
        row = tl.arange(0, BT * GP)
        row_token = tile * BT + row // GP
        exists = (row_token < T) & (row % GP < group)
        row_relative = tl.load(relative_ptr + batch * T + row_token, mask=exists, other=-1)
        exists = exists & (row_relative >= 0)
        head = (batch * T + row_token).to(tl.int64) * HQ + kv_head * group + row % GP
        queries = load_tiles(q, head, DK, exists, DK)
        log_sum = tl.load(lse + head, mask=exists, other=float("inf"))  # the weight of no head is 0
        visible = tl.where(row_relative < KERNEL - 1, 0, (row_relative - (KERNEL - 1)) // STRIDE + 1)
        visible = tl.where(exists, visible, 0)
        keys = k_cmp + (batch.to(tl.int64) * N * HK + kv_head) * DK
        # empty places hold different numbers below every key; those behind CHOSEN are above
        rank = tl.arange(0, KP)[None, :]
        best = tl.where(rank < CHOSEN, rank.to(tl.int64) - CHOSEN, (1 << 63) - 1) + tl.zeros([BT, 1], tl.int64)
        if PACKED:
            # one document of the tile after another: their blocks are counted from different places
            document = tl.load(document_ptr + batch * T + token, mask=token < T, other=LAST)
            row_document = tl.load(document_ptr + batch * T + row_token, mask=row_token < T, other=LAST)
            cmp_low = tl.load(cmp_low_ptr + batch * T + token, mask=token < T, other=0)
            current = tl.min(document)
            while current < LAST:
                mine = document == current
                best = best_of_document(
                    best, queries, log_sum, tl.where(row_document == current, visible, 0), keys,
                    tl.max(tl.where(mine, cmp_low, 0)), own, mine, HK * DK, scale_log2, DK, BT, GP, BJ, KERNEL, STRIDE,
                    BLOCK, INIT, LOCAL, KP, PRECISION,
                )
                current = tl.min(tl.where(document > current, document, LAST))
        else:
            best = best_of_document(
                best, queries, log_sum, visible, keys, 0, own, own >= 0, HK * DK, scale_log2, DK, BT, GP, BJ, KERNEL,
                STRIDE, BLOCK, INIT, LOCAL, KP, PRECISION,
            )
        # the low half of a key holds the inverted index
        index = ((best & LAST) ^ LAST).to(tl.int32)
        index = tl.sort(tl.where((rank < CHOSEN) & (best >= 0), index, LAST))
        tl.store(place + INIT + rank, index, mask=(rank < free[:, None]) & (token < T)[:, None])

    # forced blocks and unused places; the chosen ones stand between the first and the local blocks
    count = tl.minimum(own + 1, TOPK)
    behind = slot[None, :] - count[:, None]
    block = tl.where(slot[None, :] < INIT, slot[None, :], own[:, None] + 1 + behind)
    if EVERY:
        block = slot[None, :] + tl.zeros([BT, 1], tl.int32)
        chosen = slot[None, :] < 0
    else:
        chosen = (slot[None, :] >= INIT) & (slot[None, :] < INIT + free[:, None])
    block = tl.where(behind < 0, block, -1)
    tl.store(place + slot[None, :], block, mask=(slot < TOPK)[None, :] & (token < T)[:, None] & ~chosen)


def select_tiles(q: Tensor, group: int) -> dict[str, int]:
    """Rows (heads of some queries) and columns (entries) of a program at a time."""
    row, small = bytes_a_row(q, 1), shared_memory(q.device) < SMALL_SHARED_MEMORY
    if q.dtype == torch.float32:
        return {"rows": 32, "columns": 32, "num_warps": 4, "num_stages": 1}
    if row > 256 and small:
        return {"rows": 32, "columns": 64, "num_warps": 4, "num_stages": 2}
    wide = row > 128 and group >= 8 and not small
    return {"rows": 128, "columns": 128 if row <= 256 and wide else 64, "num_warps": 8, "num_stages": 2}


class CompressedInputs(NamedTuple):
    """What the compressed branch is scored from.

    Attributes:
        q: `[B, T, Hq, Dk]`.
        k_cmp: `[B, N, Hk, Dk]`.
        lse: `[B, T, Hq]` float32, the branch's log2-sum-exp.
        keys: S, how many keys a row has.
        scale_log2: of the logits, times log2(e).
    """

    q: Tensor
    k_cmp: Tensor
    lse: Tensor
    keys: int
    scale_log2: float


def select_by_compressed(inputs: CompressedInputs, layout: Layout, sizes: Sizes) -> Tensor:
    """The scorer of the compressed branch (eqs. 8 to 12).

    Returns:
        The selection `[B, T, Hk, topk]` int32, ascending, -1 = unused.

    Raises:
        ValueError: more query heads share a KV head, or more blocks are to be chosen, than the kernel takes.
    """
    q, k_cmp, lse, keys, scale_log2 = inputs
    batch, tokens, heads, key_dim = q.shape
    kv_heads = k_cmp.shape[2]
    check_limits(heads // kv_heads, keys, sizes)
    every = sizes.topk >= count_blocks(keys, sizes)
    chosen = max(0, sizes.topk - sizes.init_blocks - sizes.local_blocks)
    selection, topk = new_selection(q, kv_heads, keys, sizes)
    width = next_power_of_2(heads // kv_heads)
    kept = 2 if every else max(2, next_power_of_2(chosen))
    tiles = select_tiles(q, width)
    rows = max(tiles["rows"], width)
    columns = max(1, tiles["columns"] // next_power_of_2(sizes.block_size // sizes.kernel_stride))
    bt = max(1, rows // width)
    if every:
        bt = 16
    select_kernel[(cdiv(tokens, bt), batch * kv_heads)](
        q, k_cmp, lse, layout.relative, layout.document, layout.compressed[0], selection, scale_log2, tokens,
        k_cmp.shape[1], heads, kv_heads, sizes.topk,
        DK=key_dim, GP=width, BT=bt, BJ=columns, KERNEL=sizes.kernel_size, STRIDE=sizes.kernel_stride,
        BLOCK=sizes.block_size, INIT=sizes.init_blocks, LOCAL=sizes.local_blocks, CHOSEN=chosen, KP=kept, TOPK=topk,
        TOPKP=next_power_of_2(topk), EVERY=every, PACKED=layout.packed, PRECISION=precision(q.dtype),
        num_warps=tiles["num_warps"], num_stages=tiles["num_stages"],
    )
    return selection
