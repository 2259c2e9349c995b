"""conversion/files/hashes.py: hashes are those of the bytes."""

from __future__ import annotations

import hashlib

import torch
import xxhash
from safetensors.torch import save_file

from nsa_hf.conversion.files.hashes import describe_file, hash_tensor


def test_hashes_are_those_of_the_bytes(tmp_path):
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert hash_tensor(tensor) == xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest()
    assert hash_tensor(tensor.T) == xxhash.xxh3_128(tensor.numpy().T.copy().tobytes()).hexdigest()
    assert hash_tensor(tensor, "sha256") == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    (tmp_path / "f").write_bytes(b"abc")
    assert describe_file(tmp_path / "f") == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    save_file({"a": tensor}, tmp_path / "f.safetensors")
    data = (tmp_path / "f.safetensors").read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert describe_file(tmp_path / "f.safetensors") == {
        "bytes": len(data),
        "header_sha256": hashlib.sha256(header).hexdigest(),
    }
