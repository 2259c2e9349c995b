"""Whole graphs with a mask, which cannot be looked at there: `torch.compile(fullgraph=True)` and `torch.export`."""

from __future__ import annotations

import pytest
import torch
from generation_steps import relative, tokens

HOLES = "attention_mask has holes"
OPTIONS = {
    "compressed": {"nsa_selector": "compressed"},
    "channels": {"nsa_selector": "channels", "nsa_compression": "none"},
}


def padded_mask(x: torch.Tensor) -> torch.Tensor:
    """Left padding in the last row, right padding in the first."""
    mask = torch.ones_like(x)
    mask[0, -7:] = mask[-1, :9] = 0
    return mask


def one_layer(model):
    """Tracing a layer takes seconds, and all are alike."""
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return model


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


def check(graph, model, x) -> None:
    mask = padded_mask(x)
    expected, got = Logits(model)(x, mask), graph(x, mask)
    assert relative(got[mask > 0], expected[mask > 0]) < 1e-5 and got.isfinite().all()
    mask[0, 5] = 0
    with pytest.raises(RuntimeError, match=HOLES):
        graph(x, mask)


def test_one_compiled_graph_with_a_mask(tiny_nsa_model):
    model, x = one_layer(tiny_nsa_model(**OPTIONS["compressed"])), tokens(2, 100)
    torch._dynamo.reset()
    compiled = torch.compile(Logits(model), backend="eager", fullgraph=True)
    check(compiled, model, x)
    mask = padded_mask(x)
    gradients = []
    for forward in (compiled, Logits(model)):
        model.zero_grad()
        (forward(x, mask)[mask > 0] ** 2).mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert relative(*gradients) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_exported_graph_of_any_length_with_a_mask(kind, tiny_nsa_model):
    model, x = one_layer(tiny_nsa_model(**OPTIONS[kind])), tokens(2, 100)
    length = {1: torch.export.Dim("tokens", min=2, max=4096)}
    with torch.no_grad():
        graph = torch.export.export(Logits(model), (x, padded_mask(x)), dynamic_shapes=(length, length)).module()
        for tokens_now in (21, 100, 170):  # shorter, as exported, longer
            check(graph, model, tokens(2, tokens_now))


def test_gradients_reach_the_attention_weights(tiny_nsa_model):
    """As with a dense family's "eager" attention: the output is made of what is returned."""
    model, x = tiny_nsa_model(**OPTIONS["compressed"]), tokens(2, 100)
    out = model(x, output_attentions=True)
    for attentions in out.attentions:
        attentions.retain_grad()
    assert relative(out.logits, model(x).logits) < 1e-5
    out.logits.sum().backward()
    assert all(attentions.grad.abs().sum() > 0 for attentions in out.attentions)
