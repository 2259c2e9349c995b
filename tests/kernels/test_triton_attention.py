"""The Triton kernels, interpreted on the CPU, against the float64 reference: every layout, sizes of every kind."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from attention_inputs import Shape, Sizes, make_inputs
from triton_cases import ALIKE, CASES, SMALL, compare, in_float64

from nsa_hf.kernels import nsa_attention

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


def select_unlikely(sizes: Sizes) -> bool:
    """Whether both choose the same where no logit is near 0: all are below -128, and `exp2` of the rest inf."""
    inputs = make_inputs(replace(SMALL, sizes=sizes, queries=40, keys=40), dtype=torch.float32)
    inputs["q"][..., 0], inputs["k_cmp"][..., 0], inputs["scale"] = 40.0, -40.0, 0.1
    _, selection = nsa_attention(**inputs, backend="triton", return_selection=True)
    _, expected = nsa_attention(**in_float64(inputs), backend="reference", return_selection=True)
    return torch.equal(selection, expected)


@pytest.mark.parametrize("sizes", [ALIKE, Sizes(6, 2, 6, 5, 1, 1, 7), Sizes(6, 2, 6, 6, 1, 2, 7)])
def test_logits_far_below_zero(process: ProcessPoolExecutor, sizes: Sizes) -> None:
    """Blocks of one entry, and of three, are padded to two and four, whose weights are none."""
    assert process.submit(select_unlikely, sizes).result()


def select_without_numbers(shape: Shape, bad: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which queries' outputs have NaN, and the selection, where the queries from the 50th on are all `bad`."""
    inputs = make_inputs(shape, dtype=torch.float32)
    for name in ("q", "q_index"):
        if name in inputs:
            inputs[name][:, 50:] = bad
    inputs["q"].requires_grad_()  # or few queries would go to the kernels of decoding
    out, selection = nsa_attention(**inputs, backend="triton", return_selection=True)
    return out.isnan().any(-1).any(-1), selection


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", [None, (2, 0, 3)])
@pytest.mark.parametrize("group", [2, 12])
def test_queries_that_are_no_numbers(process: ProcessPoolExecutor, group: int, index: tuple | None, bad: float) -> None:
    """Their outputs are none either, but the selection names blocks that there are, and memory is read where it may."""
    shape = Shape(queries=52, keys=52, kv_heads=1, group=group, index=index)
    broken, selection = process.submit(select_without_numbers, shape, bad).result()
    assert broken[:, 50:].all() and not broken[:, :50].any()
    last = selection[0, 50:, 0]
    assert (last[:, 0] == 0).all() and (last.diff(dim=-1) > 0).all() and (last[:, -1] == 12).all()
