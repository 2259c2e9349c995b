"""Which queries selected each block, for kernels that take one block after another.

A selection lists the blocks of each query; here the queries of each block are listed, by sorting.

A pick is a (query, slot) pair. A part is a selection block, or of a large one at most 64 tokens (`layout.py`). A chunk
is a run of queries, and a lane is one KV head of one row with one chunk. The local blocks are left out: those are
attended to as runs of keys (`interval.py`), so every key of a pick's part lies before its query. Sorting is stable, so
that sums over a part's picks always go in the order of the queries.
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
    """Items of work, each at most `most` picks of one part.

    Attributes:
        part: int32 `[lanes, items]`, the part of each item; the number of parts = no such item.
        number: int32 `[lanes, items]`, which of its part's items it is.
        first: int32 `[lanes, parts + 1]`, each part's first item.
        most: picks of an item, at most.
    """

    part: Tensor
    number: Tensor
    first: Tensor
    most: int


@dataclass(frozen=True)
class Chunks:
    """How the queries are cut into chunks, with a lane for each chunk and KV head of each row.

    Attributes:
        count: chunks of a row.
        tokens: queries of a chunk.
        lanes: chunks * rows * KV heads.
        parts: parts of a row.
        slots: picks of a query, at most.
        picks: slots of all queries together, used or not.
    """

    count: int
    tokens: int
    lanes: int
    parts: int
    slots: int
    picks: int


@dataclass(frozen=True)
class Gather:
    """The picks of all parts.

    Attributes:
        order: int32 `[picks]`, `query * slots + slot` of each pick, by lane, part and query.
        offsets: int32 `[lanes * parts + 1]`, where each part's picks begin; lane `chunk * B * Hk + row * Hk + head`.
        chunks: how the queries are cut.
    """

    order: Tensor
    offsets: Tensor
    chunks: Chunks

    def work(self, most: int) -> WorkList:
        """The picks shared out among items of at most `most`."""
        lanes, parts = self.chunks.lanes, self.chunks.parts
        # a bound from shapes alone: every part may have one unfilled item
        items = parts + self.chunks.tokens * self.chunks.slots // most
        first = self.offsets.new_empty(lanes, parts + 1)
        part, number = self.offsets.new_empty(2, lanes, items).unbind()
        count_items_kernel[(lanes,)](self.offsets, first, parts, most, BM=1024, num_warps=4)
        items_kernel[(cdiv(items, 256), lanes)](
            first, part, number, parts, items, search_steps(parts + 1), BM=256, num_warps=4
        )
        return WorkList(part, number, first, most)


@triton.jit
def pick_keys_kernel(
    selection, relative_ptr, part_base_ptr, keys, T, HK, TOPK, SLOTS, CHUNK, PARTS, NONE,
    BLOCK: tl.constexpr, LOCAL: tl.constexpr, PARTS_A_BLOCK: tl.constexpr, BM: tl.constexpr,
):
    """What picks are sorted by, `keys [B, Hk, T, SLOTS]`: `lane * PARTS + part`; NONE for an unused slot."""
    head = tl.program_id(1)
    batch = head // HK
    pick = tl.program_id(0) * BM + tl.arange(0, BM)
    token, slot = pick // SLOTS, pick % SLOTS
    exists = token < T
    row = (batch * T + token).to(tl.int64) * HK + head % HK
    block = tl.load(selection + row * TOPK + slot // PARTS_A_BLOCK, mask=exists, other=-1)
    relative = tl.load(relative_ptr + batch * T + token, mask=exists, other=-1)
    part = (
        tl.load(part_base_ptr + batch * T + token, mask=exists, other=0) + block * PARTS_A_BLOCK
        + slot % PARTS_A_BLOCK
    )
    past = tl.where(relative < 0, -1, relative // BLOCK - LOCAL)
    key = (token // CHUNK * tl.num_programs(1) + head) * PARTS + part
    tl.store(keys + head.to(tl.int64) * T * SLOTS + pick, tl.where((block >= 0) & (block <= past), key, NONE), exists)


@triton.jit
def offsets_kernel(ordered, order, picks, offsets, COUNT, HEAD, BORDERS, STEPS, BM: tl.constexpr):
    """From the sorted keys: where each begins, `offsets [BORDERS]`, and the picks counted within their head."""
    place = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    tl.store(picks + place, tl.load(order + place, mask=place < COUNT, other=0) % HEAD, mask=place < COUNT)
    if tl.program_id(0) * BM < BORDERS:
        border = tl.program_id(0) * BM + tl.arange(0, BM)
        tl.store(offsets + border, lower_bound(ordered, COUNT, border, STEPS), mask=border < BORDERS)


@triton.jit
def count_items_kernel(offsets, first, PARTS, MOST, BM: tl.constexpr):
    """Of one lane: each part's first item, `first [lanes, PARTS + 1]`."""
    lane = tl.program_id(0)
    first += lane.to(tl.int64) * (PARTS + 1)
    before = 0
    for p in tl.range(0, PARTS + 1, BM):
        part = p + tl.arange(0, BM)
        border = offsets + lane * PARTS + part
        count = tl.load(border + 1, mask=part < PARTS, other=0) - tl.load(border, mask=part < PARTS, other=0)
        items = (count + (MOST - 1)) // MOST
        upto = tl.cumsum(items, 0)
        tl.store(first + part, before + upto - items, mask=part <= PARTS)
        before += tl.sum(items, 0)


