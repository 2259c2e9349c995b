"""nsa_hf/features.py: what decides in a config whether a layer is plain, refused by name or kept as it is."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import EXACT, LENGTH, SIZES, sparse_of, tiny_config, tiny_dense, tokens
from transformers import AutoModelForCausalLM

from nsa_hf.conversion import convert, plan, verify
from nsa_hf.errors import NotPlain, NsaError
from nsa_hf.families import family_of, nsa_config_from_dense
from nsa_hf.features import head_sizes


def build(model_type: str, **changes):
    config = nsa_config_from_dense(tiny_config(model_type, **changes), **SIZES)
    with torch.device("meta"):
        return family_of(config).causal_lm_class(config)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "mistral",
            {"sliding_window": 24},
            r"^sliding_window: every layer of this mistral model attends to the last 24",
        ),
        ("phi3", {"sliding_window": 511, "max_position_embeddings": 512}, r"^sliding_window: every layer of this phi3"),
        ("mixtral", {"sliding_window": 24}, r"^sliding_window: every layer of this mixtral"),
        # its attention is not told of the window, only its mask is
        ("phimoe", {"sliding_window": 24}, r"^sliding_window: every layer of this phimoe"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9},
            r"^sliding_window: no layer has full",
        ),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, r"^sliding_window is null"),
        ("gemma2", {}, r"^softcap: gemma2 caps the logits of its attention at 50"),
        ("gpt_oss", {}, r"^sinks: gpt_oss adds a learned sink"),
        ("gemma3_text", {"use_bidirectional_attention": True}, r"gemma3_text .* attends to later tokens too"),
        ("llama4_text", {}, r"llama4_text has layers of the kind chunked_attention"),
    ],
)
def test_a_config_is_refused_by_what_is_in_it(model_type, changes, message):
    with pytest.raises(NotPlain, match=message):
        build(model_type, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("gemma2", {"attn_logit_softcapping": None}, [24, None]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}, [None, 24]),
        (
            "qwen3",
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9, "use_sliding_window": True},
            [9, None],
        ),
        ("ministral", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}, [None, 9]),
        ("smollm3", {"no_rope_layers": [0, 1]}, [None, None]),
        ("llama", {"attention_bias": True, "head_dim": 12, "num_key_value_heads": 1}, [None, None]),
        ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 3.0}, [None, None]),
        ("phi3", {"sliding_window": 512, "max_position_embeddings": 512}, [None, None]),
        ("glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, None),
        ("laguna", {"num_attention_heads_per_layer": [4, 2]}, [24, None]),
    ],
)
def test_what_is_kept_is_exact(model_type, changes, windows):
    dense, x = tiny_dense(model_type, **changes), tokens()
    model = sparse_of(dense)
    assert windows is None or [layer.window for layer in model.attention_layers()] == windows
    with torch.no_grad():
        difference = (model(x).logits - dense(x).logits).abs().amax((0, 2))
        assert difference[:EXACT].max() < 5e-5 and difference[EXACT + 2 :].max() > 1e-3
        assert (sparse_of(dense, nsa_topk=8)(x).logits - dense(x).logits).abs().max() < 5e-5


def test_a_window_written_into_a_converted_config_is_refused(tmp_path):
    tiny_dense("mistral").save_pretrained(tmp_path / "dense")
    out = convert(tmp_path / "dense", tmp_path / "nsa", **SIZES)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "sliding_window": 16}))
    with pytest.raises(NotPlain, match=r"^sliding_window: "):
        AutoModelForCausalLM.from_pretrained(out)


def test_refused_before_anything_is_written(tmp_path):
    tiny_dense("mistral", sliding_window=24).save_pretrained(tmp_path / "dense")
    for attempt in (lambda: plan(tmp_path / "dense"), lambda: convert(tmp_path / "dense", tmp_path / "nsa")):
        with pytest.raises(NotPlain, match=r"^sliding_window: "):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_dense_layers_among_sliding_ones():
    dense = tiny_dense("gemma3_text", layer_types=["full_attention", "sliding_attention"] * 2, num_hidden_layers=4)
    model, x = sparse_of(dense, nsa_dense_layers=[0, 1]), tokens()
    assert [layer.nsa is not None for layer in model.attention_layers()] == [False, False, True, False]
    with torch.no_grad():
        difference = (model(x).logits - dense(x).logits).abs().amax((0, 2))
    assert difference[:EXACT].max() < 5e-5 and difference[EXACT + 2 :].max() > 1e-3
    assert len(difference) == LENGTH


def test_gates_have_the_layers_own_number_of_heads():
    model = build("laguna", num_attention_heads_per_layer=[4, 2])
    sizes = [head_sizes(layer, model.config) for layer in model.attention_layers()]
    assert sizes == [(4, 8, 8), (2, 8, 8)]
    assert [layer.nsa.gate.down.out_features for layer in model.attention_layers() if layer.nsa] == [6]


@pytest.mark.parametrize("model_type", ["nemotron", "gemma3_text", "qwen3_moe"])
def test_gradient_checkpointing_gives_the_same_gradients(model_type):
    """Also where a layer keeps its arguments from its attention (Nemotron), with padding that both forwards need."""
    x, gradients = tokens(), []
    mask = torch.ones_like(x)
    mask[1, :9] = 0
    dense = tiny_dense(model_type)
    for checkpointing in (False, True):
        model = sparse_of(dense, random=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(x, attention_mask=mask, use_cache=False).logits
        with torch.no_grad():
            # another forward in between, without padding
            model(x, use_cache=False)
        out[:, 20:].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma3_text", "nemotron_h", "phi3"])
def test_verified_as_stored(model_type, tmp_path):
    tiny_dense(model_type).save_pretrained(tmp_path / "dense")
    out = convert(tmp_path / "dense", tmp_path / "nsa", **SIZES)
    result = verify(tmp_path / "dense", out, length=LENGTH, documents=1)
    assert result["exact"] is True, result["why"]


def test_layers_with_a_state_refuse_what_they_cannot_do():
    model = sparse_of(tiny_dense("qwen3_next"))
    packed = torch.cat([torch.arange(30), torch.arange(30)])[None]
    with pytest.raises(NsaError, match="layers that carry a state from token to token: packed documents cannot"):
        model(tokens(1), position_ids=packed)
    with pytest.raises(NsaError, match="a static cache cannot be used"):
        model.generate(tokens(1, 8), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("model_type", ["nemotron", "persimmon", "qwen3_moe", "gemma3_text"])
def test_what_a_forward_can_give_besides_logits(model_type):
    """Also where layers or attentions keep `output_attentions` to themselves."""
    dense, x = tiny_dense(model_type), tokens(1, EXACT)
    model = sparse_of(dense)
    also = {"output_router_logits": True} if model_type == "qwen3_moe" else {}
    with torch.no_grad():
        expected = dense(x, output_hidden_states=True, **also)
        out = model(x, output_hidden_states=True, output_attentions=True, **also)
    torch.testing.assert_close(out.hidden_states, expected.hidden_states, atol=5e-5, rtol=0)
    assert len(out.attentions) == len(list(model.attention_layers())) > 0
    assert all(weight.shape == (1, 4, EXACT, EXACT) for weight in out.attentions)
    if also:
        torch.testing.assert_close(out.router_logits, expected.router_logits, atol=5e-5, rtol=0)
