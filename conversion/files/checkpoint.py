"""A folder of safetensors files, one or several with an index: what it holds, checked, and its tensors one at a time.

Nothing is loaded to open one: shapes and dtypes come from the files' headers. `tensors` gives one tensor at a time, and
`pieces` a few megabytes at a time, whatever the size of a tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsa_hf.errors import NsaError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# The safetensors format's names of dtypes that a dense checkpoint can hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# Bytes read at a time, and how many such buffers are on their way: together they bound what streaming keeps in memory.
# Smaller ones cost more time in Python, where threads wait for each other.
PIECE, BUFFERS = 8 << 20, 8
# How many of them are read before they are asked for; with the one in hand, fewer than there are buffers.
AHEAD = 4
# Bytes of one call that has Linux fetch from the disk; of a longer one it takes a part only.
FETCH = 512 << 10


# What tensors are hashed with, and what earlier versions did: sha256 of 16 GB takes longer than copying them. xxh3_128
# finds whatever happens by accident; it is not made to withstand somebody who forges weights.
HASH = "xxh3_128"
HASHES: dict[str, Callable[[], Any]] = {HASH: xxhash.xxh3_128, "sha256": hashlib.sha256}


class CheckpointError(NsaError):
    """A checkpoint that is missing, damaged or not what it says it is."""


class TensorInfo(NamedTuple):
    """What a file's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Piece:
    """A part of a tensor on its way.

    Attributes:
        name: of the tensor.
        start: index of the first value, counted in the flattened tensor.
        values: `[n]`, a run of the flattened tensor, dtype as stored.
        last: whether the tensor ends here.
        uses: what still reads `values` in other threads; only when all are done is the buffer filled anew.
    """

    name: str
    start: int
    values: Tensor
    last: bool
    uses: list[Future] = field(default_factory=list)


def pieces_of(name: str, tensor: Tensor) -> Iterator[Piece]:
    """A tensor that is in memory, cut up."""
    flat, step = tensor.detach().reshape(-1), PIECE // tensor.dtype.itemsize
    for start in range(0, max(1, len(flat)), step):
        yield Piece(name, start, flat[start : start + step], start + step >= len(flat))


