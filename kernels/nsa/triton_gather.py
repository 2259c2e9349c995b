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
from torch import Tensor

from .sizes import Sizes
from .triton_layout import Layout


class WorkList(NamedTuple):
    """Pieces of at most `most` entries of one part: `part [groups, items]` int32 (the number of parts = no such item),
    `chunk [groups, items]` int32, and `first [groups, parts + 1]` int32, each part's first item."""

    part: Tensor
    chunk: Tensor
    first: Tensor
    most: int


@dataclass(frozen=True)
class Gather:
    """The entries of all parts.

    `order [entries]` int32: `query * slots + slot` of each entry, by group, part and query;
    `offsets [groups * parts + 1]` int32: where each part's entries begin; group `piece * B * Hk + row * Hk + head`.
    """

    order: Tensor
    offsets: Tensor
    groups: int
    parts: int
    slots: int
    pieces: int
    piece_tokens: int

    def work(self, most: int) -> WorkList:
        """The entries cut into pieces of at most `most`."""
        count = self.offsets.diff().view(self.groups, self.parts)
        chunks = (count + (most - 1)) // most
        after = chunks.cumsum(1)
        first = torch.nn.functional.pad(after, (1, 0))
        # a bound from shapes alone: every part may have one unfilled piece
        items = self.parts + self.piece_tokens * self.slots // most
        item = torch.arange(items, device=count.device).expand(self.groups, -1).contiguous()
        part = torch.searchsorted(after, item, right=True)
        chunk = item - first.gather(1, part)
        return WorkList(part.to(torch.int32), chunk.to(torch.int32), first.to(torch.int32), most)


def count_slots(sizes: Sizes, layout: Layout, keys: int) -> int:
    """Most entries of a query: parts that are not of a local block."""
    blocks = min(sizes.topk, (keys - 1) // sizes.block_size + 1)
    return max(0, blocks - sizes.local_blocks) * layout.parts_a_block


def gather_queries(
    selection: Tensor, layout: Layout, sizes: Sizes, slots: int, entry_bytes: int, budget: int
) -> Gather:
    """Turns the selection round.

    Args:
        selection: `[B, T, Hk, topk]` int32, ascending, -1 = unused.
        slots: `count_slots(...)`, at least 1.
        entry_bytes: memory that one entry's partial result takes.
        budget: memory that the partial results of one group may take.
    """
    batch, tokens, kv_heads, _ = selection.shape
    pieces = min(tokens, max(1, -(-tokens * slots * entry_bytes // budget)))
    # a multiple of 64, so that few kinds of lengths are compiled for
    piece_tokens = -(-tokens // pieces)
    piece_tokens = min(tokens, -(-piece_tokens // 64) * 64)
    pieces = -(-tokens // piece_tokens)
    parts, per_block = layout.part_first.shape[1], layout.parts_a_block
    groups = pieces * batch * kv_heads
    if tokens * slots >= 1 << 31 or groups * parts >= 1 << 31:
        raise ValueError(
            f"backend='triton' counts at most 2^31 (query, block) pairs of a head, got {tokens} queries and {slots} "
            "blocks each: use fewer queries a call"
        )
    picked = selection[..., : slots // per_block]
    past = layout.relative // sizes.block_size - sizes.local_blocks
    valid = (picked >= 0) & (picked <= past[..., None, None])
    part = layout.part_base[..., None, None] + picked * per_block
    if per_block > 1:
        piece_of_block = torch.arange(per_block, device=part.device, dtype=torch.int32)
        part = (part[..., None] + piece_of_block).flatten(-2)
        valid = valid.repeat_interleave(per_block, -1)
    # [B, T, Hk, 1]
    piece = torch.arange(tokens, device=part.device, dtype=torch.int32)[None, :, None, None] // piece_tokens
    head = torch.arange(batch * kv_heads, device=part.device, dtype=torch.int32).view(batch, 1, kv_heads, 1)
    key = torch.where(valid, (piece * (batch * kv_heads) + head) * parts + part, groups * parts)
    ordered, order = key.to(torch.int32).transpose(1, 2).flatten().sort(stable=True)
    border = torch.arange(groups * parts + 1, device=part.device, dtype=torch.int32)
    offsets = torch.searchsorted(ordered, border, out_int32=True)
    return Gather(
        (order % (tokens * slots)).to(torch.int32), offsets, groups, parts, slots, pieces, piece_tokens
    )  # fmt: skip


def launches(gather: Gather, entry_bytes: int, budget: int) -> list[tuple[int, int]]:
    """Runs of groups `(first, count)` whose partial results fit the budget together; none crosses a run of queries."""
    heads = gather.groups // gather.pieces
    at_once = max(1, min(heads, budget // (gather.piece_tokens * gather.slots * entry_bytes)))
    return [
        (piece * heads + first, min(at_once, heads - first))
        for piece in range(gather.pieces)
        for first in range(0, heads, at_once)
    ]


def entries_a_tile(rows: int, group: int) -> int:
    """Entries whose heads fill about `rows` rows."""
    return max(1, triton.cdiv(rows, group))
