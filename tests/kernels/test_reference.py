"""What only the reference offers: queries in chunks, and the selected branch's weights."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import TENSORS, Inputs, Shape, Sizes, make_inputs, one_branch, with_gradients
from oracle import nsa_oracle

from nsa_hf import kernels
from nsa_hf.kernels import nsa_attention, reference_attention

LAYOUTS = {
    "plain": Shape(batch=2),
    "the last queries, own window": Shape(queries=13, own_window=17),
    "packed": Shape(cu_seqlens=(0, 2, 9, 11, 30)),
    "left-padded": Shape(batch=3, queries=20, starts=(0, 7, 29)),
    "ragged and left-padded": Shape(batch=3, queries=9, starts=(4, 0, 9), lengths=(30, 11, 12), own_window=30),
}


PLACEMENT = ("starts", "lengths", "cu_seqlens")


def reference(inputs: Inputs, **options: object) -> kernels.reference.ReferenceResult:
    """The reference itself, which takes the sizes as one argument and the scale as a number."""
    names = Sizes.__dataclass_fields__
    sizes = kernels.Sizes(**{name: inputs[name] for name in names})
    rest = {name: x for name, x in inputs.items() if name not in (*names, *PLACEMENT, "scale")}
    rest["placement"] = kernels.Placement(**{name: inputs.get(name) for name in PLACEMENT})
    return reference_attention(**rest, sizes=sizes, scale=inputs["q"].shape[-1] ** -0.5, **options)


@pytest.mark.parametrize("chunk", [1, 4, 7, 29, 30, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_queries_change_nothing(layout: str, chunk: int) -> None:
    inputs = make_inputs(LAYOUTS[layout])
    parts = reference(with_gradients(inputs), chunk=chunk)
    answer = nsa_oracle(**inputs)
    assert torch.equal(parts.selection, answer.selection)
    torch.testing.assert_close(parts.out, answer.output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_queries_change_no_gradient(layout: str) -> None:
    whole, parts = (with_gradients(make_inputs(LAYOUTS[layout])) for _ in range(2))
    reference(whole, chunk=1000).out.square().sum().backward()
    reference(parts, chunk=4).out.square().sum().backward()
    for name in (name for name in TENSORS if name in whole):
        torch.testing.assert_close(parts[name].grad, whole[name].grad, rtol=1e-12, atol=1e-12)
        assert whole[name].grad.any()


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_the_selected_branch(layout: str, chunk: int | None) -> None:
    """[B, Hq, T, S]: with the values they make the branch's output, and they are zero outside the selected tokens."""
    shape = LAYOUTS[layout]
    inputs = one_branch(make_inputs(shape), 1)
    result = reference(inputs, return_weights=True, chunk=chunk)
    assert result.weights is not None
    assert result.weights.shape == (shape.batch, shape.kv_heads * shape.group, shape.queries, shape.keys)
    values = inputs["v"].nan_to_num().repeat_interleave(shape.group, dim=2)
    torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", result.weights, values), result.out)
    sums, real = result.weights.sum(-1), (result.selection[..., 0] >= 0).repeat_interleave(shape.group, dim=2)
    torch.testing.assert_close(sums, real.transpose(1, 2).to(sums.dtype))
    assert not result.weights.requires_grad and (result.weights >= 0).all()


def test_no_weights_unless_asked() -> None:
    assert reference(make_inputs(Shape())).weights is None


def test_the_public_function_is_the_reference() -> None:
    inputs = make_inputs(LAYOUTS["ragged and left-padded"])
    assert torch.equal(nsa_attention(**inputs), reference(inputs).out)
