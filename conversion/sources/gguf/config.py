"""A .gguf file's keys and the config that Transformers made of it: made one, or refused."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .contents import GgufContents, equal
from .rope import SCALING_KEYS, head_dim_of, rope_parameters

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
# These say nothing of what is computed.
WITHOUT_EFFECT = {"rope.scaling.finetuned", "tensor_data_layout"}
# `rope_parameters` takes these over; RoPE's width is also looked for in the model, see tensors.py.
ROPE_KEYS = {"freq_base", "dimension_count", "scale_linear", *(f"scaling.{name}" for name in SCALING_KEYS)}


def completed_config(contents: GgufContents, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with what Transformers did not take over from the file.

    Args:
        contents: of the file.
        config: what Transformers made of it.

    Raises:
        NsaError: the file says something that the config's family cannot.
    """
    changes = {
        field: value
        for key, value in contents.keys.items()
        if (field := _field(config, key)) and value and not equal(value, _config_value(config, field, value))
    }
    if contents.architecture == "gemma3":  # llama.cpp knows it by the number of layers
        width = config.hidden_size // config.num_attention_heads
        changes["query_pre_attn_scalar"] = width if contents.layers == 62 else config.head_dim
    if (rope := rope_parameters(contents, config)) != getattr(config, "rope_parameters", None):
        changes["rope_parameters"] = rope
    if changes:
        fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        config = type(config)(**{**fields, **changes})
    for key, value in contents.keys.items():
        if not _config_says(contents, config, key, value):
            raise contents.refusal(f"{contents.architecture}.{key} is {str(value)[:60]}")
    return config


def _config_says(contents: GgufContents, config: PreTrainedConfig, key: str, value: Any) -> bool:
    """Whether the config says what the file's key does, or the key has no effect."""
    field = _field(config, key)
    if key in WITHOUT_EFFECT or (not value and not field):
        return True
    if key.startswith("rope.") and key.removeprefix("rope.") in ROPE_KEYS:
        return getattr(config, "rope_parameters", None) is not None
    kinds = getattr(config, "layer_types", None) or []
    # keys that no field has the value of
    checks = {
        "block_count": lambda: value == contents.keys["block_count"] and config.num_hidden_layers == contents.layers,
        "nextn_predict_layers": lambda: config.num_hidden_layers == contents.layers,
        "attention.causal": lambda: value is True,
        "attention.sliding_window_pattern": lambda: [kind == "sliding_attention" for kind in kinds] == value,
        "rope.freq_base_swa": lambda: equal(value, config.rope_parameters["sliding_attention"]["rope_theta"]),
        "rope.dimension_sections": lambda: [n for n in value if n] == config.rope_parameters["mrope_section"],
        "full_attention_interval": lambda: (
            kinds[value - 1 :: value].count("full_attention") == kinds.count("full_attention") == len(kinds) // value
        ),
        "ssm.inner_size": lambda: value == config.linear_value_head_dim * config.linear_num_value_heads,
    }
    if key in checks:
        return bool(checks[key]())
    return field is not None and equal(value, _config_value(config, field, value))


def _field(config: PreTrainedConfig, key: str) -> str | None:
    """The config's field for a key, if its family has one."""
    return next((field for field in FIELDS.get(key, ()) if field == "head_dim" or hasattr(config, field)), None)


def _config_value(config: PreTrainedConfig, field: str, like: Any = None) -> Any:
    """What the config says in a field.

    Args:
        config: of the dense model.
        field: its name.
        like: the file's value; where that is a list of one entry a layer, so is what is returned.
    """
    if field == "head_dim" and not getattr(config, "head_dim", None):
        return head_dim_of(config)
    value = getattr(config, field, None)
    if isinstance(like, list) and field == "num_key_value_heads":
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(like)
        return [0 if kind == "conv" else value for kind in kinds]
    return [value] * len(like) if isinstance(like, list) else value
