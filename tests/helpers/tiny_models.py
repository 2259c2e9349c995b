"""A tiny random Llama, dense and sparse, its sizes and its tokenizer."""

from __future__ import annotations

import torch

# Small enough that a hundred tokens cross every border: exact up to 4 * 16 = 64 tokens, a window of 24. And the paper's
# way of choosing blocks, which is the larger one; tests of the other name it.
TINY_SIZES = {
    "nsa_selector": "compressed",
    "nsa_kernel_size": 8,
    "nsa_kernel_stride": 4,
    "nsa_block_size": 16,
    "nsa_topk": 4,
    "nsa_init_blocks": 1,
    "nsa_local_blocks": 1,
    "nsa_window_size": 24,
}
# The ways of choosing blocks for which everything that has to do with caches is tested.
SELECTORS = {
    "compressed": {"nsa_selector": "compressed"},
    "channels": {"nsa_selector": "channels", "nsa_compression": "none"},
    "channels-8": {"nsa_selector": "channels", "nsa_compression": "none", "nsa_selector_bits": 8},
}
TINY_LLAMA = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "attn_implementation": "sdpa",
}


def tiny_dense_model(**changes):
    """A tiny random dense Llama in float32, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, "initializer_range": 0.1, **changes}))
    return model.eval()


def byte_tokenizer():
    """A tokenizer of 256 bytes with a chat template, made here: nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=alphabet[0], eos_token=alphabet[1], pad_token=alphabet[2]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def surrounding_tokenizer():
    """The byte tokenizer, with the tokens 0 and 1 before a text, as GLM's has two, and 2 behind it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    names = tokenizer.convert_ids_to_tokens([0, 1, 2])
    around = TemplateProcessing(
        single=f"{names[0]} {names[1]} $A {names[2]}", special_tokens=list(zip(names, range(3), strict=True))
    )
    tokenizer.backend_tokenizer.post_processor = around
    return tokenizer


def randomize_nsa(model, std: float = 0.3, seed: int = 1) -> None:
    """Random NSA parameters: at their initial values many mistakes are invisible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".nsa." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def tiny_sparse_model(device: str = "cpu", **fields: object):
    """Two layers of the tiny Llama, sparse, with random NSA parameters."""
    import nsa_hf

    dense = tiny_dense_model(num_hidden_layers=2)
    model = nsa_hf.NsaLlamaForCausalLM(nsa_hf.nsa_config_from_dense(dense.config, **{**TINY_SIZES, **fields})).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    randomize_nsa(model)
    return model.to(device)
