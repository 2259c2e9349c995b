"""A tiny random Llama as a .gguf file, made here: quantised and plain tensors, a tokenizer and a chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, MLP, VOCABULARY = 2, 64, 4, 2, 96, 262
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(path: Path, more: Callable[[Any], Any] = lambda writer: None, blocks: int = LAYERS) -> Path:
    """Writes the file; the same at every call. Its attention and MLP weights are Q4_1, as SmolLM2's are.

    Args:
        more: adds keys and tensors.
        blocks: what it says that it has.
    """
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(512)
    writer.add_block_count(blocks)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*specials, *sorted(ByteLevel.alphabet()), "Ġt", "he"])
    writer.add_token_types([3] * len(specials) + [1] * 258)
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(size=shape).astype(np.float32) * 0.2
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values + 1)
            return
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    kv = HIDDEN // HEADS * KV_HEADS
    add("token_embd", VOCABULARY, HIDDEN)
    add("output_norm", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm", HIDDEN)
        add(f"blk.{layer}.ffn_norm", HIDDEN)
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", kv, HIDDEN),
            ("attn_v", kv, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", MLP, HIDDEN),
            ("ffn_up", MLP, HIDDEN),
            ("ffn_down", HIDDEN, MLP),
        ):
            add(f"blk.{layer}.{name}", rows, columns)
    more(writer)
    finish(writer)
    return path


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Some families' names for llama.cpp's architectures, and what they need in a file besides the keys that all have.
ARCHITECTURES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "qwen2_moe": (
        "qwen2moe",
        lambda writer: [
            writer.add_expert_count(4),
            writer.add_expert_used_count(2),
            writer.add_expert_feed_forward_length(32),
            writer.add_expert_shared_feed_forward_length(32),
        ],
    ),
    "stablelm": ("stablelm", lambda writer: writer.add_rope_dimension_count(4)),
    "starcoder2": ("starcoder2", lambda writer: None),
    "gemma3_text": ("gemma3", lambda writer: [writer.add_key_length(16), writer.add_sliding_window(24)]),
    "lfm2": ("lfm2", lambda writer: writer.add_shortconv_l_cache(3)),
    "qwen3_5_text": (
        "qwen35",
        lambda writer: [
            writer.add_key_length(16),
            writer.add_rope_dimension_count(4),
            writer.add_ssm_conv_kernel(4),
            writer.add_ssm_state_size(16),
            writer.add_ssm_group_count(2),
            writer.add_ssm_time_step_rank(4),
            writer.add_ssm_inner_size(64),
            writer.add_uint32("qwen35.full_attention_interval", 2),
            writer.add_rope_dimension_sections([1, 1, 0, 0]),
        ],
    ),
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "block_auto_adjust_ff_dim": False,
    "conv_L_cache": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def write_gguf_of(model_type: str, path: Path) -> Path:
    """Another family's file, of two layers: its matrices are Q4_0 and Q8_0, the rest float32."""
    import gguf
    import torch
    from tiny_families import tiny_config
    from transformers import AutoModelForCausalLM

    from nsa_hf.conversion.sources.gguf.tensors import tensor_parts

    config = tiny_config(model_type)
    for name in SIZES.keys() & config.to_dict().keys():
        setattr(config, name, SIZES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture, more = ARCHITECTURES[model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    if model_type == "lfm2":
        heads = [KV_HEADS if kind == "full_attention" else 0 for kind in config.layer_types]
        writer.add_array("lfm2.attention.head_count_kv", heads)
    else:
        writer.add_head_count_kv(KV_HEADS)
    layer_norm = model_type in ("stablelm", "starcoder2")
    (writer.add_layer_norm_eps if layer_norm else writer.add_layer_norm_rms_eps)(2e-5)
    writer.add_rope_freq_base(12345.0)
    writer.add_vocab_size(config.vocab_size)
    more(writer)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    random = np.random.default_rng(0)
    for name, parts in tensor_parts(architecture, config.num_hidden_layers, model).items():
        shape = list(model.state_dict()[name].shape)
        if len(parts) == 2:  # gate and up of the experts
            shape[1] //= 2
        for part in parts:
            values = random.normal(size=[size for size in shape if size != 1]).astype(np.float32) * 0.2
            if part.endswith("ssm_a"):
                values = -np.abs(values) - 0.1
            kinds = gguf.GGMLQuantizationType
            kind = kinds.Q8_0 if "attn" in part else kinds.Q4_0
            if values.ndim > 1 and values.shape[-1] % 32 == 0:
                writer.add_tensor(part, gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(part, values)
    finish(writer)
    return path
