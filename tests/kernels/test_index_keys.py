"""Keys of an index in 8 bits: how near they are, and that they are exact in every type."""

from __future__ import annotations

import pytest
import torch

from nsa_hf.kernels import dequantize_index_keys, quantize_index_keys


def test_they_are_within_half_a_scale_and_use_the_range() -> None:
    keys = torch.randn(3, 50, 2, 16) * torch.logspace(-3, 3, 50)[:, None, None]
    codes, scales = quantize_index_keys(keys)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16 and scales.shape == keys.shape[:3]
    error = (dequantize_index_keys(codes, scales, torch.float32) - keys).abs()
    assert (error <= scales.float()[..., None] / 2).all()
    largest = codes.abs().amax(-1)
    assert largest.max() <= 127 and largest.min() >= 63


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_they_are_exact_in_every_type(dtype: torch.dtype) -> None:
    codes, scales = quantize_index_keys(100 * torch.randn(50, 16))
    exact = codes.double() * scales.double()[..., None]
    assert torch.equal(dequantize_index_keys(codes, scales, dtype).double(), exact)


@pytest.mark.parametrize("largest", [1.0, 127.0, 127.0 * 2**-20, 126.99999, 127.00001, 3e38, 1e-30])
def test_the_largest_fits(largest: float) -> None:
    keys = torch.tensor([[largest, -largest, 0.0]])
    codes, scales = quantize_index_keys(keys)
    assert codes[0, 0] == -codes[0, 1] and 63 <= codes[0, 0] <= 127
    torch.testing.assert_close(codes.float() * scales.float()[..., None], keys, rtol=1 / 126, atol=0)


def test_zeros_and_what_is_not_finite() -> None:
    codes, scales = quantize_index_keys(torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]]))
    assert not codes[0].any() and scales[0] == 0
    assert scales[1:].isnan().all()


def test_float16_has_no_infinity_of_its_largest_numbers() -> None:
    codes, scales = quantize_index_keys(torch.tensor([[65504.0, 1.0]], dtype=torch.float16))
    assert dequantize_index_keys(codes, scales, torch.float16)[0, 0] == 65504
