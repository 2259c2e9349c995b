"""Where everything stands, as index tensors that make plain rows, padded rows and packed documents one case.

Nothing here reads a value off the GPU: sizes follow from shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sizes import Sizes


@dataclass(frozen=True)
class Layout:
    """Everything int32; a document is a packed one, or a row's real tokens.

    `relative [B, T]`: a query's position in its document, negative before it. `document [B, T]`: the document's first
    position. `cmp_low`, `cmp_high [B, T]`: the compressed blocks a query sees. `part_base [B, T]`: index of the
    document's first part; a part is a selection block, or a piece of a large one. `part_first`, `part_end [B, P]`: the
    parts' tokens, positions of the row (`part_end <= part_first`: no such part).
    """

    relative: Tensor
    document: Tensor
    cmp_low: Tensor
    cmp_high: Tensor
    part_base: Tensor
    part_first: Tensor
    part_end: Tensor
    part_size: int
    parts_a_block: int
    packed: bool

    def window(self, window_size: int, offset: int) -> tuple[Tensor, Tensor]:
        """The run of keys `[p - w + 1, p]` that each query sees, keys counted from `offset`."""
        position = self.document + self.relative
        low = torch.maximum(self.document, position - (window_size - 1)) - offset
        return self._runs(low, position + 1 - offset)

    def local(self, sizes: Sizes) -> tuple[Tensor, Tensor]:
        """The run of keys in the query's own block and the `local_blocks - 1` before it."""
        block = (self.relative // sizes.block_size - (sizes.local_blocks - 1)).clamp(min=0)
        return self._runs(self.document + block * sizes.block_size, self.document + self.relative + 1)

    def _runs(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        dead = self.relative < 0
        return low.masked_fill(dead, 0).contiguous(), high.masked_fill(dead, 0).contiguous()


def find_layout(
    batch: int, tokens: int, keys: int, sizes: Sizes, cu_seqlens: Tensor | None, starts: Tensor | None,
    lengths: Tensor | None, device: torch.device, largest_part: int,
) -> Layout:  # fmt: skip
    """The layout of `nsa_attention`'s arguments; larger blocks are attended to in parts of `largest_part` tokens."""
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    size, stride, block = sizes.kernel_size, sizes.kernel_stride, sizes.block_size
    part = min(block, largest_part)
    pieces = -(-block // part)
    if cu_seqlens is not None:
        first, length = cu_seqlens[:-1], cu_seqlens.diff()
        query = torch.arange(tokens, **int32)
        # [T], the document of each token
        which = torch.searchsorted(cu_seqlens[1:].contiguous(), query, right=True).clamp(max=len(first) - 1)
        document = first[which]
        relative = query - document
        count = torch.where(length < size, 0, (length - size) // stride + 1)
        cmp_base = (count.cumsum(0) - count).to(torch.int32)[which]
        # Numbers of parts with gaps between the documents, so that how many there are follows from shapes.
        documents = torch.arange(len(first), **int32)
        base = (first // block + documents) * pieces
        parts = ((keys - 1) // block + 1 + len(first)) * pieces
        number = torch.arange(parts, **int32)
        owner = (torch.searchsorted(base, number, right=True) - 1).clamp(min=0)
        local = number - base[owner]
        begin, end = first[owner], cu_seqlens[1:][owner]
        relative, document, cmp_base, part_base = (x[None] for x in (relative, document, cmp_base, base[which]))
        local, begin, end = local[None], begin[None], end[None]
    else:
        row_start = torch.zeros(batch, **int32) if starts is None else starts
        row_end = torch.full((batch,), keys, **int32) if lengths is None else lengths
        relative = torch.arange(tokens, **int32) + (row_end - tokens - row_start)[:, None]
        document = row_start[:, None].expand(-1, tokens)
        cmp_base = part_base = torch.zeros(batch, tokens, **int32)
        parts = ((keys - 1) // block + 1) * pieces
        local = torch.arange(parts, **int32)[None].expand(batch, -1)
        begin, end = row_start[:, None], row_end[:, None]
    visible = torch.where(relative < size - 1, 0, (relative - (size - 1)) // stride + 1)
    part_first = begin + local // pieces * block + local % pieces * part
    part_end = torch.minimum(torch.minimum(part_first + part, begin + (local // pieces + 1) * block), end)
    return Layout(
        relative.contiguous(), document.contiguous(), cmp_base.contiguous(), (cmp_base + visible).contiguous(),
        part_base.contiguous(), part_first.contiguous(), part_end.contiguous(), part, pieces,
        cu_seqlens is not None,
    )  # fmt: skip
