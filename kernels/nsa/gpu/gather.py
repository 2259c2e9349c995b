"""Which queries selected each block: the selection turned round, for kernels that take one block after another.

An entry is a (query, slot) pair; a part is a selection block, or a piece of a large one (`triton_layout`); a group is
one KV head of one row and one run of `piece_tokens` queries. The local blocks are left out: those are attended to as
runs of keys (`triton_interval`), so every key of an entry's part lies before its query. Sorting is stable, so that sums
over a part's entries always go in the order of the queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import Sizes
from .common import cdiv, lower_bound, search_steps
from .layout import Layout


class WorkList(NamedTuple):
    """Pieces of at most `most` entries of one part: `part [groups, items]` int32 (the number of parts = no such item),
    `chunk [groups, items]` int32, and `first [groups, parts + 1]` int32, each part's first item."""

    part: Tensor
    chunk: Tensor
    first: Tensor
    most: int


@dataclass(frozen=True)
class Pieces:
    """How the queries are cut: `count` runs of `tokens` queries, for each KV head of each row a group of its own."""

    count: int
    tokens: int
    groups: int
    parts: int
    slots: int
    entries: int


@dataclass(frozen=True)
class Gather:
    """The entries of all parts.

    `order [entries]` int32: `query * slots + slot` of each entry, by group, part and query;
    `offsets [groups * parts + 1]` int32: where each part's entries begin; group `piece * B * Hk + row * Hk + head`.
    """

    order: Tensor
    offsets: Tensor
    pieces: Pieces

    def work(self, most: int) -> WorkList:
        """The entries cut into pieces of at most `most`."""
        groups, parts = self.pieces.groups, self.pieces.parts
        # a bound from shapes alone: every part may have one unfilled piece
        items = parts + self.pieces.tokens * self.pieces.slots // most
        first = self.offsets.new_empty(groups, parts + 1)
        part, chunk = self.offsets.new_empty(2, groups, items).unbind()
        count_items_kernel[(groups,)](self.offsets, first, parts, most, BM=1024, num_warps=4)
        items_kernel[(cdiv(items, 256), groups)](
            first, part, chunk, parts, items, search_steps(parts + 1), BM=256, num_warps=4
        )
        return WorkList(part, chunk, first, most)


