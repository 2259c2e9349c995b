"""Where everything stands, as index tensors that make plain rows, padded rows and packed documents one case.

A document is a packed one, or a row's real tokens. A part is a selection block, or a share of a larger one
(`part_shape`). Nothing here reads a value off the GPU: sizes follow from shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..placement import Placement
from ..sizes import Sizes
from .common import cdiv, largest_part, lower_bound, search_steps

Run = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where every query and part stands; all tensors int32, by query `[B, T]` or by part `[B, P]`.

    Attributes:
        relative: `[B, T]`, a query's position in its document, negative before it.
        document: `[B, T]`, the document's first position.
        part_base: `[B, T]`, index of the document's first part.
        compressed: the run `[low, high)` of entries that a query sees, two `[B, T]`.
        local: the run of keys in its local blocks, two `[B, T]`.
        window: the run of keys in its window, counted from the first one given, two `[B, T]`.
        runs: `[3, 2, B, T]`, these three together.
        part_first: `[B, P]`, a part's first token, a position of the row.
        part_end: `[B, P]`, the end of its tokens; `part_end <= part_first`: no such part.
        part_size: tokens of a part.
        parts_a_block: parts of a selection block.
        packed: whether a row holds several documents.
    """

    relative: Tensor
    document: Tensor
    part_base: Tensor
    compressed: Run
    local: Run
    window: Run
    runs: Tensor
    part_first: Tensor
    part_end: Tensor
    part_size: int
    parts_a_block: int
    packed: bool

    @classmethod
    def of(cls, queries: Tensor, parts: Tensor, block_size: int, largest: int, packed: bool) -> Layout:
        """The layout that `find_layout` gave as two tensors."""
        relative, document, part_base, *ends = queries.unbind()
        compressed, local, window = zip(ends[::2], ends[1::2], strict=True)
        runs = queries[3:].view(3, 2, *relative.shape)
        first, end = parts.unbind()
        part, parts_a_block = part_shape(block_size, largest)
        return cls(
            relative, document, part_base, compressed, local, window, runs, first, end, part, parts_a_block, packed
        )


@triton.jit
def find_document(firsts, count, x, STEPS):
    """Which of `count` documents holds `x`: the last one whose first (token, part) is `x` or before it."""
    return tl.maximum(lower_bound(firsts, count, x + 1, STEPS) - 1, 0)


