"""Which blocks each query attends to: scores (eqs. 8 to 10) and top-k (eqs. 11 and 12) in one pass.

The scores `[Hk, T, blocks]` are never written but for the tile at hand: a program holds the queries of some tokens with
all heads of a group, walks over the past blocks, and takes the best ones.
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
    next_power_of_2,
    precision,
    shared_memory,
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


@triton.constexpr_function
def heads_of_a_thread(rows: int, group: int) -> int:
    """Of a product of `rows` rows, in which a thread of the matrix units has the rows 8 and 64 apart, how many of these
    may be heads of one token: 1, 2 or 4."""
    if group > 32:  # on Blackwell the others would not lie in lanes that are neighbours (see `as_neighbours`)
        return 1
    return 4 if rows >= 128 and group >= 4 else 2 if rows >= 16 and group >= 2 else 1


@triton.jit
def place_rows(ROWS: tl.constexpr, GP: tl.constexpr):
    """Token of the tile and head of each row, so that `sum_heads` adds within threads where it can."""
    HEADS: tl.constexpr = heads_of_a_thread(ROWS, GP)
    REST: tl.constexpr = GP // HEADS
    row = tl.arange(0, ROWS)
    if HEADS == 1:
        return row // GP, row % GP
    head = row // 8 % 2
    other = row // 16 * 8 + row % 8
    if HEADS == 4:
        head += row // 64 * 2
        other = row % 64 // 16 * 8 + row % 8
    return other // REST, head * REST + other % REST


@triton.jit
def sum_heads(x, ROWS: tl.constexpr, GP: tl.constexpr):
    """The sums over the heads of each token, `[BT, C]`, of `x [ROWS, C]`, whose rows stand as `place_rows` says."""
    HEADS: tl.constexpr = heads_of_a_thread(ROWS, GP)
    C: tl.constexpr = x.shape[1]
    if HEADS == 4:
        x = tl.sum(tl.reshape(x, [2, 64, C]), 0)
    if HEADS >= 2:
        x = tl.sum(tl.reshape(x, [2 * ROWS // (16 * HEADS), 2, 8, C]), 1)
    if GP > HEADS:
        x = tl.sum(tl.reshape(x, [ROWS // GP, GP // HEADS, C]), 1)
    return tl.reshape(x, [ROWS // GP, C])


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
    RP: tl.constexpr = max(2, triton.next_power_of_2(BLOCK // STRIDE))
    # a block's entries in columns of one thread, as in `index.block_maxima`
    SIDE: tl.constexpr = min(BJ, 4)
    index = tl.arange(0, BJ * RP)
    block = index // (RP * SIDE) * SIDE + index // 2 % SIDE
    number = index // (2 * SIDE) % (RP // 2) * 2 + index % 2
    i = (first + block) * RATIO + number
    inside = i < visible_most
    if RP != RATIO:
        inside = inside & (number < RATIO)
    keys = load_tiles(k_cmp, (base + i).to(tl.int64), k_stride, inside, DK)
    logits = dot_tiles(q, keys, PRECISION) * scale_log2
    weights = tl.exp2(logits - lse[:, None])
    if MASKED:
        weights = tl.where(i[None, :] < visible[:, None], weights, 0.0)
    if RP != RATIO:  # of no entry it may be inf, which 0 strides do not make 0
        weights = tl.where((number < RATIO)[None, :], weights, 0.0)
    weights = tl.reshape(sum_heads(weights, BT * GP, GP), [BT, BJ // SIDE, RP // 2, SIDE, 2])
    m = tl.arange(0, RP // 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    strides = tl.where(m < RATIO, tl.minimum(BLOCK - m * STRIDE, KERNEL) // STRIDE, 0)
    rest = tl.where(m < RATIO, KERNEL // STRIDE - strides, 0)
    own = tl.sum(tl.sum(weights * strides.to(tl.float32)[None, None, :, None, :], 4), 2)
    rest = tl.sum(tl.sum(weights * rest.to(tl.float32)[None, None, :, None, :], 4), 2)
    own, rest = tl.reshape(own, [BT, BJ]), tl.reshape(rest, [BT, BJ])
    if PRECISION == "ieee":
        own, rest = as_neighbours(own), as_neighbours(rest)
    return own, rest


@triton.jit
def score_document(
    q, lse, visible, k_cmp, base, own, mine, scores, sections, most, k_stride, scale_log2, N, DK: tl.constexpr,
    BT: tl.constexpr, GP: tl.constexpr, BJ: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, SECTION: tl.constexpr, PRECISION: tl.constexpr,
):
    """Scores of the blocks before `most` of one document for its queries, `mine`."""
    # With two local blocks, a block that may be chosen and the next one are past, and so is every entry that
    # reaches into it.
    MASKED: tl.constexpr = LOCAL < 2
    seen = tl.max(visible)
    column = tl.arange(0, BJ)[None, :]
    before = tl.zeros([BT], tl.float32)  # what the last block's entries say of the next one
    best = tl.full([BT], float("-inf"), tl.float32)  # of a section so far
    for first in tl.range(0, most, BJ):
        score, behind = block_terms(
            q, lse, visible, k_cmp, base, first, seen, k_stride, scale_log2, DK, BT, GP, BJ, KERNEL, STRIDE, BLOCK,
            MASKED, PRECISION,
        )
        if KERNEL > STRIDE:
            # of the block on the left
            left = tl.gather(behind, tl.broadcast_to(tl.maximum(column - 1, 0), [BT, BJ]), 1)
            score += tl.where(column == 0, before[:, None], left)
            before = tl.sum(tl.where(column == BJ - 1, behind, 0.0), 1)
        j = first + column
        choosable = (j >= INIT) & (j <= own[:, None] - LOCAL) & mine[:, None]
        score = store_scores(score, choosable, scores, first, most, N, BT, BJ, SECTION)
        if BJ >= SECTION:
            store_sections(score, sections, first, N, BT, BJ, SECTION)
        else:
            best = tl.maximum(tl.where(first % SECTION == 0, float("-inf"), best), tl.max(score, 1))
            tl.store(sections + tl.arange(0, BT) * N + first // SECTION, best)


@Kernel
def select_kernel(
    q, k_cmp, lse, relative_ptr, document_ptr, cmp_low_ptr, selection, scores, sections, scale_log2, T, ENTRIES, HQ,
    HK, TILES, SLOTS, N, DK: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, CHOSEN: tl.constexpr,
    KP: tl.constexpr, TOPK: tl.constexpr, TOPKP: tl.constexpr, SP: tl.constexpr, SECTION: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):
    """The selected blocks of BT tokens of one KV head, one such tile after another."""
    LAST: tl.constexpr = 0x7FFFFFFF
    group = HQ // HK
    scores += tl.program_id(0).to(tl.int64) * BT * N * SECTION
    sections += tl.program_id(0).to(tl.int64) * BT * N
    row_in, row_head = place_rows(BT * GP, GP)
    for number in tl.range(tl.program_id(0), TILES, tl.num_programs(0)):
        first, batch, kv_head = find_tile(number, TILES, T, HK, BT)
        token = first + tl.arange(0, BT)
        relative = tl.load(relative_ptr + batch * T + token, mask=token < T, other=-1)
        own = tl.where(relative < 0, -1, relative // BLOCK)
        store_forced(selection, own, token, batch, kv_head, T, HK, SLOTS, INIT, LOCAL, CHOSEN, TOPK, TOPKP)
        if CHOSEN > 0:
            row_token = first + row_in
            exists = (row_token < T) & (row_head < group)
            row_relative = tl.load(relative_ptr + batch * T + row_token, mask=exists, other=-1)
            exists = exists & (row_relative >= 0)
            head = (batch * T + row_token).to(tl.int64) * HQ + kv_head * group + row_head
            queries = load_tiles(q, head, DK, exists, DK)
            log_sum = tl.load(lse + head, mask=exists, other=float("inf"))  # the weight of no head is 0
            visible = tl.where(row_relative < KERNEL - 1, 0, (row_relative - (KERNEL - 1)) // STRIDE + 1)
            visible = tl.where(exists, visible, 0)
            keys = k_cmp + (batch.to(tl.int64) * ENTRIES * HK + kv_head) * DK
            # one document of the tile after another: their blocks are counted from different places
            document = tl.load(document_ptr + batch * T + token, mask=token < T, other=LAST)
            row_document = tl.load(document_ptr + batch * T + row_token, mask=row_token < T, other=LAST)
            cmp_low = tl.load(cmp_low_ptr + batch * T + token, mask=token < T, other=0)
            current = tl.min(document)
            while current < LAST:
                mine = (document == current) & (own >= 0)
                most = tl.maximum(tl.max(tl.where(mine, own, -1)) - LOCAL + 1, 0)
                score_document(
                    queries, log_sum, tl.where(row_document == current, visible, 0), keys,
                    tl.max(tl.where(mine, cmp_low, 0)), own, mine, scores, sections, most, HK * DK, scale_log2, N, DK,
                    BT, GP, BJ, KERNEL, STRIDE, BLOCK, INIT, LOCAL, SECTION, PRECISION,
                )
                tl.debug_barrier()
                store_best(
                    scores, sections, selection, relative_ptr, document_ptr, current, first, most, batch, kv_head, T,
                    HK, SLOTS, N, BT, INIT, CHOSEN, KP, SP, SECTION, ROWS,
                )
                tl.debug_barrier()
                current = tl.min(tl.where(document > current, document, LAST))


def select_tiles(q: Tensor) -> dict[str, int]:
    """Rows (heads of some queries) and columns (entries) of a program at a time, and programs a processor."""
    row, small = bytes_a_row(q, 1), shared_memory(q.device) < SMALL_SHARED_MEMORY
    if q.dtype == torch.float32:
        return {"rows": 32, "columns": 32, "resident": 2, "num_warps": 4, "num_stages": 1}
    if row > 256:
        return {"rows": 32 if small else 128, "columns": 64, "resident": 2, "num_warps": 4, "num_stages": 2}
    # registers for three programs
    stages = 3 if row <= 128 and not small else 2
    return {"rows": 128, "columns": 64, "resident": 3, "num_warps": 4, "num_stages": stages, "maxnreg": 168}


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
    _, tokens, heads, key_dim = q.shape
    kv_heads = k_cmp.shape[2]
    check_limits(heads // kv_heads, keys, sizes)
    width = next_power_of_2(heads // kv_heads)
    tiles = select_tiles(q)
    columns = tiles.pop("columns") // max(2, next_power_of_2(sizes.block_size // sizes.kernel_stride))
    if columns == 0:  # more entries in a block: one stage of them at a time, and all registers
        tiles |= {"num_stages": 1, "maxnreg": 255}
    bt = max(1, tiles.pop("rows") // width)
    plan = plan_selection(q, kv_heads, keys, sizes, bt, 0, tiles.pop("resident"))
    selection = new_selection(q, kv_heads, keys, sizes)
    select_kernel[(plan.programs,)](
        q, k_cmp, lse, layout.relative, layout.document, layout.compressed[0], selection,
        *new_scratch(q, plan)[1:], scale_log2, tokens, k_cmp.shape[1], heads, kv_heads, plan.tiles, sizes.topk,
        plan.sections, **plan.shape, DK=key_dim, GP=width, BJ=max(1, columns), KERNEL=sizes.kernel_size,
        STRIDE=sizes.kernel_stride, PRECISION=precision(q.dtype), **tiles,
    )
    return selection
