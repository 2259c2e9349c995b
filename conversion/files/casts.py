"""Pieces of tensors in another dtype."""

from __future__ import annotations

from concurrent.futures import Future

import torch
from torch import Tensor

from .pieces import Buffers, Piece

# Values that are cast at a time, by way of float32, which holds those of a narrower dtype exactly: between two narrow
# dtypes PyTorch casts one value after another. As float32 they stay in a processor's cache.
AT_ONCE = 1 << 18


class Casts:
    """Casts pieces into buffers of its own."""

    def __init__(self) -> None:
        self._buffers = Buffers()

    def to(self, piece: Piece, dtype: torch.dtype) -> tuple[Tensor, list[Future]]:
        """A piece's values in another dtype, rounded to nearest.

        Args:
            piece: in the dtype that it is stored in.
            dtype: the one that is wanted; where the piece has it already, its own values are given.

        Returns:
            `[n]` of `dtype`, and the list for the futures of whoever reads them in another thread, see `Piece.uses`.
        """
        if piece.values.dtype == dtype:
            return piece.values, piece.uses
        buffer, uses = self._buffers.next(len(piece.values) * dtype.itemsize)
        values = buffer.view(dtype)
        for stored, target in zip(piece.values.split(AT_ONCE), values.split(AT_ONCE), strict=True):
            target.copy_(stored.float() if stored.dtype.itemsize < 4 else stored)
        return values, uses
