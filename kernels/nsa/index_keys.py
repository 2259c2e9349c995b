"""The keys of an index in 8 bits: half of what a step of decoding reads of them otherwise.

Each token and head has a scale of its own, so that a cache quantises a token when it comes, and never again. Scales are
powers of two: a key in 8 bits is then exact in bfloat16 and, up to its largest number, in float16, and prefill and
decoding choose by the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantize_index_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[..., c]` as `codes * scales`, to within half a scale.

        >>> codes, scales = quantize_index_keys(torch.tensor([[0.5, -1.0]]))
        >>> codes.tolist(), scales.tolist()
        ([[32, -64]], [0.015625])

    Returns:
        `codes [..., c]` int8 within -127 .. 127, and `scales [...]` bfloat16: of each token and head the smallest power
        of two with which its largest magnitude fits; NaN for a key that is not finite.
    """
    keys = keys.detach().float()
    largest = keys.abs().amax(-1)
    # up to the next power of two: its exponent's bits alone
    bits = ((largest / LARGEST).view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scales = torch.where(largest.isfinite(), bits.view(torch.float32), float("nan"))
    codes = (keys / torch.where(scales == 0, 1.0, scales)[..., None]).round()
    return codes.to(torch.int8), scales.to(torch.bfloat16)


def dequantize_index_keys(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The keys `[..., c]` that `codes [..., c]` and `scales [...]` stand for; exact where `dtype` can hold them.

    >>> codes, scales = quantize_index_keys(torch.tensor([[0.5, -1.0]]))
    >>> dequantize_index_keys(codes, scales, torch.float32).tolist()
    [[0.5, -1.0]]
    """
    # of float16's largest numbers the nearest code may stand for one that is larger
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return (codes.float() * scales.float()[..., None]).clamp(-most, most).to(dtype)
