"""A tiny random Llama as a .gguf file, made here: quantised and plain tensors, a tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, MLP, VOCABULARY = 2, 64, 4, 2, 96, 262
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(path: Path) -> Path:
    """Writes the file; the same at every call. Its attention and MLP weights are Q4_1, as SmolLM2's are."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(512)
    writer.add_block_count(LAYERS)
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
