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
from .launch import Kernel

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


@Kernel
def documents_kernel(
    cu_seqlens, cmp_bases, part_bases_ptr, DOCUMENTS, PARTS_A_BLOCK, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr,
):
    """Of each packed document the first entry, `cmp_bases [documents]`, and the first part, `part_bases_ptr`.

    Parts are numbered with gaps between the documents, so that how many there are follows from shapes.
    """
    before = 0
    for d in tl.range(0, DOCUMENTS, BM):
        document = d + tl.arange(0, BM)
        exists = document < DOCUMENTS
        first = tl.load(cu_seqlens + document, mask=exists, other=0)
        length = tl.load(cu_seqlens + document + 1, mask=exists, other=0) - first
        entries = tl.where(length < KERNEL, 0, (length - KERNEL) // STRIDE + 1)
        tl.store(cmp_bases + document, before + tl.cumsum(entries, 0) - entries, mask=exists)
        tl.store(part_bases_ptr + document, (first // BLOCK + document) * PARTS_A_BLOCK, mask=exists)
        before += tl.sum(entries, 0)


@triton.jit
def place_queries(
    t, batch, batches, starts, lengths, cmp_bases, part_bases_ptr, out, T, S, WIN_FIRST, WINDOW, DOCUMENTS, STEPS,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
):
    """Writes `out [9, B, T]`, what `Layout` holds by query, for the queries `t`."""
    exists = t < T
    if PACKED:
        which = find_document(starts, DOCUMENTS, t, STEPS)
        document = tl.load(starts + which)
        relative = t - document
        cmp_base = tl.load(cmp_bases + which)
        part_base = tl.load(part_bases_ptr + which)
    else:
        begin = 0 if starts is None else tl.load(starts + batch)
        end = S if lengths is None else tl.load(lengths + batch)
        document = t * 0 + begin
        relative = t + (end - T - begin)
        cmp_base = t * 0
        part_base = t * 0
    alive = relative >= 0
    visible = tl.where(relative < KERNEL - 1, 0, (relative - (KERNEL - 1)) // STRIDE + 1)
    position = document + relative
    local = tl.maximum(tl.where(alive, relative, 0) // BLOCK - (LOCAL - 1), 0)
    step = batches * T
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
def place_parts(
    number, batch, batches, starts, lengths, part_bases_ptr, out, P, S, DOCUMENTS, STEPS, PARTS_A_BLOCK, PART,
    BLOCK: tl.constexpr, PACKED: tl.constexpr,
):
    """Writes `out [2, B, P]`, the first tokens and ends of the parts `number`."""
    exists = number < P
    if PACKED:
        which = find_document(part_bases_ptr, DOCUMENTS, number, STEPS)
        begin, end = tl.load(starts + which), tl.load(starts + which + 1)
        number_in = number - tl.load(part_bases_ptr + which)
    else:
        begin = number * 0 if starts is None else number * 0 + tl.load(starts + batch)
        end = S if lengths is None else tl.load(lengths + batch)
        number_in = number
    block = begin + number_in // PARTS_A_BLOCK * BLOCK
    first = block + number_in % PARTS_A_BLOCK * PART
    last = tl.minimum(tl.minimum(first + PART, block + BLOCK), end)
    out += batch * P + number
    tl.store(out, first, mask=exists)
    tl.store(out + batches * P, last, mask=exists)


@Kernel
def layout_kernel(
    starts, lengths, cmp_bases, part_bases_ptr, queries, parts, T, S, P, WIN_FIRST, WINDOW, DOCUMENTS, STEPS,
    PARTS_A_BLOCK, PART, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr,
    PACKED: tl.constexpr, BM: tl.constexpr,
):
    """One program: BM queries or, behind the last of these, BM parts. PACKED: `starts` are `cu_seqlens`."""
    batch, tile, of_queries = tl.program_id(1), tl.program_id(0), tl.cdiv(T, BM)
    index = tl.arange(0, BM)
    if tile < of_queries:
        place_queries(
            tile * BM + index, batch, tl.num_programs(1), starts, lengths, cmp_bases, part_bases_ptr, queries, T, S,
            WIN_FIRST, WINDOW, DOCUMENTS, STEPS, KERNEL, STRIDE, BLOCK, LOCAL, PACKED,
        )
    else:
        place_parts(
            (tile - of_queries) * BM + index, batch, tl.num_programs(1), starts, lengths, part_bases_ptr, parts, P, S,
            DOCUMENTS, STEPS, PARTS_A_BLOCK, PART, BLOCK, PACKED,
        )


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
    cmp_bases = part_bases = None
    documents = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    shape = {"KERNEL": sizes.kernel_size, "STRIDE": sizes.kernel_stride, "BLOCK": sizes.block_size, "num_warps": 4}
    if cu_seqlens is not None:
        starts = cu_seqlens
        cmp_bases, part_bases = index(2, documents).unbind()
        documents_kernel[(1,)](cu_seqlens, cmp_bases, part_bases, documents, parts_a_block, **shape, BM=256)
    layout_kernel[(cdiv(tokens, 256) + cdiv(parts_count, 256), batch)](
        starts, lengths, cmp_bases, part_bases, queries, parts, tokens, keys, parts_count, keys - window_keys,
        sizes.window_size, documents, search_steps(documents), parts_a_block, part, **shape, LOCAL=sizes.local_blocks,
        PACKED=documents > 0, BM=256,
    )
    return queries, parts
