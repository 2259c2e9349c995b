"""A .gguf file's tensors: each is one of the model's, and becomes it without Transformers' loader."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nsa_hf.errors import NsaError

from .contents import NORM_OFFSET, GgufContents
from .rope import ROPE_FACTORS


def check_tensors(contents: GgufContents, config: PreTrainedConfig) -> None:
    """Holds the file's tensors against the model's, before one is read.

    Args:
        contents: of the file.
        config: the dense model's, completed from the file.

    Raises:
        NsaError: a tensor is missing, or of another shape, or no part of the model.
    """
    model = _model_without_weights(config)
    needed: set[str] = set()
    state = model.state_dict()
    for name, parts in tensor_parts(contents.architecture, contents.layers, model).items():
        needed.update(parts)
        if missing := [part for part in parts if part not in contents.tensors]:
            raise NsaError(f"{contents.path} lacks {missing[0]}, which is the model's {name}: download it again")
        shapes = [contents.tensors[part].shape.tolist()[::-1] for part in parts]
        count = math.prod(shapes[0]) * len(parts)
        if count != state[name].numel() or shapes[0][-1] not in (*state[name].shape, 1):
            raise NsaError(
                f"{contents.path}: {parts[0]} has shape {shapes[0]}, and the metadata asks for "
                f"{list(state[name].shape)}"
            )
    width = contents.keys.get("rope.dimension_count")
    if width and (other := _rotated_dimensions(model) - {width}):
        raise contents.refusal(f"{contents.architecture}.rope.dimension_count is {width} (and not {min(other)})")
    # blocks that predict further tokens are left out
    ahead = tuple(f"blk.{layer}." for layer in range(contents.layers, contents.keys["block_count"]))
    others = [name for name in contents.tensors.keys() - needed - {ROPE_FACTORS} if not name.startswith(ahead)]
    if others:
        raise contents.refusal(f"it holds {len(others)} tensors that are no part of it, {min(others)} for one")


def read_tensors(contents: GgufContents, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model, dequantised, one at a time.

    Args:
        contents: of the file.
        config: the dense model's, completed from the file.

    Yields:
        The name in the model, and the tensor in float32.
    """
    from gguf import dequantize

    model = _model_without_weights(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, parts in tensor_parts(contents.architecture, contents.layers, model).items():
        tensors = []
        for part in parts:
            stored = contents.tensors[part]
            values = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type)))
            tensors.append(_as_in_transformers(contents.architecture, config, part, values))
        # the gate's and the up projection's rows of each expert are one tensor in the model
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
        yield name, whole.float().reshape(shapes[name])


def tensor_parts(architecture: str, layers: int, model: PreTrainedModel) -> dict[str, list[str]]:
    """Which tensors of a file each of a model's is made of.

    Args:
        architecture: llama.cpp's name of it.
        layers: blocks of the decoder.
        model: Transformers' model of it; its weights are not looked at.

    Returns:
        Names in the file by the name in the model, copies of tied tensors left out.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(kind, layers)
    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        if name in model.all_tied_weights_keys:
            continue
        if name.endswith(".experts.gate_up_proj"):
            gate = table.get_name(name.replace(".gate_up_proj", ".gate_proj"))
            parts[name] = [f"{gate}.weight", f"{gate}.weight".replace("ffn_gate", "ffn_up")]
            continue
        stem, _, last = name.rpartition(".")
        if last == "A_log":
            parts[name] = [str(table.get_name(name))]
        elif last == "dt_bias":
            parts[name] = [f"{table.get_name(stem + '.dt_proj')}.bias"]
        elif last in ("weight", "bias"):
            parts[name] = [f"{table.get_name(stem)}.{last}"]
        else:
            parts[name] = [f"{table.get_name(name)}.weight"]
    return parts


def _model_without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _rotated_dimensions(model: PreTrainedModel) -> set[int]:
    """How many of a head's dimensions RoPE turns, in each of the model's RoPE modules."""
    return {2 * buffer.shape[-1] for name, buffer in model.named_buffers() if name.endswith("inv_freq")}


def _as_in_transformers(architecture: str, config: PreTrainedConfig, name: str, values: Tensor) -> Tensor:
    """A tensor of the file with its values in the order, and of norms without the offset, of Transformers' model.

    Args:
        architecture: llama.cpp's name of it.
        config: the dense model's.
        name: of the tensor in the file.
        values: of the tensor, dequantised.
    """
    if architecture == "llama" and (projection := re.search(r"\.attn_([qk])\.", name)):
        # llama.cpp turns neighbours, Transformers the two halves of a head
        heads = config.num_attention_heads if projection[1] == "q" else config.num_key_value_heads
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    if name.endswith("norm.weight") and "ssm_norm" not in name:
        return values - NORM_OFFSET[architecture] if NORM_OFFSET[architecture] else values
    if architecture.startswith("qwen35"):
        return _value_heads_by_key_head(config, name, values)
    return values


def _value_heads_by_key_head(config: PreTrainedConfig, name: str, values: Tensor) -> Tensor:
    """Qwen 3.5's linear attention: the value heads of each key head side by side.

    llama.cpp has the first value head of every key head, then the second of every one, and so on.

    Args:
        config: the dense model's.
        name: of the tensor in the file.
        values: of the tensor, dequantised.
    """
    keys, per_key = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    if name.endswith("ssm_a"):
        values = torch.log(-values)

    def reorder(part: Tensor, dim: int, width: int) -> Tensor:
        return part.unflatten(dim, (per_key, keys, width)).transpose(dim, dim + 1).flatten(dim, dim + 2)

    if re.search(r"ssm_(a|dt|alpha|beta)(\.|$)", name):
        return reorder(values, 0, 1)
    if ".attn_gate." in name:
        return reorder(values, 0, config.linear_value_head_dim)
    if re.search(r"\.(attn_qkv|ssm_conv1d)\.", name):
        before = 2 * config.linear_key_head_dim * keys
        return torch.cat([values[:before], reorder(values[before:], 0, config.linear_value_head_dim)])
    return reorder(values, 1, config.linear_value_head_dim) if ".ssm_out." in name else values