@triton.jit
def entry_keys_kernel(
    selection, relative_ptr, part_base_ptr, keys, T, HK, TOPK, SLOTS, PIECE, PARTS, NONE,
    BLOCK: tl.constexpr, LOCAL: tl.constexpr, PER_BLOCK: tl.constexpr, BM: tl.constexpr,
):
    """What entries are sorted by, `keys [B, Hk, T, SLOTS]`: `group * PARTS + part`; NONE for an unused slot."""
    head = tl.program_id(1)
    batch = head // HK
    entry = tl.program_id(0) * BM + tl.arange(0, BM)
    token, slot = entry // SLOTS, entry % SLOTS
    exists = token < T
    row = (batch * T + token).to(tl.int64) * HK + head % HK
    block = tl.load(selection + row * TOPK + slot // PER_BLOCK, mask=exists, other=-1)
    relative = tl.load(relative_ptr + batch * T + token, mask=exists, other=-1)
    part = tl.load(part_base_ptr + batch * T + token, mask=exists, other=0) + block * PER_BLOCK + slot % PER_BLOCK
    past = tl.where(relative < 0, -1, relative // BLOCK - LOCAL)
    key = (token // PIECE * tl.num_programs(1) + head) * PARTS + part
    tl.store(keys + head.to(tl.int64) * T * SLOTS + entry, tl.where((block >= 0) & (block <= past), key, NONE), exists)


@triton.jit
def offsets_kernel(ordered, order, entries, offsets, COUNT, HEAD, BORDERS, STEPS, BM: tl.constexpr):
    """From the sorted keys: where each begins, `offsets [BORDERS]`, and the entries counted within their head."""
    place = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    tl.store(entries + place, tl.load(order + place, mask=place < COUNT, other=0) % HEAD, mask=place < COUNT)
    if tl.program_id(0) * BM < BORDERS:
        border = tl.program_id(0) * BM + tl.arange(0, BM)
        tl.store(offsets + border, lower_bound(ordered, COUNT, border, STEPS), mask=border < BORDERS)


@triton.jit
def count_items_kernel(offsets, first, PARTS, MOST, BM: tl.constexpr):
    """Of one group: each part's first item, `first [groups, PARTS + 1]`."""
    group = tl.program_id(0)
    first += group.to(tl.int64) * (PARTS + 1)
    before = 0
    for p in tl.range(0, PARTS + 1, BM):
        part = p + tl.arange(0, BM)
        border = offsets + group * PARTS + part
        count = tl.load(border + 1, mask=part < PARTS, other=0) - tl.load(border, mask=part < PARTS, other=0)
        items = (count + (MOST - 1)) // MOST
        upto = tl.cumsum(items, 0)
        tl.store(first + part, before + upto - items, mask=part <= PARTS)
        before += tl.sum(items, 0)


@triton.jit
def items_kernel(first, part_out, chunk_out, PARTS, ITEMS, STEPS, BM: tl.constexpr):
    """Each item's part and which piece of it; PARTS where there is no such item."""
    group = tl.program_id(1).to(tl.int64)
    first += group * (PARTS + 1)
    item = tl.program_id(0) * BM + tl.arange(0, BM)
    part = lower_bound(first, PARTS + 1, item + 1, STEPS) - 1
    tl.store(part_out + group * ITEMS + item, part, mask=item < ITEMS)
    tl.store(chunk_out + group * ITEMS + item, item - tl.load(first + part), mask=item < ITEMS)


def count_slots(sizes: Sizes, parts_a_block: int, keys: int) -> int:
    """Most entries of a query: parts that are not of a local block."""
    blocks = min(sizes.topk, (keys - 1) // sizes.block_size + 1)
    return max(0, blocks - sizes.local_blocks) * parts_a_block


def cut_queries(
    batch: int, tokens: int, kv_heads: int, parts: int, slots: int, entry_bytes: int, budget: int
) -> Pieces:
    """Pieces of the queries whose partial results, `entry_bytes` each, fit the budget for one KV head of one row.

    Raises:
        ValueError: more (query, block) pairs than are counted.
    """
    pieces = min(tokens, max(1, -(-tokens * slots * entry_bytes // budget)))
    # a multiple of 64, so that few kinds of lengths are compiled for
    piece_tokens = -(-tokens // pieces)
    piece_tokens = min(tokens, -(-piece_tokens // 64) * 64)
    pieces = -(-tokens // piece_tokens)
    groups, entries = pieces * batch * kv_heads, batch * kv_heads * tokens * slots
    if entries >= 1 << 31 or groups * parts >= (1 << 31) - 1:
        raise ValueError(
            f"backend='triton' counts at most 2^31 (query, block) pairs, got {batch} rows of {tokens} queries, "
            f"{kv_heads} heads and {slots} blocks each: use fewer queries a call"
        )
    return Pieces(pieces, piece_tokens, groups, parts, slots, entries)


def gather_queries(selection: Tensor, layout: Layout, sizes: Sizes, pieces: Pieces) -> Gather:
    """Turns the selection `[B, T, Hk, topk]` (int32, ascending, -1 = unused) round."""
    batch, tokens, kv_heads, topk = selection.shape
    heads, a_head, count = batch * kv_heads, tokens * pieces.slots, pieces.entries
    none = pieces.groups * pieces.parts
    # half as many digits to sort by where that is enough
    keys = selection.new_empty(count, dtype=torch.int16 if none < 1 << 15 else torch.int32)
    entry_keys_kernel[(cdiv(a_head, 1024), heads)](
        selection, layout.relative, layout.part_base, keys, tokens, kv_heads, topk, pieces.slots, pieces.tokens,
        pieces.parts, none, BLOCK=sizes.block_size, LOCAL=sizes.local_blocks, PER_BLOCK=layout.parts_a_block, BM=1024,
        num_warps=4,
    )
    ordered, order = keys.sort(stable=True)
    entries, offsets = selection.new_empty(count), selection.new_empty(none + 1)
    offsets_kernel[(cdiv(max(count, none + 1), 1024),)](
        ordered, order, entries, offsets, count, a_head, none + 1, search_steps(count), BM=1024, num_warps=4
    )
    return Gather(entries, offsets, pieces)


def launches(pieces: Pieces, entry_bytes: int, budget: int) -> list[tuple[int, int]]:
    """Runs of groups `(first, count)` whose partial results fit the budget together; none crosses a run of queries."""
    heads = pieces.groups // pieces.count
    at_once = max(1, min(heads, budget // (pieces.tokens * pieces.slots * entry_bytes)))
    return [
        (piece * heads + first, min(at_once, heads - first))
        for piece in range(pieces.count)
        for first in range(0, heads, at_once)
    ]


def entries_a_tile(rows: int, group: int) -> int:
    """Entries whose heads fill about `rows` rows."""
    return max(1, cdiv(rows, group))
