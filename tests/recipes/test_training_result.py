"""What a run leaves: a whole model, its manifest, and training.json."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import folder_hashes, result_of, tiny_run, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa_hf
from nsa_hf.conversion import export_dense, manifest
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.loop import train


def test_a_run_ends_as_a_whole_model(finished, nsa_dir):
    out, _, before = finished
    assert folder_hashes(nsa_dir) == before
    assert not list(out.parent.glob("*unfinished*"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, nsa_hf.NsaLlamaForCausalLM)
    ids = AutoTokenizer.from_pretrained(out)("the of", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    old, new = weights_of(nsa_dir), weights_of(out)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"} <= changed
    assert any(".nsa.gate." in name for name in changed)


def test_its_manifest_is_of_a_trained_model(finished, nsa_dir):
    out, config, _ = finished
    trained, untrained = manifest.read(out), manifest.read(nsa_dir)
    assert trained["trained"] is True
    assert trained["exact_up_to"] is None
    assert trained["source"] == untrained["source"]
    assert trained["training"]["steps"] == config.steps
    assert manifest.differences(trained, SafetensorsCheckpoint(out).tensors()) == []
    assert {name: entry["from"] for name, entry in trained["tensors"].items()} == {
        name: entry["from"] for name, entry in untrained["tensors"].items()
    }


def test_every_tensor_and_file_of_it_has_its_hash(finished):
    out, _, _ = finished
    record = manifest.read(out)
    assert manifest.is_trained(record) and manifest.changed_files(record, out) == []
    # the picture is drawn again with the model's card
    beside = {path.name for path in out.iterdir()} - {"manifest.json", "model.safetensors", "training.png"}
    assert record["files"].keys() == beside and "training.json" in beside


def test_it_starts_from_a_folder_that_was_saved_elsewhere(nsa_dir, texts, tmp_path):
    """As Trainer, TRL and a merged adapter leave it: no manifest.json."""
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(nsa_dir).save_pretrained(saved)
    AutoTokenizer.from_pretrained(nsa_dir).save_pretrained(saved)
    config = tiny_run(saved, texts, tmp_path / "out", steps=1)
    record = manifest.read(train(config))
    assert (record["source"]["name"], record["source"]["kind"]) == (str(saved), "a folder without manifest.json")
    assert manifest.is_trained(record)
    assert "source" not in record["tensors"]["model.norm.weight"]
    assert manifest.differences(record, SafetensorsCheckpoint(tmp_path / "out").tensors()) == []
    report = export_dense(tmp_path / "out", tmp_path / "dense")
    assert (report["trained"], report["as_in_source"]) == (True, None)
    # other weights are another run
    weights = weights_of(saved)
    weights["model.norm.weight"] += 1
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match="weights"):
        train(config)


def test_its_result_holds_what_was_measured(finished):
    out, config, _ = finished
    result = result_of(out)
    settled = {"teacher_dtype": "float32", "compile": "no", "held_out_length": 128}
    assert result["config"] == {**config.as_dict(), **settled}
    assert [row["step"] for row in result["curve"]] == [1, 2, 3, 4]
    for row in result["curve"]:
        assert row["loss"] == pytest.approx(row["ce"] + row["kl"])
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
    held_out = result["held_out"]
    assert held_out["names"] == ["0.txt", "1.txt"]
    assert [(row["from"], row["to"]) for row in held_out["before"]] == [(0, 64), (64, 128)]
    # before training the exact range is exact, and only it
    assert held_out["before"][0]["kl"] < 1e-7
    assert held_out["before"][1]["kl"] > 1e-4
    kl = [row["kl"] for row in held_out["after"]]
    assert held_out["kl_after"] == pytest.approx(sum(kl) / 2)
    assert held_out["kl_after_beyond"] == pytest.approx(kl[1])
    for after, own in zip(held_out["after"], held_out["after_own_dense"], strict=True):
        assert after["ppl"] == pytest.approx(own["ppl"])
    assert result["parameters"]["nsa"] == sum(t.numel() for n, t in weights_of(out).items() if ".nsa." in n)
    assert result["hardware"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
def test_a_finished_run_that_has_lost_a_file_is_not_called_finished(finished, tmp_path, name):
    out, config, _ = finished
    (out / name).rename(tmp_path / name)
    try:
        with pytest.raises(NsaError, match=rf"held this run, finished, and is not whole .*{name}.*put that back"):
            train(config)
        assert (out / "training.json").is_file()
    finally:
        (tmp_path / name).rename(out / name)
