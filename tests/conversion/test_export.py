"""conversion/export.py: the dense tensors back, and what is said after training. (Every family: test_families.py.)"""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_families import SIZES, check_converted_and_exported, tiny_dense, tokens
from tiny_models import byte_tokenizer
from tiny_runs import tiny_run, write_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nsa_hf.conversion import convert, export_dense, manifest, render_export
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.pieces import same_bits
from nsa_hf.errors import NsaError
from nsa_hf.recipes import cli
from nsa_hf.recipes.exit_codes import WRONG_INPUT
from nsa_hf.recipes.training.loop import train


@pytest.fixture
def converted(tiny_dense_dir, tiny_sizes, tmp_path):
    return convert(tiny_dense_dir, tmp_path / "nsa", **tiny_sizes)


def rendered(report) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render_export(report))
    return console.file.getvalue()


@pytest.mark.parametrize("branch_kv", ["shared", "independent"])
def test_every_bit_comes_back(branch_kv, tiny_dense_dir, tiny_sizes, tmp_path):
    nsa = convert(tiny_dense_dir, tmp_path / "nsa", branch_kv=branch_kv, **tiny_sizes)
    report = export_dense(nsa, tmp_path / "dense", max_shard_size="20kB")
    before, after = SafetensorsCheckpoint(tiny_dense_dir), SafetensorsCheckpoint(tmp_path / "dense")
    assert before.table.keys() == after.table.keys() and len(after.files) > 2
    assert all(same_bits(before.read(name), after.read(name)) for name in before.table)
    assert report == json.loads((tmp_path / "dense" / "export.json").read_text())
    assert report["as_in_source"] == report["tensors"] == len(before.table) and "perplexity" not in report
    assert f"{len(before.table)} of {len(before.table)} bit for bit" in rendered(report)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) is LlamaForCausalLM
    text = "def f(x):"
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")(text) == AutoTokenizer.from_pretrained(tiny_dense_dir)(
        text
    )


