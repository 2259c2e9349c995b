"""What `verify` says of a folder that was changed after its conversion: by damage, by training, by others."""

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
from safetensors.torch import load_file, save_file
from tiny_models import randomize_nsa
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.conversion import export_dense, manifest, render_verify, verify
from nsa_hf.conversion.compare.metrics import Bucket
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.hashes import hash_tensor
from nsa_hf.conversion.verify import judge
from nsa_hf.errors import NsaError

NORM = "model.layers.1.input_layernorm.weight"
KEPT = {"kept": 3, "of": 3, "unlike_manifest": []}


def flip_bit(folder: Path, name: str) -> None:
    """The lowest bit of one number: far too small a change for any logit to show."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1).view(torch.int32)[3] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_manifest(folder: Path, change) -> None:
    record = manifest.read(folder)
    change(record)
    manifest.write(folder, record)


@pytest.mark.parametrize(
    ("name", "changed", "why"),
    [
        (NORM, [NORM], "1 of 29 tensors are not the source's; 1 tensors are not the manifest's"),
        ("model.layers.0.self_attn.nsa.compress_k.position", [], "1 tensors are not the manifest's"),
    ],
)
def test_a_single_flipped_bit_is_found(tiny_dense_dir, copy, name, changed, why):
    flip_bit(copy, name)
    result = verify(tiny_dense_dir, copy, length=100, documents=1)
    assert (result["exact"], result["why"]) == (False, why)
    assert result["tensors"]["changed"] == changed
    assert result["tensors"]["unlike_manifest"] == [name]


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "modeling_nsa.py"]
)
def test_a_single_flipped_bit_of_any_other_file_is_found(tiny_dense_dir, copy, monkeypatch, name):
    module = importlib.import_module("nsa_hf.conversion.verify")
    zeros = torch.zeros(1, 100, 48)
    monkeypatch.setattr(module, "final_states", lambda model, windows, **_: [zeros] * len(windows))
    assert verify(tiny_dense_dir, copy, length=100, documents=1)["changed_files"] == []
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    try:
        result = verify(tiny_dense_dir, copy, length=100, documents=1)
        outcome = [result["exact"], result["changed_files"], f"{name} changed since the conversion" in result["why"]]
    except NsaError:  # it cannot be read at all
        outcome = [False, [name], True]
    assert outcome == [False, [name], True]


def with_earlier_hashes(folder: Path) -> Path:
    """The folder as versions before xxh3_128 wrote it: format 1, sha256 in every entry, no word of a kind of hash."""
    tensors = dict(SafetensorsCheckpoint(folder).tensors())

    def change(record):
        del record["hash"]
        record["format"] = 1
        for name, entry in record["tensors"].items():
            del entry["xxh3_128"]
            entry["sha256"] = hash_tensor(tensors[name], "sha256")

    edit_manifest(folder, change)
    return folder


def test_a_manifest_of_earlier_hashes_is_still_a_proof(tiny_dense_dir, copy, tmp_path):
    result = verify(tiny_dense_dir, with_earlier_hashes(copy), length=100, documents=1)
    assert (result["exact"], result["source_matches_manifest"]) == (True, True)
    assert export_dense(copy, tmp_path / "dense")["as_in_source"] == 29
    name = "model.layers.0.self_attn.nsa.compress_k.position"
    flip_bit(copy, name)
    assert verify(tiny_dense_dir, copy, length=100, documents=1)["tensors"]["unlike_manifest"] == [name]


def test_a_changed_weight_is_found_even_if_the_manifest_was_changed_too(tiny_dense_dir, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors[NORM] *= 1.1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    edit_manifest(
        copy, lambda record: record["tensors"].update({NORM: manifest.describe_tensor(tensors[NORM], "source")})
    )
    result = verify(tiny_dense_dir, copy, length=100, documents=1)
    assert result["exact"] is False
    assert result["tensors"]["unlike_manifest"] == []
    assert "1 of 29 tensors are not the source's; a logit" in result["why"]


def test_against_another_source_it_is_not_exact(tiny_dense_dir, converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_dense_dir)
    model.model.norm.weight.data[0] += 1
    other = Path(shutil.copytree(tiny_dense_dir, tmp_path / "other"))
    model.save_pretrained(other)
    result = verify(other, converted, length=100, documents=1)
    assert (result["exact"], result["source_matches_manifest"]) == (False, False)
    assert result["tensors"]["changed"] == ["model.norm.weight"]


def train_elsewhere(folder: Path) -> None:
    """Other weights, saved over a folder as Trainer, TRL or a merge do."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data *= 1.01
    randomize_nsa(model)
    model.save_pretrained(folder)


@pytest.fixture
def trained(copy) -> Path:
    """As `train` leaves it."""
    start = manifest.read(copy)
    train_elsewhere(copy)
    (copy / "training.json").write_text("{}")
    run = {"steps": 1, "fingerprint": {"seed": 0}}
    manifest.write(copy, manifest.build_trained(copy, copy, start, start["companions"], run))
    return copy


def test_a_trained_model_is_compared_but_exactness_does_not_apply(tiny_dense_dir, trained):
    result = verify(tiny_dense_dir, trained, length=100, documents=1)
    assert (result["exact"], result["why"]) == (None, "trained: differs from its source as recorded")
    assert (result["tensors"]["kept"], result["tensors"]["unlike_manifest"], result["trained"]) == (28, [], True)
    assert result["by_position"][0]["kl"] > 0
    console = Console(file=io.StringIO(), width=120)
    console.print(render_verify(result))
    assert "trained: differs from its source as recorded" in console.file.getvalue()


