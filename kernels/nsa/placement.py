"""Where the rows and documents of a batch stand: three index tensors that travel as one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Which positions hold real tokens. All None: every row is full.

    Attributes:
        starts: int32 `[B]`, first real position of each left-padded row; None = 0.
        lengths: int32 `[B]`, positions of each row that hold something; None = S.
        cu_seqlens: int32 `[documents + 1]`, borders of packed documents; goes with neither of the others.
    """

    starts: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def documents(self) -> int:
        """How many documents are packed into the row; 0 where none are."""
        return 0 if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def is_full(self) -> bool:
        """Whether every row is one document without padding."""
        return self.starts is None and self.lengths is None and self.cu_seqlens is None


FULL = Placement()
