"""The gates: exact at the start, and trainable from there."""

from __future__ import annotations

import pytest
import torch

from nsa_hf.attention import Gate, gate_values


@pytest.mark.parametrize("kind", ["residual", "blend"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_logits_are_the_selected_branch_alone(kind, dtype):
    gates = gate_values(torch.zeros(1, 2, 3, 3, dtype=dtype), kind, 0.0)
    assert gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(gates, torch.tensor([0.0, 1.0, 0.0], dtype=gates.dtype).expand(1, 2, 3, 3))


def test_the_formulas():
    z = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    c, s, w = gate_values(z, "residual", 0.0).unbind(-1)
    torch.testing.assert_close(c, (z[..., 0] / 2).tanh())
    torch.testing.assert_close(s, 1 + (z[..., 1] / 2).tanh())
    torch.testing.assert_close(w, (z[..., 2] / 2).tanh())
    torch.testing.assert_close(gate_values(z, "sigmoid", 0.0), z.sigmoid())
    torch.testing.assert_close(gate_values(z, "blend", 1.0), z.sigmoid())
    quarter = gate_values(z, "blend", 0.25)
    torch.testing.assert_close(quarter[..., 1], 0.75 + 0.25 * z[..., 1].sigmoid())
    torch.testing.assert_close(quarter[..., 0], 0.25 * z[..., 0].sigmoid())


@pytest.mark.parametrize(
    "kind, blend, trains", [("residual", 0, True), ("sigmoid", 0, True), ("blend", 0.1, True), ("blend", 0, False)]
)
def test_the_slope_at_the_start(kind, blend, trains):
    z = torch.zeros(1, 1, 2, 3, requires_grad=True)
    gate_values(z, kind, blend).sum().backward()
    assert bool((z.grad > 0).all()) is trains
    if kind == "residual":
        assert torch.equal(z.grad, torch.full_like(z, 0.5))


def test_the_gates_mlp():
    gate = Gate(hidden_size=8, gate_dim=4, heads=5)
    logits = gate(torch.randn(2, 3, 8))
    assert logits.shape == (2, 3, 5, 3) and not logits.any()
    torch.nn.init.normal_(gate.down.weight)
    x = torch.randn(2, 3, 8)
    hidden = torch.nn.functional.silu(x @ gate.up.weight.T + gate.up.bias)
    # head 1, window branch, is output 1 * 3 + 2
    torch.testing.assert_close(gate(x)[..., 1, 2], hidden @ gate.down.weight[5])
