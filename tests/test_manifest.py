"""conversion/manifest.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nsa_hf.conversion import convert, manifest
from nsa_hf.conversion.checkpoint import CheckpointError, SafetensorsCheckpoint, hash_tensor


@pytest.fixture(scope="module")
def converted(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    return convert(tiny_dense_dir, tmp_path_factory.mktemp("converted") / "out", **tiny_sizes, gate_dim=8)


def test_it_says_what_was_made_from_what(converted, tiny_dense_dir, tiny_sizes):
    record = manifest.read(converted)
    assert (record["hash"], record["trained"]) == ("xxh3_128", False)
    assert record["exact_up_to"] == 64
    assert record["model_type"] == "nsa_llama"
    assert record["shape"].items() >= {"num_hidden_layers": 3, "hidden_size": 48, "nsa_gate_dim": 8}.items()
    assert record["options"] == {
        **tiny_sizes, "nsa_gate_dim": 8, "dtype": None, "max_shard_size": "2GB", "seed": 0,
    }  # fmt: skip
    assert record["source"]["name"] == str(tiny_dense_dir)
    assert "model.safetensors" in record["source"]["files"]
    assert {"python", "torch", "transformers", "safetensors"} <= record["versions"].keys()
    for name in record["companions"]:
        assert (converted / name).is_file()


def test_every_written_tensor_has_its_hash_and_origin(converted):
    record, checkpoint = manifest.read(converted), SafetensorsCheckpoint(converted)
    assert record["tensors"].keys() == checkpoint.table.keys()
    for name, tensor in checkpoint.tensors():
        entry = record["tensors"][name]
        assert entry["xxh3_128"] == hash_tensor(tensor)
        assert (entry["shape"], entry["dtype"]) == (list(tensor.shape), "float32")
        assert entry["from"] == ("nsa" if ".nsa." in name else "source")
    assert manifest.differences(record, checkpoint.tensors()) == []


def test_differences_finds_a_single_bit_a_lost_and_a_new_tensor(converted):
    record, checkpoint = manifest.read(converted), SafetensorsCheckpoint(converted)
    tensors = dict(checkpoint.tensors())
    flipped = tensors["model.norm.weight"].clone()
    flipped.view(torch.int32)[7] ^= 1
    changed = {**tensors, "model.norm.weight": flipped, "new": torch.zeros(1)}
    del changed["model.embed_tokens.weight"]
    assert manifest.differences(record, iter(changed.items())) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "new",
    ]
    half = {**tensors, "model.norm.weight": tensors["model.norm.weight"].half()}
    assert manifest.differences(record, iter(half.items())) == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no manifest.json: expected a folder that `nsa-hf convert`"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"format": 1, "trained": false}', "lacks exact_up_to, source, tensors"),
        (
            '{"format": 2, "hash": "crc99", "trained": false, "exact_up_to": 1, "source": {}, "tensors": {}}',
            "hashed with 'crc99', and this version knows xxh3_128, sha256: update nsa-hf",
        ),
        ('{"format": 99, "trained": false, "exact_up_to": 1, "source": {}, "tensors": {}}', "format 99.*update nsa-hf"),
    ],
)
def test_bad_manifests(tmp_path, text, message):
    if text is not None:
        (tmp_path / manifest.NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        manifest.read(tmp_path)


def test_a_sparse_model_may_have_none(converted, tiny_dense_dir, tmp_path):
    assert manifest.find(converted) == manifest.read(converted)
    folder = Path(shutil.copytree(converted, tmp_path / "out"))
    (folder / manifest.NAME).unlink()
    assert manifest.find(folder) is None
    with pytest.raises(CheckpointError, match="holds a dense model"):
        manifest.find(tiny_dense_dir)
    with pytest.raises(CheckpointError, match=r"has no manifest\.json: expected a folder that `nsa-hf convert`"):
        manifest.find(tmp_path)


def test_write_and_read_back(tmp_path):
    record = {"format": 1, "trained": True, "exact_up_to": 4, "source": {"name": "é"}, "tensors": {}}
    manifest.write(tmp_path, record)
    assert manifest.read(tmp_path) == record == json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
