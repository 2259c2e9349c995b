"""conversion/verify.py: exact where it is, the right figures, and what it refuses."""

from __future__ import annotations

import importlib
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.conversion import convert, render_verify, verify
from nsa_hf.errors import NsaError

LENGTH = 150


def test_a_conversion_is_exact_and_beyond_the_range_it_is_not_dense(tiny_dense_dir, converted):
    result = verify(tiny_dense_dir, converted, length=LENGTH)
    assert result["exact"] is True
    assert result["tensors"] == {"kept": 29, "of": 29, "changed": [], "written": 65, "unlike_manifest": []}
    exact = result["exact_range"]
    assert (exact["up_to"], exact["tokens"], exact["same_top1"], exact["top1_gap"]) == (64, 128, 1.0, 0.0)
    assert exact["max_abs_diff"] < 1e-5
    assert [(row["from"], row["to"], row["tokens"]) for row in result["by_position"]] == [(0, 64, 128), (64, 150, 172)]
    assert result["by_position"][1]["max_abs_diff"] > 0.1
    assert result["source_matches_manifest"] is True
    assert result["documents"] == [{"name": n, "tokens": LENGTH} for n in ("_pydecimal.py", "tarfile.py")]
    assert result["texts"]["license"] == "PSF-2.0"
    assert json.loads((converted / "verify.json").read_text(encoding="utf-8")) == result


def test_by_position_is_what_whole_forwards_give(tiny_dense_dir, converted):
    text = "def f(x):\n    return x + 1\n" * 20
    result = verify(tiny_dense_dir, converted, length=LENGTH, documents=1, texts=[("mine", text)])
    ids = AutoTokenizer.from_pretrained(converted)(text, return_tensors="pt").input_ids[:, :LENGTH]
    with torch.no_grad():
        dense, sparse = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation=a).eval()(ids).logits[0]
            for d, a in ((tiny_dense_dir, "sdpa"), (converted, "nsa"))
        )
    row = result["by_position"][1]
    part = slice(64, LENGTH)
    log_p, log_q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[part].mean().item()
    nll = [torch.nn.functional.nll_loss(x[64:-1], ids[0, 65:]).item() for x in (log_p, log_q)]
    assert row["tokens"] == LENGTH - 64
    assert row["kl"] == pytest.approx(kl, rel=1e-4)
    assert [row["ppl_reference"], row["ppl"]] == pytest.approx([math.exp(x) for x in nll], rel=1e-4)
    assert row["same_top1"] == pytest.approx((dense.argmax(-1) == sparse.argmax(-1))[part].double().mean().item())
    assert row["max_abs_diff"] == pytest.approx((dense - sparse)[part].abs().max().item(), rel=1e-4)
    assert result["texts"]["origin"] == "given by the user"


