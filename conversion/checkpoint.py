"""A folder of safetensors files, one or several with an index: what it holds, checked, and its tensors one at a time.

Nothing is loaded to open one: shapes and dtypes come from the files' headers, and `tensors` keeps one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
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


class CheckpointError(NsaError):
    """A checkpoint that is missing, damaged or not what it says it is."""


class TensorInfo(NamedTuple):
    """What a file's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsCheckpoint:
    """The weights of a folder.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names, or files with other
            names and no index, which then must not share a tensor.

    Attributes:
        files: the weight files and the index, if any.
        table: name to TensorInfo, in the files' order.

    Raises:
        CheckpointError: no weights, a missing or damaged file, or an index that disagrees with the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.table: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        expected = self._weight_map()
        shards = sorted({*expected.values()}) if expected else self._loose_files()
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
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not weight_map or any(Path(name).name != name for name in weight_map.values()):
                raise ValueError("its weight_map must give each tensor's file in this folder")
            return dict(weight_map)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not an index of safetensors files ({error!r}): download it again"
            ) from error

    def _loose_files(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if names:
            if any("-of-" in name for name in names):
                raise CheckpointError(f"{self.folder} has shards but no {INDEX}: download it again")
            return names
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder} has its weights as pickle ({pickles[0]}), which can run code when loaded: expected "
                "safetensors; load the model with Transformers and save it again with save_pretrained"
            )
        raise CheckpointError(f"{self.folder} holds no weights: expected {SINGLE}, {INDEX} or a .gguf file")

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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits (NaN equal to itself, -0 unlike 0)."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a CPU tensor's bytes in row-major order, as they stand in a safetensors file."""
    return hashlib.sha256(_bytes(tensor).numpy().data).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
