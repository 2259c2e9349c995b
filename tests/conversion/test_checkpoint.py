"""conversion/files/checkpoint.py: safetensors folders, good and bad."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nsa_hf.conversion.files.checkpoint import INDEX, SafetensorsCheckpoint
from nsa_hf.conversion.files.hashes import describe_file
from nsa_hf.conversion.files.pieces import BUFFERS, TensorInfo, same_bits
from nsa_hf.errors import NsaError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7),
}


def sharded(folder: Path) -> Path:
    """Two shards with an index: a and b in the first, c in the second."""
    folder.mkdir(exist_ok=True)
    save_file({name: TENSORS[name] for name in "ab"}, folder / "one.safetensors")
    save_file({"c": TENSORS["c"]}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_every_tensor_as_stored(tmp_path, layout):
    if layout == "single":
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        sharded(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.table == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    streamed = dict(checkpoint.tensors())
    assert list(streamed) == list(checkpoint.table)
    for name, tensor in TENSORS.items():
        assert same_bits(streamed[name], tensor)
        assert same_bits(checkpoint.read(name), tensor)
    assert {path.name for path in checkpoint.files} == {path.name for path in tmp_path.iterdir()}
    assert checkpoint.table["b"].nbytes == 24


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: [path.unlink() for path in d.iterdir()], "holds no weights"),
        (lambda d: [(path.unlink(), (d / "pytorch_model.bin").write_bytes(b"x")) for path in d.iterdir()], "pickle"),
        (lambda d: (d / "two.safetensors").unlink(), "lacks two.safetensors"),
        (lambda d: truncate(d / "two.safetensors"), "two.safetensors is damaged or incomplete"),
        (lambda d: (d / "one.safetensors").write_bytes(b"version https://git-lfs"), "one.safetensors is damaged"),
        (lambda d: (d / "one.safetensors").write_bytes(b""), "one.safetensors is damaged"),
        (lambda d: (d / INDEX).write_text("{"), "not an index"),
        (lambda d: (d / INDEX).write_text("{}"), "not an index"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "not an index"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}'), "not an index"),
        (lambda d: edit_index(d, a="two.safetensors"), "disagrees.*a should be in two.safetensors"),
        (lambda d: edit_index(d, x="two.safetensors"), "disagrees.*x should be in two.safetensors and is in none"),
        (lambda d: save_file(TENSORS, d / "two.safetensors"), "is in both one.safetensors and two.safetensors"),
        (lambda d: (d / INDEX).unlink(), "one.safetensors, two.safetensors, which .* save the model with"),
        (lambda d: ((d / INDEX).unlink(), (d / "two.safetensors").unlink()), "one.safetensors, which .* rename it to"),
        (
            lambda d: (d / INDEX).unlink() or (d / "one.safetensors").rename(d / "model-00001-of-00002.safetensors"),
            "has shards but no",
        ),
    ],
)
def test_bad_folders_are_refused_by_what_is_wrong(tmp_path, spoil, message):
    spoil(sharded(tmp_path))
    with pytest.raises(NsaError, match=message):
        SafetensorsCheckpoint(tmp_path)


def test_unknown_dtypes_are_named(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(NsaError, match="a has dtype C64"):
        SafetensorsCheckpoint(tmp_path)


def test_a_piece_stays_as_it_is_while_it_is_in_hand_or_something_still_reads_it(tmp_path, monkeypatch):
    """Others are read ahead meanwhile, in another thread."""
    monkeypatch.setattr("nsa_hf.conversion.files.pieces.PIECE", 1024)
    tensor = torch.arange(10 * BUFFERS * 256, dtype=torch.int32)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    pieces = SafetensorsCheckpoint(tmp_path).pieces({"a"})
    reading: Future[None] = Future()
    first = next(pieces)
    first.uses.append(reading)
    try:
        for piece in (first, *(next(pieces) for _ in range(BUFFERS - 1))):
            assert torch.equal(piece.values, tensor[piece.start : piece.start + 256])
        time.sleep(0.05)  # as long as the other thread wants to read on
        assert torch.equal(first.values, tensor[:256])
    finally:
        reading.set_result(None)
    for piece in pieces:
        time.sleep(0.002)
        assert torch.equal(piece.values, tensor[piece.start : piece.start + 256])


@pytest.mark.parametrize("size", [10**8, 2**63, 2**64 - 1])
def test_a_header_that_says_it_is_huge_is_not_made_room_for(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b"{}")
    with pytest.raises(NsaError, match="is damaged"):
        SafetensorsCheckpoint(tmp_path)
    assert describe_file(path)["bytes"] == 10
