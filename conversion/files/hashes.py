"""Hashes of tensors and of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from .pieces import PIECE, byte_view

# What tensors are hashed with, and what earlier versions did: sha256 of 16 GB takes longer than copying them. xxh3_128
# finds whatever happens by accident; it is not made to withstand somebody who forges weights.
HASH = "xxh3_128"
HASHES: dict[str, Callable[[], Any]] = {HASH: xxhash.xxh3_128, "sha256": hashlib.sha256}


def hash_tensor(tensor: Tensor, kind: str = HASH) -> str:
    """The hash of a CPU tensor's bytes in row-major order, as they stand in a safetensors file.

    Args:
        tensor: of any shape and dtype.
        kind: one of HASHES.
    """
    digest = HASHES[kind]()
    digest.update(byte_view(tensor).numpy().data)
    return str(digest.hexdigest())


def hash_parts(parts: Iterable[bytes]) -> str:
    """The hash of bytes that come one run after another, with its name before it: "xxh3_128:1f..."."""
    digest = HASHES[HASH]()
    for part in parts:
        digest.update(part)
    return f"{HASH}:{digest.hexdigest()}"


def hash_file(path: Path) -> str:
    """`hash_parts` of a file's bytes."""
    with path.open("rb") as file:
        return hash_parts(iter(lambda: file.read(PIECE), b""))


def describe_file(path: Path, *, whole: bool = False) -> dict[str, Any]:
    """What a manifest says of a file: `bytes`, its size, and `sha256` of them.

    Of a safetensors file `header_sha256` stands in place of `sha256`: the header says what is where, and the tensors
    have hashes of their own, so that nothing is hashed twice.

    Args:
        path: of the file.
        whole: also of a safetensors file `sha256`, where its tensors have no hashes.
    """
    with path.open("rb") as file:
        if whole or path.suffix != ".safetensors":
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        size = file.read(8)
        # a damaged file may say any size
        header = size + file.read(min(int.from_bytes(size, "little"), path.stat().st_size))
        return {"bytes": path.stat().st_size, "header_sha256": hashlib.sha256(header).hexdigest()}
