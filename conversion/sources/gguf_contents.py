"""What a .gguf file holds, read with the `gguf` package and accounted for to the last key and tensor.

    contents = read_contents(path)
    config = contents.applied_to(config)         # the config that Transformers made of the file
    contents.check_tensors(config)
    for name, tensor in contents.stored(config): ...

Transformers makes a config and weights of a file, and passes over what it does not know. So each of the architecture's
keys is one that the config says too, or is brought into it, or is refused by name; each tensor is one of the model's,
or refused. `stored` gives the weights without Transformers' loader: what `verify` holds them against.

(`gguf` is an extra, and imported where it is needed: whoever converts no such file has none.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.gguf import read_gguf_metadata

from ..files.checkpoint import CheckpointError

# Architectures whose keys and tensors are known here; what a norm's weights are stored with added; see `_as_the_model`.
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

# A key (without the architecture) and the config's field of the same meaning, under the names that families have.
FIELDS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("linear_conv_kernel_dim",),
    "ssm.state_size": ("linear_key_head_dim",),
    "ssm.group_count": ("linear_num_key_heads",),
    "ssm.time_step_rank": ("linear_num_value_heads",),
}
REQUIRED = {"block_count", "context_length", "embedding_length", "attention.head_count"}
EPSILONS = {"attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"}
ROPE_KEYS = {"type", "factor", "original_context_length", "finetuned"}
# These say nothing of what is computed.
NO_MATTER = {"rope.scaling.finetuned", "tensor_data_layout"}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE_FACTORS = "rope_freqs.weight"


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

    def applied_to(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config with what Transformers did not take over from the file.

        Raises:
            CheckpointError: the file says something that the config's family cannot.
        """
        changes = {
            field: value
            for key, value in self.keys.items()
            if (field := _field(config, key)) and value and not _same(value, _said(config, field, value))
        }
        if self.architecture == "gemma3":  # llama.cpp knows it by the number of layers
            width = config.hidden_size // config.num_attention_heads
            changes["query_pre_attn_scalar"] = width if self.layers == 62 else config.head_dim
        if (rope := self._rope(config)) != getattr(config, "rope_parameters", None):
            changes["rope_parameters"] = rope
        if changes:
            fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
            config = type(config)(**{**fields, **changes})
        for key, value in self.keys.items():
            if not self._is_said(config, key, value):
                raise self._refusal(f"{self.architecture}.{key} is {str(value)[:60]}")
        return config

    def ends(self, config: PreTrainedConfig) -> int | list[int] | None:
        """The tokens that end a text, a turn or a message, where Transformers takes over the first only.

        Raises:
            CheckpointError: one is none of the vocabulary's.
        """
        said = config.eos_token_id
        found = [] if said is None else list(said) if isinstance(said, list) else [said]
        for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
            token = self.metadata.get(key)
            if token is None or token in found:
                continue
            if not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise self._refusal(f"{key} is {str(token)[:60]}, and the vocabulary has {config.vocab_size} tokens")
            found.append(token)
        return found if len(found) > 1 else said if not found else found[0]

    def chat_templates(self) -> dict[str, str]:
        """The chat templates by name, beside the one without, which Transformers reads.

        Raises:
            CheckpointError: a name that is none of a file's.
        """
        prefix = "tokenizer.chat_template."
        found = {key.removeprefix(prefix): said for key, said in self.metadata.items() if key.startswith(prefix)}
        for name, template in found.items():
            if not re.fullmatch(r"[\w-]{1,100}", name, re.ASCII) or name == "default" or not isinstance(template, str):
                raise self._refusal(f"it holds a chat template {prefix}{name[:60]}")
        return found

    def check_tensors(self, config: PreTrainedConfig) -> None:
        """Holds the file's tensors against the model's, before one is read.

        Raises:
            CheckpointError: one is missing, or of another shape, or no part of the model.
        """
        model = _skeleton(config)
        needed: set[str] = set()
        state = model.state_dict()
        for name, sources in self._names(model).items():
            needed.update(sources)
            if missing := [source for source in sources if source not in self.tensors]:
                raise CheckpointError(f"{self.path} lacks {missing[0]}, which is the model's {name}")
            shapes = [self.tensors[source].shape.tolist()[::-1] for source in sources]
            found = math.prod(shapes[0]) * len(sources)
            if found != state[name].numel() or shapes[0][-1] not in (*state[name].shape, 1):
                raise CheckpointError(
                    f"{self.path}: {sources[0]} has shape {shapes[0]}, and the metadata asks for "
                    f"{list(state[name].shape)}"
                )
        width = self.keys.get("rope.dimension_count")
        if width and (other := _rotated(model) - {width}):
            raise self._refusal(f"{self.architecture}.rope.dimension_count is {width} (and not {min(other)})")
        ahead = tuple(f"blk.{layer}." for layer in range(self.layers, self.keys["block_count"]))
        others = [name for name in self.tensors.keys() - needed - {ROPE_FACTORS} if not name.startswith(ahead)]
        if others:
            raise self._refusal(f"it holds {len(others)} tensors that are no part of it, {min(others)} for one")

    def stored(self, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model as (name, float32 tensor), made of the file's without Transformers' loader."""
        from gguf import dequantize

        model = _skeleton(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for name, sources in self._names(model).items():
            parts = [
                _as_the_model(
                    self.architecture,
                    config,
                    source,
                    torch.from_numpy(np.array(dequantize(self.tensors[source].data, self.tensors[source].tensor_type))),
                )
                for source in sources
            ]
            # the gate's and the up projection's rows of each expert are one tensor in the model
            values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            yield name, values.float().reshape(shapes[name])

    def _names(self, model: PreTrainedModel) -> dict[str, list[str]]:
        """Each of the model's tensors, and the names of those in the file that it is made of."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        table = get_tensor_name_map(kind, self.layers)
        found: dict[str, list[str]] = {}
        for name in model.state_dict():
            if name in model.all_tied_weights_keys:
                continue
            if name.endswith(".experts.gate_up_proj"):
                gate = table.get_name(name.replace(".gate_up_proj", ".gate_proj"))
                found[name] = [f"{gate}.weight", f"{gate}.weight".replace("ffn_gate", "ffn_up")]
                continue
            stem, _, last = name.rpartition(".")
            if last == "A_log":
                found[name] = [str(table.get_name(name))]
            elif last == "dt_bias":
                found[name] = [f"{table.get_name(stem + '.dt_proj')}.bias"]
            elif last in ("weight", "bias"):
                found[name] = [f"{table.get_name(stem)}.{last}"]
            else:
                found[name] = [f"{table.get_name(name)}.weight"]
        return found

    def _rope(self, config: PreTrainedConfig) -> dict[str, Any] | None:
        """The config's `rope_parameters` with the file's base, width and scaling; llama.cpp scales full attention."""
        before = getattr(config, "rope_parameters", None)
        if not before:
            return before
        nested = "full_attention" in before
        entry = dict(before["full_attention"] if nested else before)
        base, width = self.keys.get("rope.freq_base"), self.keys.get("rope.dimension_count")
        if base and not _same(base, entry.get("rope_theta")):
            entry["rope_theta"] = base
        head = _said(config, "head_dim")
        if width and width != round(head * entry.get("partial_rotary_factor", 1.0)):
            entry["partial_rotary_factor"] = width / head
        if scaling := self._scaling(entry["rope_theta"], width or head):
            entry |= scaling
        return {**before, "full_attention": entry} if nested else entry

    def _scaling(self, base: float, width: int) -> dict[str, Any]:
        """How RoPE is scaled, in Transformers' words; empty if it is not.

        Raises:
            CheckpointError: in a way that Transformers has no words for.
        """
        factor = self.keys.get("rope.scaling.factor") or self.keys.get("rope.scale_linear") or 1.0
        kind = self.keys.get("rope.scaling.type", "linear")
        if ROPE_FACTORS in self.tensors:
            if factor != 1:
                raise self._refusal(f"both {ROPE_FACTORS} and rope.scaling.factor {factor}")
            return self._llama3(base, width)
        if kind == "none" or (kind == "linear" and factor == 1):
            return {}
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            length = self.keys.get("rope.scaling.original_context_length") or self.keys["context_length"]
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        raise self._refusal(f"{self.architecture}.rope.scaling.type is {kind!r}")

    def _llama3(self, base: float, width: int) -> dict[str, Any]:
        """The `llama3` scaling that gives the factors in `rope_freqs.weight`, by which each frequency is divided."""
        factors = np.array(self.tensors[ROPE_FACTORS].data, dtype=np.float64).reshape(-1)
        waves = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
        factor, low, high = factors.max(initial=1.0), *LLAMA3.values()
        between = (factors > 1) & (factors < factor)
        if len(factors) == len(waves) and between.any():
            share = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
            length = round(float(np.median(waves[between] * (low + share * (high - low)))))
            smooth = np.clip((length / waves - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": float(factor),
                    **LLAMA3,
                    "original_max_position_embeddings": length,
                }
        elif len(factors) == len(waves) and (factors == 1).all():
            return {}
        raise self._refusal(f"{ROPE_FACTORS} scales RoPE in another way than Llama 3's")

    def _is_said(self, config: PreTrainedConfig, key: str, value: Any) -> bool:
        """Whether the config says what the file's key does."""
        if key in NO_MATTER or (not value and not _field(config, key)):
            return True
        if key.startswith("rope."):
            # `_rope` has brought these in; the width is looked for in the model, see `check_tensors`
            known = ("freq_base", "dimension_count", "scale_linear", *(f"scaling.{name}" for name in ROPE_KEYS))
            if key.removeprefix("rope.") in known:
                return getattr(config, "rope_parameters", None) is not None
        kinds = getattr(config, "layer_types", None) or []
        others = {
            "block_count": lambda: value == self.keys["block_count"] and config.num_hidden_layers == self.layers,
            "nextn_predict_layers": lambda: config.num_hidden_layers == self.layers,
            "attention.causal": lambda: value is True,
            "attention.sliding_window_pattern": lambda: [kind == "sliding_attention" for kind in kinds] == value,
            "rope.freq_base_swa": lambda: _same(value, config.rope_parameters["sliding_attention"]["rope_theta"]),
            "rope.dimension_sections": lambda: [n for n in value if n] == config.rope_parameters["mrope_section"],
            "full_attention_interval": lambda: (
                kinds[value - 1 :: value].count("full_attention")
                == kinds.count("full_attention")
                == len(kinds) // value
            ),
            "ssm.inner_size": lambda: value == config.linear_value_head_dim * config.linear_num_value_heads,
        }
        if key in others:
            return bool(others[key]())
        field = _field(config, key)
        return field is not None and _same(value, _said(config, field, value))

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {what}, which Transformers' model of it would not compute: convert the model's original "
            "safetensors instead"
        )


def read_contents(path: Path) -> GgufContents:
    """Reads a file's header; no weights.

    Raises:
        CheckpointError: an architecture that is not known here, no model or a part of one, or blocks that are not
            counted right. The file formats raise their own errors, see `loading.reading`.
    """
    # Its reader ends with the file, whatever lengths and counts the file says; the `gguf` package's may never end.
    metadata, _ = read_gguf_metadata(str(path))
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = reader.fields
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path} is no model: its general.type is {str(kind)[:60]!r}; take the model's own file")
    architecture = fields["general.architecture"].contents()
    if architecture not in NORM_OFFSET:
        raise CheckpointError(
            f"{path} holds a model of the architecture {str(architecture)[:60]!r}, and of GGUF files those of "
            f"{', '.join(NORM_OFFSET)} are read: convert the model's original safetensors instead"
        )
    parts = fields["split.count"].contents() if "split.count" in fields else 1
    if parts > 1:
        raise CheckpointError(f"{path} is one of {parts} parts of a model: merge them with llama.cpp's gguf-split")
    prefix = f"{architecture}."
    keys = {name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)}
    if lacking := REQUIRED - keys.keys():
        raise CheckpointError(f"{path} does not say {prefix}{min(lacking)}: take a whole file")
    if not keys.keys() & EPSILONS:
        raise CheckpointError(f"{path} says no epsilon of its norms ({prefix}{max(EPSILONS)}): take a whole file")
    # where a file says nothing llama.cpp takes these, and Transformers each family's own
    heads = keys["attention.head_count"]
    keys.setdefault("attention.head_count_kv", heads)
    keys.setdefault("attention.key_length", keys["embedding_length"] // heads)
    keys.setdefault("rope.freq_base", 10000.0)
    for key, value in keys.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{path}: {prefix}{key} is {value}: expected a finite number")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    count = keys["block_count"]
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"blk\.(\d{1,9})\.", name))}
    if not isinstance(count, int) or len(blocks) != count or max(blocks, default=-1) != count - 1:
        held = f"{min(blocks)} to {max(blocks)}" if blocks else "none"
        raise CheckpointError(
            f"{path}: {prefix}block_count is {count}, and the file holds tensors of {len(blocks)} blocks ({held})"
        )
    return GgufContents(path, architecture, metadata, keys, tensors)


