"""What a .gguf file holds, read with the `gguf` package: keys and tensors, no weights yet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.gguf import read_gguf_metadata

from nsa_hf.errors import NsaError

# Architectures whose keys and tensors are known here, and what a file has added to the weights of their norms.
NORM_OFFSET = {
    "llama": 0,
    "qwen2": 0,
    "qwen2moe": 0,
    "qwen3": 0,
    "qwen3moe": 0,
    "phi3": 0,
    "stablelm": 0,
    "starcoder2": 0,
    "lfm2": 0,
    "nemotron": 1,
    "gemma3": 1,
    "qwen35": 1,
    "qwen35moe": 1,
}
# Keys without which there is no model, and the two of which one is needed.
REQUIRED = {"block_count", "context_length", "embedding_length", "attention.head_count"}
EPSILONS = {"attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"}


@dataclass(frozen=True)
class GgufContents:
    """A file's contents.

    Attributes:
        path: of the file.
        architecture: llama.cpp's name of it.
        metadata: all that the header says of the model and its tokenizer, by name.
        keys: the architecture's metadata, without the prefix that names it.
        tensors: the `gguf` package's, by name; their data is read when it is asked for.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    keys: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def layers(self) -> int:
        """Blocks of the decoder; those that predict further tokens stand behind them and are not counted."""
        return int(self.keys["block_count"]) - int(self.keys.get("nextn_predict_layers", 0))

    def text_ends(self, config: PreTrainedConfig) -> int | list[int] | None:
        """The tokens that end a text, a turn or a message, where Transformers takes over the first only.

        Args:
            config: Transformers' of the file.

        Raises:
            NsaError: one is not in the vocabulary.
        """
        first = config.eos_token_id
        ends = [] if first is None else list(first) if isinstance(first, list) else [first]
        for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
            token = self.metadata.get(key)
            if token is None or token in ends:
                continue
            if not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise self.refusal(f"{key} is {str(token)[:60]}, and the vocabulary has {config.vocab_size} tokens")
            ends.append(token)
        return ends if len(ends) > 1 else first if not ends else ends[0]

    def chat_templates(self) -> dict[str, str]:
        """The chat templates that have a name, by name; Transformers reads the one without.

        Raises:
            NsaError: a name that no file can have.
        """
        prefix = "tokenizer.chat_template."
        templates = {key.removeprefix(prefix): text for key, text in self.metadata.items() if key.startswith(prefix)}
        for name, template in templates.items():
            if not re.fullmatch(r"[\w-]{1,100}", name, re.ASCII) or name == "default" or not isinstance(template, str):
                raise self.refusal(f"it holds a chat template {prefix}{name[:60]}")
        return templates

    def refusal(self, what: str) -> NsaError:
        """The error for something in the file that the converted model would leave out.

        Args:
            what: names it, such as "llama.expert_count is 8".
        """
        return NsaError(
            f"{self.path}: {what}, which Transformers' model of it would not compute: convert the model's original "
            "safetensors instead"
        )


def read_contents(path: Path) -> GgufContents:
    """Reads a file's header.

    Raises:
        NsaError: an architecture that is not known here, no model or a part of one, or blocks that are not counted
            right. The file formats raise their own errors, see `loading.reading`.
    """
    # Its reader ends with the file, whatever lengths and counts the file says; the `gguf` package's may never end.
    metadata, _ = read_gguf_metadata(str(path))
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents for name, field in reader.fields.items()}
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise NsaError(f"{path} is no model: its general.type is {str(kind)[:60]!r}; take the model's own file")
    architecture = fields["general.architecture"]()
    if architecture not in NORM_OFFSET:
        raise NsaError(
            f"{path} holds a model of the architecture {str(architecture)[:60]!r}, and of GGUF files those of "
            f"{', '.join(NORM_OFFSET)} are read: convert the model's original safetensors instead"
        )
    parts = fields["split.count"]() if "split.count" in fields else 1
    if parts > 1:
        raise NsaError(f"{path} is one of {parts} parts of a model: merge them with llama.cpp's gguf-split")
    prefix = f"{architecture}."
    keys = {name.removeprefix(prefix): read() for name, read in fields.items() if name.startswith(prefix)}
    keys = _with_defaults(path, prefix, keys)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_blocks(path, prefix, keys["block_count"], tensors)
    return GgufContents(path, architecture, metadata, keys, tensors)


def _with_defaults(path: Path, prefix: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The architecture's keys, and for those that a file may leave out what llama.cpp takes then.

    (Transformers would take each family's own default.)

    Args:
        path: of the file, for messages.
        prefix: of the keys in the file, for messages.
        keys: those of the file.

    Raises:
        NsaError: a key that a file must have is not there, or a number is not finite.
    """
    if lacking := REQUIRED - keys.keys():
        raise NsaError(f"{path} does not say {prefix}{min(lacking)}: take a whole file")
    if not keys.keys() & EPSILONS:
        raise NsaError(f"{path} says no epsilon of its norms ({prefix}{max(EPSILONS)}): take a whole file")
    heads = keys["attention.head_count"]
    defaults = {
        "attention.head_count_kv": heads,
        "attention.key_length": keys["embedding_length"] // heads,
        "rope.freq_base": 10000.0,
    }
    keys = {**keys, **{key: value for key, value in defaults.items() if key not in keys}}
    for key, value in keys.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NsaError(f"{path}: {prefix}{key} is {value}: expected a finite number")
    return keys


def _check_blocks(path: Path, prefix: str, count: Any, tensors: Mapping[str, Any]) -> None:
    """Makes sure that the file holds tensors of as many blocks as it says, counted from 0 without a gap.

    Raises:
        NsaError: it does not.
    """
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d{1,9})\.", name))}
    if not isinstance(count, int) or len(blocks) != count or max(blocks, default=-1) != count - 1:
        span = f"{min(blocks)} to {max(blocks)}" if blocks else "none"
        raise NsaError(
            f"{path}: {prefix}block_count is {count}, and the file holds tensors of {len(blocks)} blocks ({span})"
        )


def equal(value: Any, other: Any) -> bool:
    """Whether a file's value and a config's are equal; of numbers, as float32 has them."""
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool(value == other)
