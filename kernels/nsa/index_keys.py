"""The keys of an index in 8 bits: a quarter to a half of what a step of decoding reads of them otherwise.

Each token and head has a scale of its own, so that a cache quantises a token when it comes, and never again.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantize_index_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[..., c]` as `codes * scales`, to within half a scale.

    Returns:
        `codes [..., c]` int8 within -127 .. 127, and `scales [...]` bfloat16: the largest magnitude of a token and head
        divided by 127. A key that is not finite has a scale that is not.
    """
    scales = (keys.detach().abs().amax(-1).float() / LARGEST).to(torch.bfloat16)
    steps = torch.where(scales == 0, 1.0, scales.float())[..., None]
    codes = (keys.detach().float() / steps).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


def dequantize_index_keys(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The keys `[..., c]` that `codes [..., c]` and `scales [...]` stand for, rounded to `dtype`."""
    wide = dtype if dtype == torch.float64 else torch.float32
    return (codes.to(wide) * scales.to(wide)[..., None]).to(dtype)
