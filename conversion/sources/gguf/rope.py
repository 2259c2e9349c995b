"""RoPE as a .gguf file has it, in the words of Transformers' config: base, width and scaling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from ...rope import KINDS
from .contents import GgufContents, equal

# What a file can say of a scaling, behind `rope.scaling.`.
SCALING_KEYS = {"type", "factor", "original_context_length", "finetuned"}
# The tensor that scales each frequency by a factor of its own.
ROPE_FACTORS = "rope_freqs.weight"


def rope_parameters(contents: GgufContents, config: PreTrainedConfig) -> dict[str, Any] | None:
    """The config's `rope_parameters` with the file's base, width and scaling; llama.cpp scales full attention only.

    Args:
        contents: of the file.
        config: what Transformers made of it.

    Raises:
        NsaError: RoPE is scaled in a way that Transformers has no words for.
    """
    before = getattr(config, "rope_parameters", None)
    if not before:
        return before
    by_kind = "full_attention" in before
    entry = dict(before["full_attention"] if by_kind else before)
    base, width = contents.keys.get("rope.freq_base"), contents.keys.get("rope.dimension_count")
    if base and not equal(base, entry.get("rope_theta")):
        entry["rope_theta"] = base
    head_dim = head_dim_of(config)
    if width and width != round(head_dim * entry.get("partial_rotary_factor", 1.0)):
        entry["partial_rotary_factor"] = width / head_dim
    entry |= _scaling(contents, entry["rope_theta"], width or head_dim)
    return {**before, "full_attention": entry} if by_kind else entry


def head_dim_of(config: PreTrainedConfig) -> int:
    """The size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _scaling(contents: GgufContents, base: float, width: int) -> dict[str, Any]:
    """How RoPE is scaled, in Transformers' words; empty if it is not.

    Args:
        contents: of the file.
        base: of RoPE.
        width: how many of a head's dimensions are rotated.

    Raises:
        NsaError: in a way that Transformers has no words for.
    """
    keys = contents.keys
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0
    kind = keys.get("rope.scaling.type", "linear")
    if ROPE_FACTORS in contents.tensors:
        if factor != 1:
            raise contents.refusal(f"both {ROPE_FACTORS} and rope.scaling.factor {factor}")
        return _llama3(contents, base, width)
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        length = keys.get("rope.scaling.original_context_length") or keys["context_length"]
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    raise contents.refusal(f"{contents.architecture}.rope.scaling.type is {kind!r}")


def _llama3(contents: GgufContents, base: float, width: int) -> dict[str, Any]:
    """The `llama3` scaling that gives the factors in `rope_freqs.weight`, by which each frequency is divided.

    Short waves have the factor 1, long ones the largest, and those between a mean of both, from which the length that
    the model was first trained on follows.

    Args:
        contents: of the file.
        base: of RoPE.
        width: how many of a head's dimensions are rotated.

    Raises:
        NsaError: the factors are those of no such scaling.
    """
    factors = np.array(contents.tensors[ROPE_FACTORS].data, dtype=np.float64).reshape(-1)
    wavelengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    low, high = KINDS["llama3"]["low_freq_factor"], KINDS["llama3"]["high_freq_factor"]
    factor = factors.max(initial=1.0)
    between = (factors > 1) & (factors < factor)
    if len(factors) == len(wavelengths) and between.any():
        share = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        length = round(float(np.median(wavelengths[between] * (low + share * (high - low)))))
        smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": float(factor),
                **KINDS["llama3"],
                "original_max_position_embeddings": length,
            }
    elif len(factors) == len(wavelengths) and (factors == 1).all():
        return {}
    raise contents.refusal(f"{ROPE_FACTORS} scales RoPE in another way than Llama 3's")
