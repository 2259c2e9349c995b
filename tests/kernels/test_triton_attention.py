"""The Triton kernels, interpreted on the CPU, against the float64 reference: every layout, sizes of every kind."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from triton_cases import CASES, compare

pytest.importorskip("triton")


@pytest.mark.parametrize("name", CASES)
def test_output_selection_and_gradients(process: ProcessPoolExecutor, name: str) -> None:
    """float32 has 24 bits: a rounding is 6e-8 of a number, and sums of some dozen terms lose a few bits more."""
    errors, same = process.submit(compare, CASES[name]).result()
    assert same == 1
    assert all(error <= 5e-6 for error in errors.values()), errors


@pytest.mark.parametrize(
    "name",
    [
        "groups of three",
        "packed",
        "ragged and left-padded, own window",
        "keys of 192, values of 128",
        "local blocks in the window, packed",
    ],
)
def test_float16(process: ProcessPoolExecutor, name: str) -> None:
    """float16 has 11 bits: a rounding is 5e-4 of a number; probabilities, partial results and gradients pass a few."""
    errors, same = process.submit(compare, CASES[name], dtype=torch.float16).result()
    assert same == 1
    assert all(error <= 4e-3 for error in errors.values()), errors
