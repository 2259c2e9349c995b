"""conversion/files/shards.py: files as Transformers and safetensors have them, written in pieces."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_hf.conversion.files import pieces
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.hashes import hash_tensor
from nsa_hf.conversion.files.pieces import TensorInfo, pieces_of, same_bits
from nsa_hf.conversion.files.shards import ShardWriter, file_header
from nsa_hf.errors import NsaError

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.arange(5000, dtype=torch.float32).reshape(50, 100),
    "c": torch.tensor(7),
    "d": torch.zeros(0, 4),
    "é": torch.tensor([True, False, True]),
}


def table_of(tensors):
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write(folder, tensors, size="2GB", order=None, on_file=lambda name: None):
    with ShardWriter(folder, table_of(tensors), size, on_file) as writer:
        for name in order or tensors:
            for piece in pieces_of(name, tensors[name]):
                writer.put(name, piece.start, piece.values)
        writer.finish()
    return writer


@pytest.mark.parametrize("piece", [64, 1000, 8 << 20])
@pytest.mark.parametrize("size", ["2GB", 30, 20_003])
@pytest.mark.parametrize("order", [list(TENSORS), list(TENSORS)[::-1]])
def test_what_is_written_is_read_back_whatever_the_pieces_shards_and_order(tmp_path, monkeypatch, piece, size, order):
    monkeypatch.setattr(pieces, "PIECE", piece)
    writer = write(tmp_path, TENSORS, size, order)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.table == table_of(TENSORS)
    assert (len(checkpoint.files) > 1) == (size != "2GB")
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert same_bits(tensor, TENSORS[name])
    for name, tensor in TENSORS.items():
        assert writer.hashes[name] == hash_tensor(tensor)
        assert same_bits(checkpoint.read(name), tensor)
    # and the same in pieces
    read = {name: [] for name in TENSORS}
    for part in checkpoint.pieces(TENSORS):
        assert part.start == sum(map(len, read[part.name]))
        read[part.name].append(part.values.clone())
        assert part.last == (sum(map(len, read[part.name])) == TENSORS[part.name].numel())
    assert all(same_bits(torch.cat(parts).reshape(TENSORS[name].shape), TENSORS[name]) for name, parts in read.items())


def test_a_file_is_the_one_that_safetensors_itself_writes(tmp_path):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name in "abc"}
    write(tmp_path, tensors)
    save_file(tensors, tmp_path / "own.safetensors", metadata={"format": "pt"})
    mine, own = (SafetensorsCheckpoint(tmp_path, only=file) for file in ("model.safetensors", "own.safetensors"))
    assert (mine.begin, list(mine.table)) == (own.begin, list(own.table))


def test_every_tensor_is_aligned_to_its_dtype():
    header, begin = file_header(table_of(TENSORS))
    assert len(header) % 8 == 0
    assert all(begin[name] % tensor.dtype.itemsize == 0 for name, tensor in TENSORS.items())
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt"}


def test_files_are_reported_as_they_complete_and_closed(tmp_path):
    seen = []

    def on_file(file):
        seen.append(file)
        assert all(same_bits(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / file).items())

    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path, TENSORS, 30, on_file=on_file)
    assert seen == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_of_an_earlier_process_is_adopted_if_it_is_sound(tmp_path):
    first = write(tmp_path, TENSORS, 30)
    files = {
        file: {name: first.hashes[name] for name in names} for file, names in first.split.filename_to_tensors.items()
    }
    with ShardWriter(tmp_path, table_of(TENSORS), 30) as writer:
        assert writer.bytes_to_come == sum(info.nbytes for info in table_of(TENSORS).values())
        assert all(writer.adopt(file, hashes) for file, hashes in files.items())
        assert (writer.bytes_to_come, writer.hashes) == (0, first.hashes)
        assert not any(map(writer.is_needed, TENSORS))
        writer.finish()


@pytest.mark.parametrize("damage", ["flip", "short", "longer", "header", "gone", "other", "hash", "fewer"])
def test_a_file_that_is_not_sound_is_not_adopted(tmp_path, damage):
    written = write(tmp_path, TENSORS)
    path, hashes = tmp_path / "model.safetensors", dict(written.hashes)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    elif damage == "header":
        data[9] ^= 1
    elif damage == "short":
        data = data[:-1]
    elif damage == "longer":
        data += b"x"
    elif damage == "hash":
        hashes["a"] = "0" * 32
    elif damage == "fewer":
        del hashes["a"]
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    if damage == "other":
        save_file({**TENSORS, "a": TENSORS["a"] + 1}, path)
    with ShardWriter(tmp_path, table_of(TENSORS), "2GB") as writer:
        assert not writer.adopt("model.safetensors", hashes)
        assert all(map(writer.is_needed, TENSORS)) and writer.hashes == {}


def test_a_source_that_shrinks_while_it_is_read_is_named(tmp_path):
    write(tmp_path, TENSORS)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(NsaError, match=r"model.safetensors ends early: it changed while it was being read"):
        list(checkpoint.pieces(TENSORS))


@pytest.mark.parametrize("size", ["many", "5 apples"])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(NsaError, match="max_shard_size must be"):
        ShardWriter(tmp_path, table_of(TENSORS), size)