@pytest.mark.parametrize("name", [NORM, "model.layers.0.self_attn.nsa.compress_k.position"])
def test_a_single_flipped_bit_of_a_trained_model_is_found(name, tiny_dense_dir, trained, tmp_path):
    flip_bit(trained, name)
    result = verify(tiny_dense_dir, trained, length=100, documents=1)
    assert (result["exact"], result["why"]) == (False, "not as trained: 1 tensors are not the manifest's")
    assert result["tensors"]["unlike_manifest"] == [name]
    if name == NORM:
        with pytest.raises(NsaError, match=f"1 tensors are not what its manifest says, {NORM} for one"):
            export_dense(trained, tmp_path / "dense")


@pytest.mark.parametrize("name", ["config.json", "training.json"])
def test_an_edited_file_of_a_trained_model_is_found(name, tiny_dense_dir, trained):
    content = json.loads((trained / name).read_text())
    (trained / name).write_text(json.dumps({**content, "nsa_topk": 5}))
    result = verify(tiny_dense_dir, trained, length=100, documents=1)
    assert (result["exact"], result["why"]) == (False, f"not as trained: {name} changed since the training")


@pytest.mark.parametrize("record", [{}, {"training": {}}, {"training": {"steps": 9}}, {"training": True}])
def test_the_bare_word_trained_makes_no_trained_model(record, copy):
    edit_manifest(copy, lambda content: content.update(trained=True, **record))
    content = manifest.read(copy)
    assert not manifest.is_trained(content)
    why = "its manifest says that it was trained, and has no record of a run"
    assert judge(content, KEPT, Bucket(0, 64)) == (False, why)


def test_an_untrained_model_is_not_waved_through_as_trained(tiny_dense_dir, copy):
    edit_manifest(copy, lambda record: record.update(trained=True))
    result = verify(tiny_dense_dir, copy, length=100, documents=1)
    assert (result["exact"], result["trained"]) == (False, False)


def test_a_folder_that_was_saved_elsewhere_is_held_against_its_source(tiny_dense_dir, copy, tmp_path):
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(saved)
    AutoTokenizer.from_pretrained(copy).save_pretrained(saved)
    result = verify(tiny_dense_dir, saved, length=100, documents=1)
    assert (result["exact"], result["trained"], result["source_matches_manifest"]) == (True, None, None)
    assert result["why"].endswith("; no manifest.json, so nothing vouches for the new parameters and the other files")
    train_elsewhere(saved)
    result = verify(tiny_dense_dir, saved, length=100, documents=1)
    assert (result["exact"], result["tensors"]["kept"], result["tensors"]["unlike_manifest"]) == (None, 28, None)
    assert result["why"].startswith("not proved: 1 of 29 tensors are not the source's; a logit within the exact range")
    assert result["why"].endswith("; by training or by damage: there is no manifest.json to tell")
    console = Console(file=io.StringIO(), width=120)
    console.print(render_verify(result))
    assert "not proved" in console.file.getvalue()


def test_scaling_that_nothing_vouches_for_is_not_called_exact(tiny_dense_dir, copy):
    (copy / "manifest.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (copy / "config.json").write_text(json.dumps(config))
    result = verify(tiny_dense_dir, copy, length=100, documents=1)
    assert (result["exact"], result["tensors"]["kept"]) == (None, 29)
    assert result["why"].startswith("not proved: its config scales RoPE, and the source's does not; scaled alike, all")


def test_of_a_tensor_lost_elsewhere_nothing_is_made_up(tiny_dense_dir, copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "manifest.json").unlink()
    with pytest.raises(NsaError, match="lacks 1 tensors"):
        verify(tiny_dense_dir, copy, length=100)


def test_weights_the_checkpoint_lacks_are_not_made_up(tiny_dense_dir, copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match="lacks 1 tensors"):
        verify(tiny_dense_dir, copy, length=100)


@pytest.mark.parametrize(
    ("tensors", "difference", "gap", "expected"),
    [
        (KEPT, 9e-4, 0.0, True),
        (KEPT, 9e-4, 5e-5, True),  # a tie that rounding turned
        (KEPT, 9e-4, 5e-4, False),
        (KEPT, 1.1e-3, 0.0, False),
        (KEPT, math.nan, math.nan, False),
        (KEPT, math.inf, 0.0, False),
        ({**KEPT, "kept": 2}, 0.0, 0.0, False),
        ({**KEPT, "unlike_manifest": ["a"]}, 0.0, 0.0, False),
    ],
)
def test_judgement(tensors, difference, gap, expected):
    logits = Bucket(0, 64, max_abs_diff=difference, top1_gap=gap)
    assert judge({"trained": False}, tensors, logits)[0] is expected
    assert judge({"trained": False}, tensors, logits, ["config.json"])[0] is False
    assert judge({"trained": True}, tensors, logits)[0] is False
    alone = judge(None, {**tensors, "unlike_manifest": None}, logits)[0]
    assert alone is (True if expected or tensors["unlike_manifest"] else None)
    trained = {"trained": True, "training": {"steps": 1, "fingerprint": {"seed": 0}}}
    assert judge(trained, tensors, logits)[0] is (False if tensors["unlike_manifest"] else None)
