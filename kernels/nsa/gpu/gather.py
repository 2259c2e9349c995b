"""Which queries selected each block, for kernels that take one block after another.

A selection lists the blocks of each query; here the queries of each block are listed, by a counting sort.

A pick is a (query, slot) pair. A part is a selection block, or of a large one at most 64 tokens (`layout.py`). A chunk
is a run of queries, and a lane is one KV head of one row with one chunk. The local blocks are left out: those are
attended to as runs of keys (`interval.py`), so every key of a pick's part lies before its query. The picks of a part
stand in the order of the queries, so that sums over them always go that way.

    count   each part's picks in every tile of a lane's queries, and of each pick those before it in its tile
    scan    the counts, over the tiles of a part and over the parts: where each tile's picks of a part begin
    place   each pick where it belongs

An item is at most so many picks of one part, what one program takes. Which ones follows from where the parts begin
(`find_item`), so that there is no list of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sizes import Sizes
from .common import cdiv, next_power_of_2
from .launch import Kernel
from .layout import Layout

# Tiles that a row's queries are counted in, about. A count takes 8 bytes for each lane, tile and part: 4 MB with 8
# KV heads at 65,536 tokens. On an H100 all takes .32 ms there, with 256 tiles too, and 1.6 at 262,144, with 256 2.0.
MOST_TILES = 64


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
        order: int32 `[picks]`, `query * slots + slot` of each pick, by lane, part and query; behind a lane's last pick
            stands nothing up to the next lane's first one.
        offsets: int32 `[lanes, parts + 1]`, where each part's picks begin; lane `chunk * B * Hk + row * Hk + head`.
        chunks: how the queries are cut.
    """

    order: Tensor
    offsets: Tensor
    chunks: Chunks

    def items(self, most: int) -> int:
        """How many items of `most` picks a lane has at most: every part may have one that is not full."""
        return self.chunks.parts + self.chunks.tokens * self.chunks.slots // most


@triton.jit
def first_item(offsets, begin, part, PARTS, MOST: tl.constexpr):
    """The first item of a part; the next part's is as many items later as this one needs, or one more.

    Args:
        begin: `offsets[0]`.
    """
    return (tl.load(offsets + part, mask=part <= PARTS, other=0) - begin) // MOST + part


@triton.jit
def find_item(offsets, item, PARTS, STEPS, MOST: tl.constexpr):
    """An item's part and its picks `[first, last)`, none where there is no such item.

    Args:
        offsets: of the lane.
        STEPS: `item_steps(PARTS)`.
    """
    begin = tl.load(offsets)
    low = item * 0
    # a step of 32 loads at once takes hardly longer than one of a single load
    width = 1 << (5 * STEPS - 5)
    for _ in tl.range(0, STEPS):
        part = low + (1 + tl.arange(0, 32)) * width
        begun = (part <= PARTS) & (first_item(offsets, begin, part, PARTS, MOST) <= item)
        low += tl.sum(begun.to(tl.int32), 0) * width
        width = width >> 5
    first = tl.load(offsets + low) + (item - first_item(offsets, begin, low, PARTS, MOST)) * MOST
    last = tl.load(offsets + low + 1, mask=low < PARTS, other=0)
    return low, first, tl.minimum(last, first + MOST)


def item_steps(parts: int) -> int:
    """Steps after which `find_item` has found an item's part."""
    return max(1, cdiv(parts.bit_length(), 5))