def test_a_cast_conversion_says_that_nothing_is_the_sources(tiny_dense_dir, tiny_sizes, tmp_path):
    nsa = convert(tiny_dense_dir, tmp_path / "nsa", dtype="bfloat16", **tiny_sizes)
    report = export_dense(nsa, tmp_path / "dense")
    assert report["as_in_source"] == 0 < report["tensors"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.dtype == torch.bfloat16


def change_as_training_does(folder, measured: bool) -> None:
    """What training changes in a folder: weights, the manifest, and the figures beside it."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [{"from": 0, "to": 64, "ppl_reference": 12.5, "ppl": 11.25}]
    if measured:
        (folder / "training.json").write_text(json.dumps({"held_out": {"after_own_dense": rows}}))
    start, run = manifest.read(folder), {"steps": 1, "fingerprint": {"seed": 0}}
    manifest.write(folder, manifest.build_trained(folder, folder, start, start["companions"], run))


@pytest.mark.parametrize("measured", [True, False])
def test_after_training_it_says_what_is_dropped_and_what_that_costs(measured, converted, tmp_path):
    change_as_training_does(converted, measured)
    report = export_dense(converted, tmp_path / "dense")
    assert report["trained"] and report["as_in_source"] == report["tensors"] - 1
    assert report["perplexity"] == ([{"from": 0, "to": 64, "dense": 12.5, "sparse": 11.25}] if measured else None)
    text = rendered(report)
    assert "trained to run sparse" in text
    assert ("12.500" in text and "11.250" in text) if measured else "not measured" in text


def test_a_flipped_bit_is_found(converted, tmp_path):
    weights = load_file(converted / "model.safetensors")
    weights["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match=r"1 tensors are not what its manifest says, model.norm.weight"):
        export_dense(converted, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_model_trained_and_saved_elsewhere_goes_back_too(converted, tiny_dense_dir, tmp_path):
    """As Trainer, TRL and a merged adapter leave it: weights, config and tokenizer, and no manifest."""
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(converted).save_pretrained(tmp_path / "saved")
    report = export_dense(tmp_path / "saved", tmp_path / "dense")
    assert (report["trained"], report["as_in_source"], report["perplexity"]) == (None, None, None)
    assert "what the source held is not known: no manifest.json says so" in rendered(report)
    assert "if these weights were trained since" in rendered(report)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense) is LlamaForCausalLM and torch.equal(dense.model.norm.weight, model.model.norm.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("ab") == AutoTokenizer.from_pretrained(tiny_dense_dir)(
        "ab"
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("v_head.weight", (1, 48), r"1 unknown tensors \(v_head.weight\)"),
        ("lm_head.weight", (256, 48), "ties lm_head.weight to model.embed_tokens.weight, but it holds two different"),
    ],
)
def test_what_would_be_lost_is_named(name, shape, message, converted, tmp_path):
    """Transformers leaves a head untied that differs: dense, with the embedding for a head, it would be another."""
    (converted / "manifest.json").unlink()
    weights = {**load_file(converted / "model.safetensors"), name: torch.ones(shape)}
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match=message):
        export_dense(converted, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_companion_replaces_the_model(name, converted, tmp_path):
    manifest.write(converted, {**manifest.read(converted), "companions": [name]})
    with pytest.raises(NsaError, match=f"its manifest calls {name} a companion"):
        export_dense(converted, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_other_weights_than_a_config_names_are_not_exported(converted, tmp_path):
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(NsaError, match="names a weight file of its own"):
        export_dense(converted, tmp_path / "dense")


def test_the_bare_word_trained_skips_no_check(converted, tmp_path):
    weights = load_file(converted / "model.safetensors")
    weights["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    manifest.write(converted, {**manifest.read(converted), "trained": True})
    with pytest.raises(NsaError, match=r"1 tensors are not what its manifest says"):
        export_dense(converted, tmp_path / "dense")


def test_what_is_no_conversion_is_refused(tiny_dense_dir, converted, tmp_path):
    with pytest.raises(NsaError, match=r"holds a dense model \(llama\)"):
        export_dense(tiny_dense_dir, tmp_path / "dense")
    with pytest.raises(NsaError, match="gone does not exist"):
        export_dense(tmp_path / "gone", tmp_path / "dense")
    with pytest.raises(NsaError, match="exists and is not empty"):
        export_dense(converted, tiny_dense_dir)


def test_the_command(converted, tmp_path, capsys):
    assert cli.run(["export-dense", str(converted), str(tmp_path / "dense")]) == 0
    assert "bit for bit the source's" in capsys.readouterr().out
    assert cli.run(["export-dense", str(converted), str(tmp_path / "dense")]) == WRONG_INPUT
    assert cli.run(["export-dense", str(converted), str(tmp_path / "dense"), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "llama"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_that_were_saved_fused_stay_fused(model_type, tmp_path):
    """As Transformers holds them in memory, and saves them with `save_original_format=False`."""
    check_converted_and_exported(tiny_dense(model_type).eval(), tmp_path, save_original_format=False)
    names = SafetensorsCheckpoint(tmp_path / "nsa").table.keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in names and not any(".experts.0." in name for name in names)
    # experts of one layer are lacking: said under the names that the source has
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    del weights["model.layers.1.mlp.experts.gate_up_proj"]
    save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match=r"1 missing tensors \(model.layers.1.mlp.experts.gate_up_proj\)$"):
        convert(tmp_path / "dense", tmp_path / "other")


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_moe"])
def test_trained_by_a_real_run(model_type, tmp_path):
    """Training, its figures and its manifest go with families whose layers or experts are of several kinds."""
    tiny_dense(model_type, vocab_size=256).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    nsa = convert(tmp_path / "dense", tmp_path / "nsa", **SIZES)
    train(tiny_run(nsa, write_texts(tmp_path / "texts"), tmp_path / "trained", steps=2, length=64))
    report = export_dense(tmp_path / "trained", tmp_path / "back")
    assert report["trained"] and report["as_in_source"] < report["tensors"]
    measured = json.loads((tmp_path / "trained" / "training.json").read_text())["held_out"]["after_own_dense"]
    assert [row["dense"] for row in report["perplexity"]] == [row["ppl_reference"] for row in measured]
    with torch.no_grad():
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
        x = tokens()
        with trained.dense_attention():
            expected = trained(x).logits
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        torch.testing.assert_close(back(x).logits, expected, atol=5e-5, rtol=0)
        assert (trained(x).logits - expected).abs().max() > 1e-3