class SafetensorsCheckpoint:
    """The weights of a folder.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.
        only: name of the one file to open, whatever else is there.

    Attributes:
        files: the weight files and the index, if any.
        table: name to TensorInfo, in the files' order.

    Raises:
        CheckpointError: no weights, or under names that Transformers does not load; a missing or damaged file, or an
            index that disagrees with the files.
    """

    def __init__(self, folder: Path, only: str | None = None):
        self.folder = folder
        self.table: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        self.begin: dict[str, int] = {}
        expected = self._weight_map() if only is None else {}
        shards = [only] if only else sorted({*expected.values()}) if expected else [self._single_file()]
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names: download it again")
        for name in shards:
            self._read_header(folder / name)
        self.files = [folder / name for name in shards] + ([folder / INDEX] if expected else [])
        if expected:
            self._check_index(expected)

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file() or not path.is_file():
            return {}
        try:
            weight_map = read_json(path)["weight_map"]
            if not weight_map or any(Path(name).name != name for name in weight_map.values()):
                raise ValueError("its weight_map must give each tensor's file in this folder")
            return dict(weight_map)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not an index of safetensors files ({error!r}): download it again"
            ) from error

    def _single_file(self) -> str:
        if (self.folder / SINGLE).is_file():
            return SINGLE
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if names:
            if any("-of-" in name for name in names):
                raise CheckpointError(f"{self.folder} has shards but no {INDEX}: download it again")
            how = f"rename it to {SINGLE}" if len(names) == 1 else "save the model with save_pretrained"
            raise CheckpointError(
                f"{self.folder} has its weights as {', '.join(names)}, which Transformers does not load: {how}"
            )
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder} has its weights as pickle ({pickles[0]}), which can run code when loaded: expected "
                "safetensors; give --allow-pickle to read the tensors in it and nothing else (weights_only)"
            )
        raise CheckpointError(
            f"{self.folder} holds no weights: expected {SINGLE}, {INDEX} or a .gguf file (of a Hub repository, pickles "
            "are downloaded with --allow-pickle only)"
        )

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.offset_keys():
                    view = file.get_slice(name)
                    dtype = view.get_dtype()
                    if dtype not in DTYPES:
                        raise CheckpointError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
                    if name in self.table:
                        raise CheckpointError(f"{name} is in both {self.file_of[name].name} and {path.name}: keep one")
                    self.table[name] = TensorInfo(tuple(view.get_shape()), DTYPES[dtype])
                    self.file_of[name] = path
            self.begin.update(tensor_positions(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or incomplete ({error}): download it again") from error

    def _check_index(self, expected: dict[str, str]) -> None:
        actual = {name: path.name for name, path in self.file_of.items()}
        wrong = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{self.folder / INDEX} disagrees with the files on {len(wrong)} tensors: {name} should be in "
                f"{expected.get(name, 'none')} and is in {actual.get(name, 'none')}"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored."""
        with safe_open(self.file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as (name, tensor), one at a time, in the order of `table`."""
        for path in dict.fromkeys(self.file_of.values()):
            with safe_open(path, framework="pt") as file:
                for name in file.offset_keys():
                    yield name, file.get_tensor(name)

    def pieces(self, wanted: Container[str]) -> Iterator[Piece]:
        """The tensors in `wanted`, in the order of `table`, each byte read once, AHEAD pieces ahead in another thread.

        Raises:
            CheckpointError: a file ends early.
        """
        pieces = self._pieces(wanted)
        with ThreadPoolExecutor(1, "read") as reader:
            ahead = deque(reader.submit(next, pieces, None) for _ in range(AHEAD))
            while piece := ahead.popleft().result():
                ahead.append(reader.submit(next, pieces, None))
                yield piece

    def _pieces(self, wanted: Container[str]) -> Iterator[Piece]:
        buffers = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(BUFFERS)]
        uses: list[list[Future]] = [[] for _ in range(BUFFERS)]
        turn = 0
        for path in dict.fromkeys(self.file_of.values()):
            parts = [
                (name, done, min(PIECE, info.nbytes - done))
                for name, info in self.table.items()
                if self.file_of[name] == path and name in wanted
                for done in range(0, max(1, info.nbytes), PIECE)
            ]
            with path.open("rb", buffering=0) as file:
                for number, (name, done, size) in enumerate(parts):
                    for later, start, length in parts[number + AHEAD : number + AHEAD + 1]:
                        _fetch(file, self.begin[later] + start, length)
                    turn = (turn + 1) % BUFFERS
                    wait(uses[turn])
                    uses[turn] = []
                    buffer, info = buffers[turn][:size], self.table[name]
                    file.seek(self.begin[name] + done)
                    _read_into(file, buffer, path)
                    last = done + size == info.nbytes
                    yield Piece(name, done // info.dtype.itemsize, buffer.view(info.dtype), last, uses[turn])


def tensor_positions(path: Path) -> dict[str, int]:
    """Byte at which each tensor of a safetensors file begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _fetch(file: io.RawIOBase, start: int, length: int) -> None:
    """Has the system bring a part of a file into its cache meanwhile, where a system can be asked to."""
    if hasattr(os, "posix_fadvise"):
        for at in range(start, start + length, FETCH):
            os.posix_fadvise(file.fileno(), at, min(FETCH, start + length - at), os.POSIX_FADV_WILLNEED)


def _read_into(file: io.RawIOBase, buffer: Tensor, path: Path) -> None:
    view = buffer.numpy().data
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{path} ends early: it changed while it was being read")
        view = view[count:]


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested deeper than any of ours or Transformers'.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits (NaN equal to itself, -0 unlike 0)."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(byte_view(a), byte_view(b))


def hash_tensor(tensor: Tensor, kind: str = HASH) -> str:
    """The hash, one of HASHES, of a CPU tensor's bytes in row-major order, as they stand in a safetensors file."""
    digest = HASHES[kind]()
    digest.update(byte_view(tensor).numpy().data)
    return str(digest.hexdigest())


def hash_parts(parts: Iterable[bytes]) -> str:
    """The hash of bytes that come in parts, with its name before it: "xxh3_128:1f...", as a training run notes it."""
    digest = HASHES[HASH]()
    for part in parts:
        digest.update(part)
    return f"{HASH}:{digest.hexdigest()}"


def hash_file(path: Path) -> str:
    """`hash_parts` of a file's bytes."""
    with path.open("rb") as file:
        return hash_parts(iter(lambda: file.read(PIECE), b""))


def describe_file(path: Path) -> dict[str, Any]:
    """A file's size, and sha256 of its bytes; of a safetensors file, `header_sha256` of its header.

    The header says what stands where, and the tensors have hashes of their own: nothing is hashed twice.
    """
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        size = file.read(8)
        # a damaged one may say anything
        header = size + file.read(min(int.from_bytes(size, "little"), path.stat().st_size))
        return {"bytes": path.stat().st_size, "header_sha256": hashlib.sha256(header).hexdigest()}


def byte_view(tensor: Tensor) -> Tensor:
    """`[bytes]` uint8: a CPU tensor's bytes in row-major order, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