def _field(config: PreTrainedConfig, key: str) -> str | None:
    """The config's field for a key, if its family has one."""
    return next((field for field in FIELDS.get(key, ()) if field == "head_dim" or hasattr(config, field)), None)


def _said(config: PreTrainedConfig, field: str, like: Any = None) -> Any:
    """What the config says in a field; of the layers one by one where `like`, the file's value, does."""
    if field == "head_dim" and not getattr(config, "head_dim", None):
        return config.hidden_size // config.num_attention_heads
    value = getattr(config, field, None)
    if isinstance(like, list) and field == "num_key_value_heads":
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(like)
        return [0 if kind == "conv" else value for kind in kinds]
    return [value] * len(like) if isinstance(like, list) else value


def _same(value: Any, said: Any) -> bool:
    """Equal; numbers as float32 has them."""
    if isinstance(value, float) and isinstance(said, int | float):
        return math.isclose(value, said, rel_tol=1e-6)
    return bool(value == said)


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _rotated(model: PreTrainedModel) -> set[int]:
    """How many of a head's dimensions RoPE turns, of each of the model's."""
    return {2 * buffer.shape[-1] for name, buffer in model.named_buffers() if name.endswith("inv_freq")}


def _as_the_model(architecture: str, config: PreTrainedConfig, name: str, values: Tensor) -> Tensor:
    """A tensor of the file in the order and with the offset that Transformers' model has."""
    if architecture == "llama" and (found := re.search(r"\.attn_([qk])\.", name)):
        # llama.cpp turns neighbours, Transformers the two halves of a head
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    if name.endswith("norm.weight") and "ssm_norm" not in name:
        return values - NORM_OFFSET[architecture] if NORM_OFFSET[architecture] else values
    if architecture.startswith("qwen35"):
        return _grouped_value_heads(config, name, values)
    return values


def _grouped_value_heads(config: PreTrainedConfig, name: str, values: Tensor) -> Tensor:
    """Qwen3.5: the value heads of each key head side by side, where llama.cpp has the first of all, then the second."""
    keys, per_key = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    if name.endswith("ssm_a"):
        values = torch.log(-values)

    def grouped(part: Tensor, dim: int, width: int) -> Tensor:
        return part.unflatten(dim, (per_key, keys, width)).transpose(dim, dim + 1).flatten(dim, dim + 2)

    if re.search(r"ssm_(a|dt|alpha|beta)(\.|$)", name):
        return grouped(values, 0, 1)
    if ".attn_gate." in name:
        return grouped(values, 0, config.linear_value_head_dim)
    if re.search(r"\.(attn_qkv|ssm_conv1d)\.", name):
        before = 2 * config.linear_key_head_dim * keys
        return torch.cat([values[:before], grouped(values[before:], 0, config.linear_value_head_dim)])
    return grouped(values, 1, config.linear_value_head_dim) if ".ssm_out." in name else values
