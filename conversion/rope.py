"""RoPE scaling at conversion, for texts longer than the source was trained on: YaRN, linear, llama3.

    convert(src, out, rope_scaling="yarn:4")

Scaling changes the dense model too: the conversion is exact beside the source with the same scaling, which is what
`verify` compares it with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from nsa_hf.errors import NsaError

# The fields that each kind has beside its factor.
KINDS: dict[str, dict[str, float]] = {
    "yarn": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# With a larger factor there are more positions than a computer can count.
LARGEST = 1e6


def parse_rope_scaling(value: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """RoPE scaling as Transformers' config has it: `{"rope_type": "yarn", "factor": 4.0}`.

    Args:
        value: that, or in short `"yarn:4"`; None stays None.

    Raises:
        NsaError: another kind, or a factor that is not above 1.
    """
    if value is None:
        return None
    try:
        if isinstance(value, str):
            kind, times = value.split(":")
            fields: dict[str, Any] = {"rope_type": kind.strip().lower(), "factor": times}
        else:
            fields = dict(value)
        kind, factor = fields.pop("rope_type"), float(fields.pop("factor"))
        if kind not in KINDS or not 1 < factor <= LARGEST or not fields.keys() <= KINDS[kind].keys():
            raise ValueError
        return {"rope_type": kind, "factor": factor, **KINDS[kind], **{name: float(fields[name]) for name in fields}}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NsaError(
            f"rope_scaling must be KIND:FACTOR with a kind of {', '.join(KINDS)} and a factor above 1, such as yarn:4, "
            f"got {value!r}"
        ) from error


def added_scaling(dense: PreTrainedConfig, sparse: PreTrainedConfig) -> dict[str, Any] | None:
    """The scaling that a sparse model has and its dense source has not, as `parse_rope_scaling` gives it.

    Args:
        dense: the source's config.
        sparse: the converted model's config.
    """
    before, after = (_full_attention(config) for config in (dense, sparse))
    kind = after.get("rope_type")
    if kind not in KINDS or before.get("rope_type", "default") != "default":
        return None
    return {name: after[name] for name in ("rope_type", "factor", *KINDS[kind]) if name in after}


def _full_attention(config: PreTrainedConfig) -> dict[str, Any]:
    """The RoPE parameters of a config's full-attention layers; empty if they have none."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope) or {}


def scaled_config(config: PreTrainedConfig, scaling: Mapping[str, Any]) -> PreTrainedConfig:
    """A dense config with its RoPE scaled, and `max_position_embeddings` multiplied by the factor.

    Where kinds of layers have their own RoPE, that of the full-attention layers is scaled.

    Args:
        config: of the dense model; stays as it is.
        scaling: what `parse_rope_scaling` gave.

    Raises:
        NsaError: the model has no RoPE, or one that is scaled already.
    """
    config = copy.deepcopy(config)
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind, before = "full_attention" in rope, _full_attention(config)
    if "rope_theta" not in before:
        raise NsaError(f"rope_scaling: {config.model_type} has no RoPE in its full-attention layers to scale")
    if before.get("rope_type", "default") != "default":
        raise NsaError(
            f"rope_scaling: the source's RoPE is scaled already ({before['rope_type']}): give its config.json other "
            "rope_parameters instead"
        )
    length = config.max_position_embeddings
    after = {**before, **scaling}
    if scaling["rope_type"] != "linear":
        after["original_max_position_embeddings"] = length
    config.rope_parameters = {**rope, "full_attention": after} if by_kind else after
    config.max_position_embeddings = round(length * scaling["factor"])
    return config


def scale_model(model: PreTrainedModel, scaling: Mapping[str, Any]) -> PreTrainedModel:
    """Gives a dense model the RoPE of its scaled config, see `scaled_config`; changes the model and returns it."""
    config = scaled_config(model.config, scaling)
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module).__name__.endswith("RotaryEmbedding"):
                setattr(parent, name, type(module)(config=config).to(model.device))
    return model
