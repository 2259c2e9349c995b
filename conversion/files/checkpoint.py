"""A folder of safetensors files, one or several with an index: what it holds, checked, and its tensors one at a time.

Nothing is loaded to open one: shapes and dtypes come from the files' headers. `tensors` gives one tensor at a time, and
`pieces` a few megabytes at a time, whatever the size of a tensor.
"""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsa_hf.errors import NsaError

from .pieces import Buffers, Piece, TensorInfo, byte_ranges
from .plain_json import read_json

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

# Pieces that are read before they are asked for; with the one in hand, fewer than there are buffers.
AHEAD = 4
# Bytes of one call that asks Linux to fetch from the disk; of a longer range it fetches a part only.
FETCH = 512 << 10


class SafetensorsCheckpoint:
    """The weights of a folder.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.
        only: name of the one file to open, whatever else is there.

    Attributes:
        files: the weight files and the index, if any.
        table: shape and dtype of every tensor by name, in the files' order.
        file_of: each tensor's file, by the tensor's name.
        begin: the byte at which each tensor begins in its file, by name.

    Raises:
        NsaError: no weights, or under names that Transformers does not load; a missing or damaged file, or an
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
            raise NsaError(f"{folder} lacks {', '.join(missing)}, which its index names: download it again")
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
            raise NsaError(f"{path} is not an index of safetensors files ({error!r}): download it again") from error

    def _single_file(self) -> str:
        if (self.folder / SINGLE).is_file():
            return SINGLE
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if names:
            if any("-of-" in name for name in names):
                raise NsaError(f"{self.folder} has shards but no {INDEX}: download it again")
            how = f"rename it to {SINGLE}" if len(names) == 1 else "save the model with save_pretrained"
            raise NsaError(
                f"{self.folder} has its weights as {', '.join(names)}, which Transformers does not load: {how}"
            )
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickles:
            raise NsaError(
                f"{self.folder} has its weights as pickle ({pickles[0]}), which can run code when loaded: expected "
                "safetensors; give --allow-pickle to read the tensors in it and nothing else (weights_only)"
            )
        raise NsaError(
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
                        raise NsaError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
                    if name in self.table:
                        raise NsaError(f"{name} is in both {self.file_of[name].name} and {path.name}: keep one")
                    self.table[name] = TensorInfo(tuple(view.get_shape()), DTYPES[dtype])
                    self.file_of[name] = path
            self.begin.update(tensor_positions(path))
        except (SafetensorError, OSError) as error:
            raise NsaError(f"{path} is damaged or incomplete ({error}): download it again") from error

    def _check_index(self, expected: dict[str, str]) -> None:
        actual = {name: path.name for name, path in self.file_of.items()}
        wrong = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
        if wrong:
            name = wrong[0]
            raise NsaError(
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
        """Some of the tensors in pieces, in the order of `table`.

        Each byte is read once. Another thread reads AHEAD pieces ahead.

        Args:
            wanted: names of the tensors.

        Raises:
            NsaError: a file ends early.
        """
        pieces = self._read_pieces(wanted)
        with ThreadPoolExecutor(1, "read") as reader:
            ahead = deque(reader.submit(next, pieces, None) for _ in range(AHEAD))
            while piece := ahead.popleft().result():
                ahead.append(reader.submit(next, pieces, None))
                yield piece

    def _read_pieces(self, wanted: Container[str]) -> Iterator[Piece]:
        buffers = Buffers()
        for path in dict.fromkeys(self.file_of.values()):
            names = [name for name in self.table if self.file_of[name] == path and name in wanted]
            ranges = [(name, start, size) for name in names for start, size in byte_ranges(self.table[name].nbytes)]
            with path.open("rb", buffering=0) as file:
                for number, (name, start, size) in enumerate(ranges):
                    for later, later_start, later_size in ranges[number + AHEAD : number + AHEAD + 1]:
                        _fetch(file, self.begin[later] + later_start, later_size)
                    buffer, uses = buffers.next(size)
                    file.seek(self.begin[name] + start)
                    _read_into(file, buffer, path)
                    info = self.table[name]
                    values, last = buffer.view(info.dtype), start + size == info.nbytes
                    yield Piece(name, start // info.dtype.itemsize, values, last, uses)


def tensor_positions(path: Path) -> dict[str, int]:
    """The byte at which each tensor of a safetensors file begins, by name."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _fetch(file: io.RawIOBase, start: int, length: int) -> None:
    """Asks the system, where it can be asked, to bring bytes of a file into its cache in the background."""
    if hasattr(os, "posix_fadvise"):
        for position in range(start, start + length, FETCH):
            os.posix_fadvise(file.fileno(), position, min(FETCH, start + length - position), os.POSIX_FADV_WILLNEED)


def _read_into(file: io.RawIOBase, buffer: Tensor, path: Path) -> None:
    view = buffer.numpy().data
    while view:
        count = file.readinto(view)
        if not count:
            raise NsaError(f"{path} ends early: it changed while it was being read")
        view = view[count:]
