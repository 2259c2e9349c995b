"""Tensors on their way from one file to another: runs of their bytes, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of a piece, and how many buffers of pieces there are: together they bound what streaming keeps in memory.
# Smaller ones cost more time in Python, where threads wait for each other.
PIECE, BUFFERS = 8 << 20, 8


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Piece:
    """A run of a tensor's values.

    Attributes:
        name: of the tensor.
        start: index of the first value, counted in the flattened tensor.
        values: `[n]`, a run of the flattened tensor, dtype as stored.
        last: whether the tensor ends here.
        uses: what still reads `values` in other threads; only when all are done is the buffer filled anew.
    """

    name: str
    start: int
    values: Tensor
    last: bool
    uses: list[Future] = field(default_factory=list)


def byte_ranges(nbytes: int) -> Iterator[tuple[int, int]]:
    """First byte and size of each piece of a tensor of `nbytes` bytes; one piece of none where it is empty."""
    for start in range(0, max(1, nbytes), PIECE):
        yield start, min(PIECE, nbytes - start)


def pieces_of(name: str, tensor: Tensor) -> Iterator[Piece]:
    """The pieces of a tensor that is in memory.

    Args:
        name: of the tensor.
        tensor: of any shape and dtype.
    """
    flat, width = tensor.detach().reshape(-1), tensor.dtype.itemsize
    for start, size in byte_ranges(len(flat) * width):
        end = (start + size) // width
        yield Piece(name, start // width, flat[start // width : end], end >= len(flat))


class Buffers:
    """A fixed number of buffers, used in turn."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(BUFFERS)]
        self._uses: list[list[Future]] = [[] for _ in range(BUFFERS)]
        self._turn = 0

    def next(self, size: int) -> tuple[Tensor, list[Future]]:
        """The next buffer, as soon as nothing reads any more what was in it.

        Args:
            size: bytes that are needed.

        Returns:
            `[size]` uint8, and the list for the futures of whoever reads it in another thread, see `Piece.uses`.
        """
        turn = self._turn = (self._turn + 1) % BUFFERS
        wait(self._uses[turn])
        self._uses[turn] = []
        if len(self._buffers[turn]) < size:
            self._buffers[turn] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[turn][:size], self._uses[turn]


def byte_view(tensor: Tensor) -> Tensor:
    """`[bytes]` uint8: a CPU tensor's bytes in row-major order, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits (NaN equal to itself, -0 unlike 0)."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(byte_view(a), byte_view(b))
