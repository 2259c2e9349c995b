"""How a layer's compressed entries are made of its keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_hf.kernels import MeanCompressor, compress

from .segments import Segments


class Compressors(NamedTuple):
    """What makes a layer's entries.

    Attributes:
        keys, values: the compressors of each.
        stride: tokens between two entries' starts [d].
    """

    keys: MeanCompressor
    values: MeanCompressor
    stride: int

    @property
    def sizes(self) -> tuple[int, int]:
        """`kernel_size` and `kernel_stride` of the entries [l, d]."""
        return self.keys.kernel_size, self.stride

    def entries(self, keys: Tensor, values: Tensor, dtype: torch.dtype, segments: Segments) -> tuple[Tensor, Tensor]:
        """Compressed keys and values `[B, N, Hk, D]` of keys and values `[B, Hk, S, D]`, where no cache holds them."""
        where: dict[str, Any] = {"starts": segments.starts, "cu_seqlens": segments.cu_seqlens}
        k, v = (states.to(dtype).transpose(1, 2) for states in (keys, values))
        return compress(k, self.keys, self.stride, **where), compress(v, self.values, self.stride, **where)
