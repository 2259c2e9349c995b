"""Where a dense model comes from: a folder of safetensors, a folder with a .gguf file (or that file), or a Hub id.

    source = open_source("path/or/id")
    source.config                        # the dense family's config
    for name, tensor in source.tensors(): ...
    source.load_model(torch.float32)     # Transformers' own dense model
    source.save_companions(out)          # tokenizer, chat template, generation config

Values are carried as Transformers loads them: a safetensors tensor in the dtype it is stored in, a GGUF file in float32
(gguf_source.py says why).
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.repocard import metadata_load
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from yaml import YAMLError

from .checkpoint import CheckpointError, SafetensorsCheckpoint, TensorInfo, file_sha256
from .hub import download
from .loading import load_whole, reading, transformers_progress

__all__ = ["COMPANIONS", "SafetensorsSource", "Source", "open_source", "transformers_progress"]

# What travels with a model beside config and weights, copied as it is. Licenses must travel.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
NEVER_COPIED = (".py", ".bin", ".pt", ".pth", ".safetensors", ".gguf")


class Source(ABC):
    """A dense model that can be converted.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        config: the dense family's config, its `dtype` set to that of the weights.
        revision: the Hub's commit, or None for local files.
    """

    kind: str

    def __init__(self, name: str, folder: Path, config: PreTrainedConfig, revision: str | None):
        self.name, self.folder, self.config, self.revision = name, folder, config, revision
        quantization = getattr(config, "quantization_config", None)
        if quantization:
            raise CheckpointError(
                f"{name} is quantised ({quantization}): expected plain weights, so dequantise it first"
            )

    @property
    @abstractmethod
    def table(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every stored tensor by name."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as (name, CPU tensor), in the order of `table`."""

    @abstractmethod
    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Transformers' dense model of these weights on the CPU, in evaluation mode, with SDPA attention."""

    @abstractmethod
    def save_companions(self, out: Path) -> list[str]:
        """Writes tokenizer, chat template and generation config into `out`, where there are any; gives their names."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that the conversion reads."""

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """What the source says of itself, where it does: `license`, `model_name`."""

    def identity(self) -> dict:
        """Name, kind, revision, what the source says of itself, and size and sha256 of each file; reads them whole."""
        files = {
            path.relative_to(self.folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(self.files())
        }
        return {"name": self.name, "kind": self.kind, "revision": self.revision, **self.card(), "files": files}


class SafetensorsSource(Source):
    """A folder in Transformers' own layout."""

    kind = "safetensors"

    def __init__(self, name: str, folder: Path, revision: str | None, weights: bool = True):
        with reading(folder / "config.json"):
            data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if not data.get("model_type"):
                raise ValueError("it names no model_type")
            config = AutoConfig.from_pretrained(folder)
        super().__init__(name, folder, config, revision)
        self.has_weights = weights
        if weights:
            self.checkpoint = SafetensorsCheckpoint(folder)
        if config.dtype is None:
            # as Transformers' dtype="auto" has it
            floating = (info.dtype for info in self.table.values() if info.dtype.is_floating_point) if weights else ()
            config.dtype = next(iter(floating), torch.float32)

    @property
    def table(self) -> dict[str, TensorInfo]:
        return self.checkpoint.table

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        with reading(self.folder):
            yield from self.checkpoint.tensors()

    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        with reading(self.folder):
            return load_whole(self.folder, dtype=dtype, attn_implementation="sdpa")

    def _companions(self) -> list[Path]:
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.suffix not in NEVER_COPIED)

    def save_companions(self, out: Path) -> list[str]:
        names = [path.relative_to(self.folder) for path in self._companions()]
        for name in names:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / name, out / name)
        return [name.as_posix() for name in names]

    def files(self) -> list[Path]:
        return [self.folder / "config.json", *self.checkpoint.files, *self._companions()]

    def card(self) -> dict[str, Any]:
        path = self.folder / "README.md"
        try:
            about = (metadata_load(path) if path.is_file() else None) or {}
        except (ValueError, YAMLError):  # a card that cannot be read says nothing
            return {}
        return {"license": about["license"]} if isinstance(about.get("license"), str) else {}


def open_source(src: str | Path, revision: str | None = None, weights: bool = True) -> Source:
    """Opens a dense model.

    Args:
        src: a local folder, a .gguf file, or a Hub id (`owner/name`), which is downloaded into the Hub's cache.
        revision: branch, tag or commit of a Hub id.
        weights: False downloads no weights of a Hub id; only `config` is then good for anything.

    Raises:
        CheckpointError: it is not there, damaged, or of a kind that is not read.
    """
    from .gguf_source import GgufSource

    path = Path(src).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return GgufSource(str(src), path, None)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{src} is a file: expected a model's folder, a .gguf file or a Hub id")
    commit = None
    if not path.exists():
        path, commit = download(str(src), revision, weights)
    files = sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").is_file():
        if len(files) > 1:
            raise CheckpointError(
                f"{src} holds {len(files)} .gguf files: name one, {' or '.join(f.name for f in files)}"
            )
        return GgufSource(str(src), files[0], commit)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{src} has neither config.json nor a .gguf file: expected a model's folder (of a Hub "
            "repository of .gguf files, download the one you want and give its path)"
        )
    return SafetensorsSource(str(src), path, commit, weights=weights or commit is None)