@triton.jit
def items_kernel(first, part_out, number_out, PARTS, ITEMS, STEPS, BM: tl.constexpr):
    """Each item's part and which of its items it is; PARTS where there is no such item."""
    lane = tl.program_id(1).to(tl.int64)
    first += lane * (PARTS + 1)
    item = tl.program_id(0) * BM + tl.arange(0, BM)
    part = lower_bound(first, PARTS + 1, item + 1, STEPS) - 1
    tl.store(part_out + lane * ITEMS + item, part, mask=item < ITEMS)
    tl.store(number_out + lane * ITEMS + item, item - tl.load(first + part), mask=item < ITEMS)


def count_slots(sizes: Sizes, parts_a_block: int, keys: int) -> int:
    """Most picks of a query: parts that are not of a local block."""
    blocks = min(sizes.topk, (keys - 1) // sizes.block_size + 1)
    return max(0, blocks - sizes.local_blocks) * parts_a_block


def cut_queries(
    batch: int, tokens: int, kv_heads: int, parts: int, slots: int, pick_bytes: int, budget: int
) -> Chunks:
    """Chunks of the queries whose partial results, `pick_bytes` each, fit the budget for one KV head of one row.

    Raises:
        ValueError: more (query, block) pairs than are counted.
    """
    chunks = min(tokens, max(1, -(-tokens * slots * pick_bytes // budget)))
    # a multiple of 64, so that few kinds of lengths are compiled for
    chunk_tokens = -(-tokens // chunks)
    chunk_tokens = min(tokens, -(-chunk_tokens // 64) * 64)
    chunks = -(-tokens // chunk_tokens)
    lanes, picks = chunks * batch * kv_heads, batch * kv_heads * tokens * slots
    if picks >= 1 << 31 or lanes * parts >= (1 << 31) - 1:
        raise ValueError(
            f"backend='triton' counts at most 2^31 (query, block) pairs, got {batch} rows of {tokens} queries, "
            f"{kv_heads} heads and {slots} blocks each: use fewer queries a call"
        )
    return Chunks(chunks, chunk_tokens, lanes, parts, slots, picks)


def gather_queries(selection: Tensor, layout: Layout, sizes: Sizes, chunks: Chunks) -> Gather:
    """The picks of each part, from the selection `[B, T, Hk, topk]` (int32, ascending, -1 = unused)."""
    batch, tokens, kv_heads, topk = selection.shape
    heads, a_head, count = batch * kv_heads, tokens * chunks.slots, chunks.picks
    none = chunks.lanes * chunks.parts
    # half as many digits to sort by where that is enough
    keys = selection.new_empty(count, dtype=torch.int16 if none < 1 << 15 else torch.int32)
    pick_keys_kernel[(cdiv(a_head, 1024), heads)](
        selection, layout.relative, layout.part_base, keys, tokens, kv_heads, topk, chunks.slots, chunks.tokens,
        chunks.parts, none, BLOCK=sizes.block_size, LOCAL=sizes.local_blocks, PARTS_A_BLOCK=layout.parts_a_block,
        BM=1024, num_warps=4,
    )
    ordered, order = keys.sort(stable=True)
    picks, offsets = selection.new_empty(count), selection.new_empty(none + 1)
    offsets_kernel[(cdiv(max(count, none + 1), 1024),)](
        ordered, order, picks, offsets, count, a_head, none + 1, search_steps(count), BM=1024, num_warps=4
    )
    return Gather(picks, offsets, chunks)


def launches(chunks: Chunks, pick_bytes: int, budget: int) -> list[tuple[int, int]]:
    """Runs of lanes `(first, count)` whose partial results fit the budget together; none crosses a chunk."""
    heads = chunks.lanes // chunks.count
    at_once = max(1, min(heads, budget // (chunks.tokens * chunks.slots * pick_bytes)))
    return [
        (chunk * heads + first, min(at_once, heads - first))
        for chunk in range(chunks.count)
        for first in range(0, heads, at_once)
    ]


def picks_a_tile(rows: int, group: int) -> int:
    """Picks whose heads fill about `rows` rows."""
    return max(1, cdiv(rows, group))
