"""conversion/compare/resumed.py: what is left out changes nothing, and where it would, nothing is left out."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_families import sparse_of, tiny_dense, tokens
from torch import nn

from nsa_hf.conversion.compare.models import final_states
from nsa_hf.conversion.compare.resumed import decoder_layers, resumable

WINDOW = ("text", tokens(1))
FAMILIES = ["llama", "gemma3_text", "lfm2", "stablelm", "gpt_neox", "ctrl", "jamba", "qwen3_moe"]


def states_of(model, layer: int, begin_at) -> torch.Tensor:
    """With one layer sparse."""
    with model.dense_attention([other for other in sparse_layers(model) if other != layer]), begin_at(layer):
        return final_states(model, [WINDOW])[0]


def sparse_layers(model) -> list[int]:
    return [module.layer_idx for module in model.attention_layers() if module.nsa is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_that_begin_in_the_middle_give_what_whole_ones_give(family):
    model = sparse_of(tiny_dense(family), random=True)
    begin_at = resumable(model, WINDOW)
    whole = [states_of(model, layer, lambda _: nullcontext()) for layer in sparse_layers(model)]
    layers, ran = decoder_layers(model), []
    for place, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, place=place: ran.append(place) and None)
        for part in layer.children():
            part.register_forward_pre_hook(lambda *_, place=place: ran.append(10 + place) and None)
    for layer, expected in zip(sparse_layers(model), whole, strict=True):
        ran.clear()
        assert torch.equal(states_of(model, layer, begin_at), expected)
        assert {place for place in ran if place < 10} == set(range(len(layers)))
        assert min(place for place in ran if place >= 10) == 10 + layer, "a part of an earlier layer ran"
    assert torch.equal(states_of(model, layer, lambda _: nullcontext()), whole[-1]), "as it was before"


def test_layers_that_hand_on_more_than_their_output_all_run(monkeypatch):
    model = sparse_of(tiny_dense("llama", num_hidden_layers=3), random=True)
    first, last, _ = decoder_layers(model)  # the last layer is as it was
    kept: dict[str, torch.Tensor] = {}
    first.self_attn.register_forward_hook(lambda module, given, output: kept.update(past=output[0].mean()))
    last.register_forward_hook(lambda module, given, output: output + kept.pop("past", torch.zeros(())))
    begin_at = resumable(model, WINDOW)
    expected = states_of(model, 1, lambda _: nullcontext())
    assert torch.equal(states_of(model, 1, begin_at), expected)


def test_layers_that_write_into_what_they_are_given_all_run():
    model = sparse_of(tiny_dense("llama"), random=True)
    last = decoder_layers(model)[-1]
    forward = type(last).forward

    class Writes(type(last)):
        def forward(self, hidden_states, *args, **kwargs):
            output = forward(self, hidden_states, *args, **kwargs)
            hidden_states += 1
            return output

    last.__class__ = Writes
    expected = states_of(model, 1, lambda _: nullcontext())
    begin_at = resumable(model, WINDOW)
    for _ in range(3):
        assert torch.equal(states_of(model, 1, begin_at), expected)


def test_layers_that_are_not_one_list_by_number_all_run():
    model = sparse_of(tiny_dense("llama"), random=True)
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[1], layers[0]])
    assert decoder_layers(model) == []
    assert isinstance(resumable(model, WINDOW)(1), nullcontext)