@triton.jit
def queries_kernel(
    starts, lengths, cmp_bases, part_bases, out, T, WIN_FIRST, WINDOW, DOCUMENTS, STEPS,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    BM: tl.constexpr,
):
    """Writes `out [9, B, T]`: what `Layout` holds by query."""
    batch, t = tl.program_id(1), tl.program_id(0) * BM + tl.arange(0, BM)
    exists = t < T
    if PACKED:
        which = find_document(starts, DOCUMENTS, t, STEPS)
        document = tl.load(starts + which)
        relative = t - document
        cmp_base = tl.load(cmp_bases + which)
        part_base = tl.load(part_bases + which)
    else:
        begin, end = tl.load(starts + batch), tl.load(lengths + batch)
        document = t * 0 + begin
        relative = t + (end - T - begin)
        cmp_base = t * 0
        part_base = t * 0
    alive = relative >= 0
    visible = tl.where(relative < KERNEL - 1, 0, (relative - (KERNEL - 1)) // STRIDE + 1)
    position = document + relative
    local = tl.maximum(tl.where(alive, relative, 0) // BLOCK - (LOCAL - 1), 0)
    step = tl.num_programs(1) * T
    out += batch * T + t
    tl.store(out, relative, mask=exists)
    tl.store(out + step, document, mask=exists)
    tl.store(out + 2 * step, part_base, mask=exists)
    tl.store(out + 3 * step, cmp_base, mask=exists)
    tl.store(out + 4 * step, cmp_base + visible, mask=exists)
    window = tl.maximum(document, position - (WINDOW - 1)) - WIN_FIRST
    tl.store(out + 5 * step, tl.where(alive, document + local * BLOCK, 0), mask=exists)
    tl.store(out + 6 * step, tl.where(alive, position + 1, 0), mask=exists)
    tl.store(out + 7 * step, tl.where(alive, window, 0), mask=exists)
    tl.store(out + 8 * step, tl.where(alive, position + 1 - WIN_FIRST, 0), mask=exists)


@triton.jit
def parts_kernel(
    starts, ends, part_bases, out, P, DOCUMENTS, STEPS, PARTS_A_BLOCK, PART, BLOCK: tl.constexpr, PACKED: tl.constexpr,
    BM: tl.constexpr,
):
    """Writes `out [2, B, P]`: the parts' first tokens and ends."""
    batch, number = tl.program_id(1), tl.program_id(0) * BM + tl.arange(0, BM)
    exists = number < P
    if PACKED:
        which = find_document(part_bases, DOCUMENTS, number, STEPS)
        begin, end = tl.load(starts + which), tl.load(ends + which)
        number_in = number - tl.load(part_bases + which)
    else:
        begin, end = tl.load(starts + batch) + number * 0, tl.load(ends + batch)
        number_in = number
    block = begin + number_in // PARTS_A_BLOCK * BLOCK
    first = block + number_in % PARTS_A_BLOCK * PART
    last = tl.minimum(tl.minimum(first + PART, block + BLOCK), end)
    out += batch * P + number
    tl.store(out, first, mask=exists)
    tl.store(out + tl.num_programs(1) * P, last, mask=exists)


def part_shape(block_size: int, largest: int) -> tuple[int, int]:
    """Tokens of a part and parts of a selection block; larger blocks are attended to in parts of `largest` tokens."""
    part = min(block_size, largest)
    return part, -(-block_size // part)


def count_parts(keys: int, placement: Placement, block_size: int, largest: int) -> int:
    """How many parts a row has at most."""
    blocks = (keys - 1) // block_size + 1 + placement.documents
    return blocks * part_shape(block_size, largest)[1]


def find_layout(
    q: Tensor, k: Tensor, v: Tensor, window_keys: int, sizes: Sizes, placement: Placement
) -> tuple[Tensor, Tensor]:
    """The layout of `nsa_attention`'s arguments, for `Layout.of`: `[9, B, T]` and `[2, B, P]` int32."""
    starts, lengths, cu_seqlens = placement.starts, placement.lengths, placement.cu_seqlens
    batch, tokens, keys, largest = *q.shape[:2], k.shape[1], largest_part(q, v.shape[-1])
    part, parts_a_block = part_shape(sizes.block_size, largest)
    parts_count = count_parts(keys, placement, sizes.block_size, largest)
    index = partial(torch.empty, dtype=torch.int32, device=q.device)
    queries, parts = index(9, batch, tokens), index(2, batch, parts_count)
    documents = 0
    if cu_seqlens is None:
        starts = index(batch).zero_() if starts is None else starts
        ends = index(batch).fill_(keys) if lengths is None else lengths
        cmp_bases = part_bases = starts  # not read
    else:
        documents = len(cu_seqlens) - 1
        starts, ends, length = cu_seqlens[:-1], cu_seqlens[1:], cu_seqlens.diff()
        count = torch.where(length < sizes.kernel_size, 0, (length - sizes.kernel_size) // sizes.kernel_stride + 1)
        cmp_bases = (count.cumsum(0) - count).to(torch.int32)
        # numbered with gaps between the documents, so that how many there are follows from shapes
        number = torch.arange(documents, dtype=torch.int32, device=q.device)
        part_bases = (starts // sizes.block_size + number) * parts_a_block
    shape = {"BLOCK": sizes.block_size, "PACKED": documents > 0, "BM": 256, "num_warps": 4}
    queries_kernel[(cdiv(tokens, 256), batch)](
        starts, ends, cmp_bases, part_bases, queries, tokens, keys - window_keys, sizes.window_size, documents,
        search_steps(documents), KERNEL=sizes.kernel_size, STRIDE=sizes.kernel_stride, LOCAL=sizes.local_blocks,
        **shape,
    )
    parts_kernel[(cdiv(parts_count, 256), batch)](
        starts, ends, part_bases, parts, parts_count, documents, search_steps(documents), parts_a_block, part, **shape
    )
    return queries, parts
