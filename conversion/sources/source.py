"""What every source of a dense model gives: config, tensors one at a time, Transformers' model, companion files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..files.hashes import describe_file
from ..files.loading import refuse_quantised
from ..files.pieces import Piece, TensorInfo, pieces_of


class Source(ABC):
    """A dense model that can be converted.

    Attributes:
        kind: safetensors, pickle or gguf.
        name: as the user gave it.
        folder: where its files are.
        config: the dense family's config, its `dtype` set to that of the weights.
        revision: the Hub's commit, or None for local files.

    Raises:
        NsaError: the model is quantised.
    """

    kind: str

    def __init__(self, name: str, folder: Path, config: PreTrainedConfig, revision: str | None):
        self.name, self.folder, self.config, self.revision = name, folder, config, revision
        refuse_quantised(name, config)

    @property
    @abstractmethod
    def table(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every stored tensor by name."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as (name, CPU tensor), in the order of `table`."""

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`, but read from the file itself where `tensors` are what a loader made of it."""
        return self.tensors()

    def pieces(self, wanted: Container[str]) -> Iterator[Piece]:
        """Some of the tensors in pieces, in the order of `table`.

        Args:
            wanted: names of the tensors.
        """
        for name, tensor in self.tensors():
            if name in wanted:
                yield from pieces_of(name, tensor)

    @abstractmethod
    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Transformers' dense model of these weights on the CPU, in evaluation mode, with SDPA attention."""

    @abstractmethod
    def save_companions(self, out: Path) -> list[str]:
        """Writes tokenizer, chat template, generation config and license files, where there are any.

        Args:
            out: the converted model's folder.

        Returns:
            The names of the files that were written.
        """

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that the conversion reads."""

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """`license` and `model_name`, those of them that the source names."""

    def identity(self) -> dict:
        """What a manifest says of its source: name, kind, revision, `card`, and `describe_file` of each file."""
        files = {path.relative_to(self.folder).as_posix(): describe_file(path) for path in sorted(self.files())}
        return {"name": self.name, "kind": self.kind, "revision": self.revision, **self.card(), "files": files}
