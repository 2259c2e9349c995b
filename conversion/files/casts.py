"""Pieces of tensors in another dtype."""

from __future__ import annotations

from concurrent.futures import Future, wait

import torch
from torch import Tensor

from .checkpoint import BUFFERS, Piece

# Values that are cast at a time, by way of float32, which holds those of a narrower dtype exactly: between two narrow
# dtypes PyTorch casts one value after another. As float32 they stay in a processor's cache.
AT_ONCE = 1 << 18


class Casts:
    """Casts into buffers that are used again when what was in them is no longer needed."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(BUFFERS)]
        self._uses: list[list[Future]] = [[] for _ in range(BUFFERS)]
        self._turn = 0

    def to(self, piece: Piece, dtype: torch.dtype) -> tuple[Tensor, list[Future]]:
        """A piece's values `[n]` in `dtype`, rounded to nearest; they are the piece's own where the dtype is.

        Returns:
            The values, and the list where whoever needs them for longer puts the futures that end when it does not.
        """
        if piece.values.dtype == dtype:
            return piece.values, piece.uses
        turn = self._turn = (self._turn + 1) % BUFFERS
        wait(self._uses[turn])
        self._uses[turn] = []
        size = len(piece.values) * dtype.itemsize
        if len(self._buffers[turn]) < size:
            self._buffers[turn] = torch.empty(size, dtype=torch.uint8)
        values = self._buffers[turn][:size].view(dtype)
        for part, target in zip(piece.values.split(AT_ONCE), values.split(AT_ONCE), strict=True):
            target.copy_(part.float() if part.dtype.itemsize < 4 else part)
        return values, self._uses[turn]
