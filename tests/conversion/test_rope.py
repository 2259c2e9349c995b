"""conversion/rope.py: RoPE scaled at conversion, exact beside the source scaled in the same way."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from tiny_families import EXACT, SIZES, tiny_config, tiny_dense, tokens
from transformers import AutoModelForCausalLM

from nsa_hf import NsaError
from nsa_hf.conversion import convert, plan, render_plan, render_verify, verify
from nsa_hf.conversion.rope import KINDS, parse_rope_scaling, scale_model, scaled_config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi", "smollm3"])
def test_exact_beside_the_dense_model_with_the_same_scaling(kind, model_type, tmp_path):
    dense = tiny_dense(model_type)
    dense.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "nsa", rope_scaling=f"{kind}:4", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa")
    assert model.config.max_position_embeddings == 4 * dense.config.max_position_embeddings
    scaling = {"rope_type": kind, "factor": 4.0, **KINDS[kind]}
    assert json.loads((tmp_path / "nsa" / "manifest.json").read_text())["options"]["rope_scaling"] == scaling
    x = tokens()
    with torch.no_grad():
        plain = dense(x).logits
        # Transformers' own dense class, from a config that says so
        scaled = type(dense)(scaled_config(dense.config, scaling)).eval()
        scaled.load_state_dict(dense.state_dict())
        expected, actual = scaled(x).logits, model(x).logits
        torch.testing.assert_close(actual[:, :EXACT], expected[:, :EXACT], atol=5e-5, rtol=0)
        assert (expected - plain).abs().max() > 1e-3, "nothing was scaled"
        torch.testing.assert_close(scale_model(dense, scaling)(x).logits, expected)


def rendered(table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_verify_compares_with_the_scaled_source(tiny_dense_dir, tiny_sizes, tmp_path):
    convert(tiny_dense_dir, tmp_path / "nsa", rope_scaling="yarn:2", **tiny_sizes)
    text = ("text", "for i in range(10):\n    print(i)\n" * 40)
    result = verify(tiny_dense_dir, tmp_path / "nsa", length=100, documents=1, texts=[text])
    assert result["exact"] is True and result["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0}
    assert "scaled as the converted one: yarn, factor 2" in rendered(render_verify(result))
    (tmp_path / "nsa" / "manifest.json").unlink()  # as a folder that Trainer saved
    again = verify(tiny_dense_dir, tmp_path / "nsa", length=100, documents=1, texts=[text])
    assert again["exact"] is None and again["why"].startswith("not proved: its config scales RoPE")
    assert again["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0}
    description = plan(tiny_dense_dir, rope_scaling="yarn:2", **tiny_sizes)
    assert "64 tokens, with its RoPE scaled alike (yarn, factor 2)" in rendered(render_plan(description))


def test_only_full_attention_layers_of_gemma3_are_scaled():
    before = tiny_config("gemma3_text")
    after = scaled_config(before, parse_rope_scaling("yarn:8"))
    assert after.rope_parameters["sliding_attention"] == before.rope_parameters["sliding_attention"]
    assert after.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert before.rope_parameters["full_attention"]["rope_type"] == "default", "the source's config stays as it is"


def test_how_it_is_written():
    assert parse_rope_scaling(None) is None
    assert parse_rope_scaling(" YaRN:4") == parse_rope_scaling({"rope_type": "yarn", "factor": 4})
    assert parse_rope_scaling({"rope_type": "llama3", "factor": 8, "low_freq_factor": 2})["low_freq_factor"] == 2
    for wrong in (
        "yarn",
        "ntk:4",
        "yarn:1",
        "yarn:x",
        "yarn:4:2",
        "yarn:inf",
        "linear:nan",
        "yarn:1e308",
        {"rope_type": "yarn"},
        4,
        {"factor": 2},
    ):
        with pytest.raises(NsaError, match="rope_scaling must be KIND:FACTOR with a kind of yarn, linear, llama3"):
            parse_rope_scaling(wrong)


def test_what_cannot_be_scaled_is_refused():
    scaling = parse_rope_scaling("yarn:4")
    with pytest.raises(NsaError, match=r"scaled already \(yarn\)"):
        scaled_config(scaled_config(tiny_config("llama"), scaling), scaling)
    with pytest.raises(NsaError, match="ctrl has no RoPE"):
        scaled_config(tiny_config("ctrl"), scaling)
