"""conversion/manifest.py"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from nsa_hf.conversion import convert, manifest
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.hashes import hash_tensor
from nsa_hf.errors import NsaError


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
        **tiny_sizes,
        "nsa_gate_dim": 8,
        "dtype": None,
        "max_shard_size": "2GB",
        "seed": 0,
    }
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
    with pytest.raises(NsaError, match=message):
        manifest.read(tmp_path)


def test_a_sparse_model_may_have_none(converted, tiny_dense_dir, tmp_path):
    assert manifest.find(converted) == manifest.read(converted)
    folder = Path(shutil.copytree(converted, tmp_path / "out"))
    (folder / manifest.NAME).unlink()
    assert manifest.find(folder) is None
    with pytest.raises(NsaError, match="holds a dense model"):
        manifest.find(tiny_dense_dir)
    with pytest.raises(NsaError, match=r"has no manifest\.json: expected a folder that `nsa-hf convert`"):
        manifest.find(tmp_path)


def changed(part: dict, place: list[str], value) -> dict:
    """A copy of JSON with another value at one place; the first of a table where the place says "*"."""
    name = next(iter(part)) if place[0] == "*" else place[0]
    return {**part, name: changed(part[name], place[1:], value) if place[1:] else value}


PLACES = [
    "format",
    "hash",
    "trained",
    "exact_up_to",
    "model_type",
    "options",
    "choices",
    "choices.*",
    "choices.*.what",
    "choices.*.given",
    "versions",
    "companions",
    "files",
    "files.*",
    "files.*.bytes",
    "files.*.sha256",
    "tensors",
    "tensors.*",
    "tensors.*.dtype",
    "tensors.*.shape",
    "tensors.*.from",
    "tensors.*.xxh3_128",
    "tensors.*.source",
    "source",
    "source.name",
    "source.kind",
    "source.revision",
    "source.files",
    "source.files.*",
    "source.left_out",
    "source.left_out.*",
    "source.license",
]


@pytest.mark.parametrize("value", [None, [], {}, 7, True, 1.5, "x", [[]]])
@pytest.mark.parametrize("place", PLACES)
def test_fields_of_wrong_types_are_named(converted, tiny_dense_dir, tmp_path, place, value):
    """Each is what its readers expect, or refused; none is a traceback."""
    record = manifest.read(converted)
    entry = next(iter(record["tensors"].values()))
    record["source"] |= {"license": "mit", "left_out": {"copy": entry}}
    before = record
    for name in place.split("."):
        before = next(iter(before.values())) if name == "*" else before.get(name, entry)
    allowed = {"exact_up_to": (int, type(None)), "source.revision": (str, type(None))}.get(place, (type(before),))
    (tmp_path / manifest.NAME).write_text(json.dumps(changed(record, place.split("."), value)))
    if type(value) in allowed and not isinstance(value, dict):
        # of the type, and perhaps unknown
        with suppress(NsaError):
            manifest.read(tmp_path)
    elif value == {} and isinstance(before, dict) and not place.endswith("*") and place != "source":
        if place != "tensors.*.source":
            manifest.read(tmp_path)
    else:
        with pytest.raises(NsaError, match=r"is damaged \(.*(must be|lacks)"):
            manifest.read(tmp_path)


@pytest.mark.parametrize("scaling", [{"rope_type": "zz", "factor": 2}, {"rope_type": "yarn", "factor": 1e308}, {}, "x"])
def test_a_scaling_that_is_none_is_named(converted, tmp_path, scaling):
    record = manifest.read(converted)
    options = {**record["options"], "rope_scaling": scaling or {"rope_type": "yarn"}}
    (tmp_path / manifest.NAME).write_text(json.dumps({**record, "options": options}))
    with pytest.raises(NsaError, match=r"is damaged \(.*rope_scaling must be"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["[" * 5000, '{"a": ' * 5000 + "1" + "}" * 5000, '{"format": %s}' % ("9" * 5000)])
def test_depth_and_length_are_no_traceback(tmp_path, text):
    (tmp_path / manifest.NAME).write_text(text)
    with pytest.raises(NsaError, match="is damaged"):
        manifest.read(tmp_path)


def test_write_and_read_back(tmp_path):
    record = {"format": 1, "trained": True, "exact_up_to": 4, "source": {"name": "é"}, "tensors": {}}
    manifest.write(tmp_path, record)
    assert manifest.read(tmp_path) == record == json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
