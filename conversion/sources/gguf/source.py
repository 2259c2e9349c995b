"""A .gguf file as a dense model, loaded and dequantised by Transformers, always in float32.

A quantised weight is scale * integer + offset, computed in float32; bfloat16 would change two of three values of
SmolLM2's Q4_1 file. Only in float32 is the converted model bit for bit the one that Transformers loads from that
file; `convert(..., dtype="bfloat16")` rounds deliberately.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel

from nsa_hf.errors import NsaError

from ...files.loading import load_whole, reading
from ...files.model_folder import TERMS, copy_file
from ...files.pieces import TensorInfo
from ..source import Source
from .config import completed_config
from .contents import read_contents
from .tensors import check_tensors, read_tensors

# Words, names, numbers, code and letters with accents: what a tokenizer takes apart in different ways.
SAMPLE = "The quick brown fox: SPDX-License-Identifier (GPL-2.0+)\n\tdef über(x): return 12345  # naïve façade"


class GgufSource(Source):
    """One .gguf file, loaded and dequantised by Transformers; its weights are read once, when first needed.

    Args:
        name: as the user gave it.
        path: of the file.
        revision: the Hub's commit, or None for local files.

    Attributes:
        contents: what the file holds.

    Raises:
        NsaError: a package is missing, or the file is damaged or holds something that is not converted.
    """

    kind = "gguf"

    def __init__(self, name: str, path: Path, revision: str | None):
        missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
        if missing:
            raise NsaError(f"reading {path.name} needs {' and '.join(missing)}: pip install 'nsa-hf[demo]'")
        self.path = path
        with reading(path):
            self.contents = read_contents(path)
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            if hasattr(config, "_model_name_or_path"):
                del config._model_name_or_path
            config = completed_config(self.contents, config)
            check_tensors(self.contents, config)
        config.dtype = torch.float32
        self._model: PreTrainedModel | None = None
        super().__init__(name, path.parent, config, revision)

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            with reading(self.path):
                self._model = load_whole(
                    self.folder,
                    gguf_file=self.path.name,
                    config=self.config,
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=torch.float32,
                    attn_implementation="sdpa",
                )
        return self._model

    @property
    def table(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        model = self._loaded()
        persistent = model.state_dict()
        # named_parameters gives a tied weight once
        yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
        yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """As in Source: read with the `gguf` package, where `tensors` are what Transformers loads."""
        with reading(self.path):
            yield from read_tensors(self.contents, self.config)

    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """As in Source; hands over the loaded weights, so that there is one copy of them."""
        model, self._model = self._loaded(), None
        return model.to(dtype)

    def save_companions(self, out: Path) -> list[str]:
        before = {*out.rglob("*")}
        with reading(self.path):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, gguf_file=self.path.name)
            for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
                index = self.contents.metadata.get(f"tokenizer.ggml.{key}_token_id")
                # Transformers 5.17 guesses these; 5.23 takes them from the file
                if index is not None and getattr(tokenizer, f"{role}_token_id") != index:
                    setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(index))
            if named := self.contents.chat_templates():
                first = {"default": tokenizer.chat_template} if tokenizer.chat_template else {}
                tokenizer.chat_template = first | named
            tokenizer.save_pretrained(out)
        if not saved_alike(tokenizer, out):
            raise NsaError(
                f"{self.path}: Transformers {transformers.__version__} saves another tokenizer than it reads from the "
                "file (5.17 loses the merges of Gemma's): pip install -U transformers"
            )
        generation = GenerationConfig.from_model_config(self.config)
        generation.eos_token_id = self.contents.text_ends(self.config)
        generation.save_pretrained(out)
        for pattern in TERMS:
            for path in self.folder.glob(pattern):
                copy_file(self.folder, path.name, out)
        return sorted(path.relative_to(out).as_posix() for path in {*out.rglob("*")} - before if path.is_file())

    def files(self) -> list[Path]:
        return [self.path]

    def card(self) -> dict[str, Any]:
        metadata = self.contents.metadata
        names = {"license": "general.license", "model_name": "general.name"}
        return {name: metadata[key] for name, key in names.items() if isinstance(metadata.get(key), str)}


def saved_alike(tokenizer: Any, folder: Path) -> bool:
    """Whether a tokenizer that was saved takes a text apart as it did before.

    Args:
        tokenizer: as it was before.
        folder: where it was saved.
    """
    saved = type(tokenizer).from_pretrained(folder)
    return bool(saved(SAMPLE)["input_ids"] == tokenizer(SAMPLE)["input_ids"])
