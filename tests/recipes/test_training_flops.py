import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nsa_hf import NsaLlamaForCausalLM, NsaQwen3MoeForCausalLM
from nsa_hf.recipes.training.flops import attention_flops, matrix_weights, training_flops

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
NSA = {"topk": 4, "block_size": 16, "window_size": 32, "kernel_size": 16, "kernel_stride": 8}


def sparse_model(**options):
    return NsaLlamaForCausalLM.from_dense(LlamaForCausalLM(LlamaConfig(**SIZES)), **NSA, **options)


def test_a_tied_embedding_counts_as_the_output_layer_and_a_looked_up_one_not():
    layers = 2 * (32 * 4 * 16 * 2 + 32 * 2 * 16 * 2 + 3 * 32 * 48)
    for tied in (False, True):
        config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = NsaLlamaForCausalLM.from_dense(LlamaForCausalLM(config), **NSA)
        gates = sum(p.numel() for name, p in model.named_parameters() if ".nsa." in name and p.dim() > 1)
        assert matrix_weights(model, trained=False) == layers + gates + 32 * 64


def test_only_the_experts_that_a_token_is_sent_to_count():
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=48)
    model = NsaQwen3MoeForCausalLM.from_dense(Qwen3MoeForCausalLM(config), **NSA)
    more = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    twice = NsaQwen3MoeForCausalLM.from_dense(Qwen3MoeForCausalLM(more), **NSA)
    expert = 3 * 32 * 48
    assert matrix_weights(twice, trained=False) - matrix_weights(model, trained=False) == pytest.approx(2 * expert)


def test_sparse_attention_counts_what_it_reads():
    length, pair = 256, 2 * 4 * 32
    model = sparse_model(selector="channels", selector_dim=8, compression="none")
    selected = 64 * 65 / 2 + (256 - 64) * 64
    window = 32 * 33 / 2 + (256 - 32) * 32
    index = 256 * 257 / 2 * 8 / 32
    forward = 2 * pair * (selected + window + index)
    assert attention_flops(model, length, dense=False, backward=False) == pytest.approx(forward)
    both = 2 * pair * (3.5 * (selected + window) + index)
    assert attention_flops(model, length, dense=False, backward=True) == pytest.approx(both)
    assert attention_flops(model, length, dense=True, backward=False) == pytest.approx(2 * pair * 256 * 257 / 2)


def test_what_is_frozen_needs_no_gradient_of_its_weights():
    model = sparse_model()
    whole = training_flops(model, 64, teacher=False)
    model.requires_grad_(False)
    assert whole - training_flops(model, 64, teacher=False) == pytest.approx(2 * matrix_weights(model, trained=False))
    with_teacher = training_flops(model, 64, teacher=True) - training_flops(model, 64, teacher=False)
    dense = attention_flops(model, 64, dense=True, backward=False) / 64
    assert with_teacher == pytest.approx(2 * matrix_weights(model, trained=False) + dense)