def test_with_everything_selected_all_positions_are_exact(tiny_dense_dir, tiny_sizes, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out", **{**tiny_sizes, "nsa_topk": 10})
    result = verify(tiny_dense_dir, out, length=LENGTH)
    assert result["exact"] is True
    assert [row["to"] for row in result["by_position"]] == [LENGTH]
    assert result["by_position"][0]["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("options", [{"nsa_gate": "blend"}, {"dense_layers": [0, 2]}, {"compression": "mean"}])
def test_other_exact_conversions(tiny_dense_dir, tiny_sizes, tmp_path, options):
    out = convert(tiny_dense_dir, tmp_path / "out", **tiny_sizes, **options)
    assert verify(tiny_dense_dir, out, length=100, documents=1)["exact"] is True


@pytest.mark.parametrize("options", [{"nsa_gate": "sigmoid"}, {"nsa_gate": "blend", "gate_blend": 0.5}])
def test_gates_that_do_not_start_exact_are_found_by_the_logits(tiny_dense_dir, tiny_sizes, tmp_path, options):
    out = convert(tiny_dense_dir, tmp_path / "out", **tiny_sizes, **options)
    result = verify(tiny_dense_dir, out, length=100, documents=1)
    assert result["exact"] is False
    assert result["tensors"]["kept"] == result["tensors"]["of"]
    assert "a logit within the exact range differs by" in result["why"]


REMOTE = """
from transformers import LlamaForCausalLM

class XForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * {factor}
        return output
"""


@pytest.mark.parametrize("factor", [1, 1.1])
def test_trusted_code_is_the_dense_model(tiny_dense_dir, tiny_sizes, tmp_path, monkeypatch, factor):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    dense = Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))
    config = json.loads((dense / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "modeling_x.py").write_text(REMOTE.format(factor=factor))
    out = convert(dense, tmp_path / "out", trust_remote_code=True, **tiny_sizes)
    with pytest.raises(NsaError, match="defined by code of its own"):
        verify(dense, out)
    assert verify(dense, out, length=100, documents=1, trust_remote_code=True)["exact"] is (factor == 1)
    assert not (out / "modeling_x.py").exists()
    assert "modeling_x" not in (out / "config.json").read_text()


def test_in_another_dtype_it_is_exact_with_respect_to_the_rounded_source(tiny_dense_dir, tiny_sizes, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out", dtype="bfloat16", **tiny_sizes)
    result = verify(tiny_dense_dir, out, length=100, documents=1)
    assert (result["exact"], result["checkpoint_dtype"], result["computed_in"]) == (True, "bfloat16", "float32")
    assert result["tensors"]["kept"] == 29
    assert result["exact_range"]["max_abs_diff"] < 1e-5


def test_a_tokenizer_of_another_model_is_named(tiny_dense_dir, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(NsaError, match="the tokenizer gives token 256, and the model's vocabulary ends at 255"):
        verify(tiny_dense_dir, copy, texts=[("text", "and beyond it, " * 40)], length=100, documents=1)


def test_without_a_tokenizer_random_tokens_show_exactness_and_no_perplexity(tiny_dense_dir, tiny_sizes, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_dense_dir).save_pretrained(tmp_path / "dense")
    out = convert(tmp_path / "dense", tmp_path / "out", **tiny_sizes)
    result = verify(tmp_path / "dense", out, length=100)
    assert result["exact"] is True
    assert [document["name"] for document in result["documents"]] == ["random tokens 0", "random tokens 1"]
    assert result["texts"] is None
    assert all(row["ppl"] is row["ppl_reference"] is None for row in result["by_position"])
    assert result["by_position"][1]["kl"] > 0


def test_length_stops_at_what_the_model_was_made_for(tiny_dense_dir, tiny_sizes, tmp_path):
    dense = Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 90}))
    out = convert(dense, tmp_path / "out", **tiny_sizes)
    assert verify(dense, out, documents=1)["length"] == 90


@pytest.mark.parametrize("options", [{"length": 1}, {"documents": 0}, {"length": 64.5}, {"documents": 10**9}])
def test_bad_options(tiny_dense_dir, converted, options):
    with pytest.raises(NsaError, match=r"(length|documents) must be an int of at least"):
        verify(tiny_dense_dir, converted, **options)


def test_what_is_missing_or_damaged_is_refused_and_the_old_result_stays(tiny_dense_dir, copy, tmp_path):
    (copy / "verify.json").write_text("old")
    with pytest.raises(NsaError, match="there is no folder"):
        verify(tmp_path / "gone", copy)
    with pytest.raises(NsaError, match=r"holds a dense model \(llama\)"):
        verify(tiny_dense_dir, tiny_dense_dir)
    with pytest.raises(NsaError, match=r"has no manifest\.json"):
        verify(tiny_dense_dir, tmp_path)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(NsaError, match="damaged"):
        verify(tiny_dense_dir, copy)
    assert (copy / "verify.json").read_text() == "old"


def test_rendering_shows_the_verdict_and_the_figures(tiny_dense_dir, converted):
    result = verify(tiny_dense_dir, converted, length=LENGTH)
    console = Console(file=io.StringIO(), width=80)
    console.print(render_verify(result))
    text = console.file.getvalue()
    assert "…" not in text, "something was cut off"
    for part in (
        "Up to 64 tokens",
        "exact:",
        "29 of 29",
        "65 of 65",
        "64 - 150",
        f"{result['by_position'][1]['ppl']:.3f}",
    ):
        assert part in text
    console.print(render_verify({**result, "exact": False, "why": "because", "source": "models/[b]x"}))
    assert "NOT exact: because" in console.file.getvalue()
    assert "models/[b]x" in console.file.getvalue()


def test_one_model_at_a_time_and_only_heads_remain(tiny_dense_dir, converted, monkeypatch):
    module = importlib.import_module("nsa_hf.conversion.verify")
    steps: list[str | int] = []
    drop_decoder, load_whole = module.drop_decoder, module.load_whole

    def drop(model):
        drop_decoder(model)
        steps.append(sum(parameter.numel() for parameter in model.parameters()))

    def load(*args, **options):
        steps.append("the NSA model is loaded")
        return load_whole(*args, **options)

    monkeypatch.setattr(module, "drop_decoder", drop)
    monkeypatch.setattr(module, "load_whole", load)
    verify(tiny_dense_dir, converted, length=100, documents=1)
    assert steps == [256 * 48, "the NSA model is loaded", 256 * 48]
