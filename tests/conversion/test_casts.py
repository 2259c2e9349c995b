"""Pieces in another dtype: the same numbers as PyTorch's own cast, and no buffer overwritten while it is needed."""

from __future__ import annotations

from concurrent.futures import Future
from threading import Timer

import pytest
import torch

from nsa_hf.conversion.files.casts import AT_ONCE, Casts
from nsa_hf.conversion.files.pieces import BUFFERS, Piece


def piece_of(values: torch.Tensor) -> Piece:
    return Piece("x", 0, values, True, [])


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_the_numbers_are_those_of_one_cast(source: torch.dtype, target: torch.dtype) -> None:
    """Every 16-bit pattern, infinities and NaN among them, and random numbers of the wider ones."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    if source.itemsize == 2:
        values = every.view(source)
    elif source.itemsize == 1:
        values = every.to(torch.int8).view(source)
    else:
        values = torch.randn(AT_ONCE + 77, dtype=source) * 10 ** torch.randn(AT_ONCE + 77, dtype=source)
    cast, _ = Casts().to(piece_of(values), target)
    assert cast.dtype == target
    torch.testing.assert_close(cast, values.to(target), rtol=0, atol=0, equal_nan=True)


def test_the_same_dtype_is_not_copied() -> None:
    piece = piece_of(torch.ones(3))
    values, uses = Casts().to(piece, torch.float32)
    assert values is piece.values and uses is piece.uses


def test_a_buffer_in_use_is_waited_for() -> None:
    casts = Casts()
    first, uses = casts.to(piece_of(torch.ones(5)), torch.float16)
    written: Future = Future()
    uses.append(written)
    for _ in range(BUFFERS - 1):
        casts.to(piece_of(torch.zeros(5)), torch.float16)
    assert first.tolist() == [1] * 5
    seen: list[float] = []
    Timer(0.2, lambda: (seen.extend(first.tolist()), written.set_result(None))).start()
    again, _ = casts.to(piece_of(torch.zeros(5)), torch.float16)
    assert seen == [1] * 5, "it was overwritten before it was written"
    assert again.data_ptr() == first.data_ptr()
