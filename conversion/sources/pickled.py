"""A folder of weights as PyTorch pickles (`pytorch_model.bin`), which are read only where that is allowed.

A pickle is a program. It is read with `weights_only`, which builds tensors and refuses whatever else it asks for.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nsa_hf.errors import NsaError

from ..files.checkpoint import DTYPES
from ..files.pieces import Piece, TensorInfo, pieces_of
from ..files.plain_json import read_json

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PickleCheckpoint:
    """The pickled weights of a folder, with the attributes and methods of `SafetensorsCheckpoint` that sources need.

    Args:
        folder: holds `pytorch_model.bin`, or `pytorch_model.bin.index.json` and the files it names.

    Raises:
        NsaError: no weights, a missing or damaged file, one that holds more than tensors, or an index that
            disagrees with the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.table: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        expected: dict[str, str] = {}
        if not (folder / SINGLE).is_file():
            if not (folder / INDEX).is_file():
                raise NsaError(f"{folder} holds no weights: expected safetensors, {SINGLE} or {INDEX}")
            try:
                expected = dict(read_json(folder / INDEX)["weight_map"])
                if not expected or not all(isinstance(name, str) for name in expected.values()):
                    raise ValueError("its weight_map must give each tensor's file in this folder")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise NsaError(f"{folder / INDEX} is not an index of weights ({error!r}): download it again") from error
        paths = [folder / name for name in sorted({*expected.values()} or {SINGLE})]
        self.files = [*paths, folder / INDEX] if expected else paths
        for path in paths:
            if path.parent != folder or not path.is_file():
                raise NsaError(f"{folder} lacks {path.name}, which its index names: download it again")
            for name, tensor in self._load(path).items():
                if name in self.table:
                    raise NsaError(f"{name} is in both {self.file_of[name].name} and {path.name}: keep one")
                self.table[name], self.file_of[name] = TensorInfo(tuple(tensor.shape), tensor.dtype), path
        wrong = sorted(name for name in expected if self.file_of.get(name) != folder / expected[name])
        wrong += sorted(self.table.keys() - expected.keys()) if expected else []
        if wrong:
            raise NsaError(
                f"{folder / INDEX} disagrees with the files on {len(wrong)} tensors: {wrong[0]} should be in "
                f"{expected.get(wrong[0], 'none')}"
            )

    def _load(self, path: Path) -> dict[str, Tensor]:
        """A file's tensors by name; where the format allows it, their bytes are read only when they are used.

        Raises:
            NsaError: the file is damaged, or holds more than tensors.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise NsaError(
                f"{path} holds more than tensors, or is damaged, and is not loaded: save the weights as safetensors"
            ) from error
        except Exception as error:  # torch has no common error for files that are damaged
            raise NsaError(f"{path} is damaged or incomplete ({error!r:.200}): download it again") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise NsaError(f"{path} is no state dict: expected a dict of tensors by name")
        for name, tensor in state.items():
            if tensor.dtype not in DTYPES.values():
                raise NsaError(f"{path}: {name} has dtype {tensor.dtype}, which is not read")
        return state

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as (name, tensor), in the order of `table`."""
        for path in dict.fromkeys(self.file_of.values()):
            yield from self._load(path).items()

    def pieces(self, wanted: Container[str]) -> Iterator[Piece]:
        """Some of the tensors in pieces, see `SafetensorsCheckpoint.pieces`."""
        for name, tensor in self.tensors():
            if name in wanted:
                yield from pieces_of(name, tensor)