@triton.jit
def bits_set(x):
    """How many of the 32 bits of `x` int32 are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def find_parts(
    selection, relative_ptr, part_base_ptr, pick, end, batch, head, T, HK, TOPK, SLOTS,
    BLOCK: tl.constexpr, LOCAL: tl.constexpr, PARTS_A_BLOCK: tl.constexpr,
):
    """The parts of the slots `pick` of one KV head, and their queries; part -1 for an unused one or from `end` on."""
    token, slot = pick // SLOTS, pick % SLOTS
    exists = pick < end
    row = (batch * T + token).to(tl.int64) * HK + head
    block = tl.load(selection + row * TOPK + slot // PARTS_A_BLOCK, mask=exists, other=-1)
    relative = tl.load(relative_ptr + batch * T + token, mask=exists, other=-1)
    base = tl.load(part_base_ptr + batch * T + token, mask=exists, other=0)
    past = tl.where(relative < 0, -1, relative // BLOCK - LOCAL)
    part = base + block * PARTS_A_BLOCK + slot % PARTS_A_BLOCK
    return tl.where((block >= 0) & (block <= past), part, -1), token


@triton.jit
def row_of_parts(PARTS):
    """How far the counts of one tile of queries and the next are apart: so that several are read at once."""
    return tl.cdiv(PARTS, 16) * 16


@Kernel
def count_kernel(
    selection, relative_ptr, part_base_ptr, words, totals, ranks, T, BH, HK, TOPK, SLOTS, CHUNK, PARTS, QUERIES,
    BLOCK: tl.constexpr, LOCAL: tl.constexpr, PARTS_A_BLOCK: tl.constexpr, BM: tl.constexpr,
):
    """Counts the picks of a tile of QUERIES queries, 32 at a time: `words [lanes, tiles, row_of_parts(PARTS)]` int64 is
    the count of a part so far, and in the upper half a bit for each of the 32 that chose it. Bits and counts come the
    same in whatever order the programs add them.

    Writes the counts, adds them to `totals [lanes, PARTS]`, and of each pick writes how many of the tile and its part
    come before it, `ranks [B, HK, T, SLOTS]` int32.
    """
    tile, lane = tl.program_id(0), tl.program_id(1)
    chunk, row = lane // BH, lane % BH
    batch, head = row // HK, row % HK
    begin = chunk * CHUNK + tile * QUERIES
    end = tl.minimum(tl.minimum(begin + QUERIES, chunk * CHUNK + CHUNK), T)
    width = row_of_parts(PARTS)
    words += (lane.to(tl.int64) * tl.num_programs(0) + tile) * width
    ranks += row.to(tl.int64) * T * SLOTS
    index = tl.arange(0, BM)
    for p in tl.range(0, width, BM):
        tl.store(words + p + index, tl.zeros([BM], tl.int64), mask=p + index < width)
    tl.debug_barrier()
    for first in tl.range(begin, end, 32):
        stop = tl.minimum(first + 32, end) * SLOTS
        for step in tl.static_range(3):
            for i in tl.range(first * SLOTS, stop, BM):
                part, token = find_parts(
                    selection, relative_ptr, part_base_ptr, i + index, stop, batch, head, T, HK, TOPK, SLOTS,
                    BLOCK, LOCAL, PARTS_A_BLOCK,
                )
                number = (token - first) & 31
                if step == 0:  # every query sets its bit
                    bit = tl.full([BM], 1, tl.int64) << (32 + number).to(tl.int64)
                    tl.atomic_or(words + part, bit, mask=part >= 0, sem="relaxed")
                else:
                    word = tl.load(words + part, mask=part >= 0, other=0)
                    count, chosen = word.to(tl.int32), (word >> 32).to(tl.int32)
                    if step == 1:  # and finds those that come before it
                        before = chosen & ~(tl.full([BM], -1, tl.int32) << number)
                        tl.store(ranks + i + index, count + bits_set(before), mask=part >= 0)
                    else:
                        # the first one, with no bit below its own, adds all; to the others the new word says no as well
                        lowest = (chosen & -chosen) == tl.full([BM], 1, tl.int32) << number
                        count += bits_set(chosen)
                        tl.store(words + part, count.to(tl.int64), mask=(part >= 0) & lowest)
            tl.debug_barrier()
    for p in tl.range(0, width, BM):
        count = tl.load(words + p + index, mask=p + index < width, other=0).to(tl.int32)
        tl.atomic_add(totals + lane * PARTS + p + index, count, mask=count > 0, sem="relaxed")


@Kernel
def scan_kernel(words, totals, offsets, T, BH, SLOTS, CHUNK, PARTS, TILES, BT: tl.constexpr, BP: tl.constexpr):
    """Of BP parts of a lane: `offsets`, and in the place of the counts where the picks of each tile begin."""
    lane, part = tl.program_id(1), tl.program_id(0) * BP + tl.arange(0, BP)
    totals += lane * PARTS
    # a lane begins where it would if every slot before it were in use
    start = lane // BH * CHUNK
    begin = (start * BH + lane % BH * tl.minimum(CHUNK, T - start)) * SLOTS
    for p in tl.range(0, tl.program_id(0) * BP, 512):
        earlier = p + tl.arange(0, 512)
        begin += tl.sum(tl.load(totals + earlier, mask=earlier < tl.program_id(0) * BP, other=0), 0)
    total = tl.load(totals + part, mask=part < PARTS, other=0)
    place = begin + tl.cumsum(total, 0) - total
    tl.store(offsets + lane * (PARTS + 1) + part, place, mask=part <= PARTS)
    width = row_of_parts(PARTS)
    words += lane.to(tl.int64) * TILES * width + part[None, :]
    for t in tl.range(0, TILES, BT):
        tile = t + tl.arange(0, BT)
        mask = (tile < TILES)[:, None] & (part < width)[None, :]
        here = words + tile[:, None].to(tl.int64) * width
        count = tl.load(here, mask=mask, other=0).to(tl.int32)
        tl.store(here, (place[None, :] + tl.cumsum(count, 0) - count).to(tl.int64), mask=mask)
        place += tl.sum(count, 0)


@Kernel
def place_kernel(
    selection, relative_ptr, part_base_ptr, words, ranks, order, T, BH, HK, TOPK, SLOTS, CHUNK, PARTS, QUERIES, TILES,
    BLOCK: tl.constexpr, LOCAL: tl.constexpr, PARTS_A_BLOCK: tl.constexpr, BM: tl.constexpr,
):
    """Writes each pick into `order`."""
    row, pick = tl.program_id(1), tl.program_id(0) * BM + tl.arange(0, BM)
    part, token = find_parts(
        selection, relative_ptr, part_base_ptr, pick, T * SLOTS, row // HK, row % HK, T, HK, TOPK, SLOTS,
        BLOCK, LOCAL, PARTS_A_BLOCK,
    )
    lane, tile = token // CHUNK * BH + row, token % CHUNK // QUERIES
    row_of_tile = (lane.to(tl.int64) * TILES + tile) * row_of_parts(PARTS)
    place = tl.load(words + row_of_tile + part, mask=part >= 0, other=0)
    place += tl.load(ranks + row.to(tl.int64) * T * SLOTS + pick, mask=part >= 0, other=0)
    tl.store(order + place, pick, mask=part >= 0)


def count_slots(sizes: Sizes, parts_a_block: int, keys: int) -> int:
    """Most picks of a query: parts that are not of a local block.

    In fours where a text has fewer blocks than are selected, since kernels are compiled for this number.
    """
    blocks = (keys - 1) // sizes.block_size + 1 - sizes.local_blocks
    return max(0, min(sizes.topk - sizes.local_blocks, -(-blocks // 4) * 4)) * parts_a_block


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
    if picks >= (1 << 31) - 1024 or lanes * (parts + 1) >= 1 << 31:
        raise ValueError(
            f"backend='triton' counts at most 2^31 (query, block) pairs, got {batch} rows of {tokens} queries, "
            f"{kv_heads} heads and {slots} blocks each: use fewer queries a call"
        )
    return Chunks(chunks, chunk_tokens, lanes, parts, slots, picks)


def gather_queries(selection: Tensor, layout: Layout, sizes: Sizes, chunks: Chunks) -> Gather:
    """The picks of each part, from the selection `[B, T, Hk, topk]` (int32, ascending, -1 = unused)."""
    batch, tokens, kv_heads, topk = selection.shape
    heads, lanes, parts, slots = batch * kv_heads, chunks.lanes, chunks.parts, chunks.slots
    queries = max(32, next_power_of_2(cdiv(tokens, MOST_TILES)))
    tiles = cdiv(chunks.tokens, queries)
    words = selection.new_empty(lanes, tiles, cdiv(parts, 16) * 16, dtype=torch.int64)
    totals = selection.new_zeros(lanes, parts)
    ranks, order = selection.new_empty(chunks.picks), selection.new_empty(chunks.picks)
    offsets = selection.new_empty(lanes, parts + 1)
    picks = (selection, layout.relative, layout.part_base)
    counts = (tokens, heads, kv_heads, topk, slots, chunks.tokens, parts, queries)
    shape = {"BLOCK": sizes.block_size, "LOCAL": sizes.local_blocks, "PARTS_A_BLOCK": layout.parts_a_block}
    count_kernel[(tiles, lanes)](
        *picks, words, totals, ranks, *counts, **shape, BM=min(1024, next_power_of_2(32 * slots)), num_warps=4
    )
    scan_kernel[(cdiv(parts + 1, 32), lanes)](
        words, totals, offsets, tokens, heads, slots, chunks.tokens, parts, tiles, BT=128, BP=32, num_warps=4
    )
    place_kernel[(cdiv(tokens * slots, 1024), heads)](
        *picks, words, ranks, order, *counts, tiles, **shape, BM=1024, num_warps=4
    )
    return Gather(order, offsets, chunks)


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
