"""nsa_hf/in_memory.py: converted in memory, as a conversion on disk is."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_families import EXACT, SIZES, sparse_of, tiny_dense, tokens
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import nsa_hf
from nsa_hf import NsaError
from nsa_hf.conversion import convert
from nsa_hf.in_memory import on_same_weights


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("branch_kv", ["shared", "independent"])
def test_the_same_as_a_conversion_on_disk(model_type, branch_kv, tmp_path):
    dense = tiny_dense(model_type, tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "nsa", branch_kv=branch_kv, seed=5, **SIZES)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "nsa")
    model = type(written).from_dense(tmp_path / "dense", branch_kv=branch_kv, seed=5, **SIZES)
    assert type(model) is type(written) and not model.training and model.config.to_dict().keys() >= SIZES.keys()
    assert model.state_dict().keys() == written.state_dict().keys()
    assert all(torch.equal(value, written.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, written(tokens()).logits)
    assert (model.config.name_or_path, model.name_or_path) == ("", "")  # where TRL looks for a reference model
    model.train()(tokens(), labels=tokens()).loss.backward()
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").lm_head.weight.shape == model.lm_head.weight.shape


@torch.no_grad()
def test_models_on_the_same_weights_are_those_weights():
    model = sparse_of(tiny_dense("qwen3", tie_word_embeddings=True), random=True).train()
    channels = model.config.with_fields(nsa_selector="channels")
    assert model.config.nsa_selector_channels is None and channels.dtype == model.config.dtype
    again = on_same_weights(type(model), channels.with_fields(nsa_selector="compressed"), model)
    other = on_same_weights(type(model), channels, model)
    x = tokens()
    assert torch.equal(again(x).logits, model(x).logits) and not torch.equal(other(x).logits, model(x).logits)
    assert again.training and again.lm_head.weight is again.model.embed_tokens.weight
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_model_that_is_given_keeps_its_own_parameters():
    dense = tiny_dense("llama")
    x = tokens(1, EXACT)
    with torch.no_grad():
        before = dense(x).logits
        model = nsa_hf.NsaLlamaForCausalLM.from_dense(dense, topk=3, block_size=8, kernel_size=4, kernel_stride=2)
        torch.testing.assert_close(model(x).logits, before, atol=5e-5, rtol=0)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(dense(x).logits, before)


def test_dtype_of_a_folder(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path)
    model = nsa_hf.NsaLlamaForCausalLM.from_dense(tmp_path, dtype=torch.bfloat16, **SIZES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    with pytest.raises(NsaError, match=r"NsaQwen3ForCausalLM.from_dense was given a llama model.*: use NsaLlamaForC"):
        nsa_hf.NsaQwen3ForCausalLM.from_dense(tiny_dense("llama"))
    with pytest.raises(NsaError, match="nsa_topk is given twice, with and without its prefix"):
        nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense("llama"), topk=4, nsa_topk=8)
    with pytest.raises(NsaError, match="unknown option 'top_k': did you mean topk"):
        nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense("llama"), top_k=3)
    with pytest.raises(NsaError, match="nsa_topk counts the forced blocks"):
        nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense("llama"), topk=1)


def test_a_quantised_model_is_refused():
    """Its state dict holds numbers of other meaning beside its weights."""
    dense = tiny_dense("llama")
    dense.hf_quantizer = object()  # where `from_pretrained(quantization_config=...)` leaves it
    with pytest.raises(NsaError, match=r"takes plain weights, and this model is quantised: .*quantization_config"):
        nsa_hf.NsaLlamaForCausalLM.from_dense(dense)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_no_familys_name_is_needed(model_type, tmp_path):
    dense = tiny_dense(model_type)
    dense.save_pretrained(tmp_path)
    models = [nsa_hf.from_dense(source, seed=3, **SIZES) for source in (dense, tmp_path, str(tmp_path))]
    own = getattr(nsa_hf, f"Nsa{type(dense).__name__}").from_dense(dense, seed=3, **SIZES)
    x = tokens(1, EXACT + 20)
    with torch.no_grad():
        assert all(type(model) is type(own) and torch.equal(model(x).logits, own(x).logits) for model in models)
        assert torch.equal(models[0](x[:, :EXACT]).logits, own(x[:, :EXACT]).logits)
        torch.testing.assert_close(models[0](x[:, :EXACT]).logits, dense(x[:, :EXACT]).logits, atol=5e-5, rtol=0)
    assert nsa_hf.from_dense(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    assert type(nsa_hf.from_dense(tmp_path, config=str(tmp_path))) is type(own)


def test_what_one_entry_refuses(tmp_path):
    dense = tiny_dense("llama")
    dense.save_pretrained(tmp_path)
    (tmp_path / "model.gguf").touch()
    for source, options, message in [
        (dense, {"top_k": 4}, "unknown option 'top_k': did you mean topk?"),
        (tmp_path, {"top_k": 4}, "unknown option 'top_k': did you mean topk?"),
        (tmp_path, {"revison": "main"}, "unknown option 'revison': did you mean revision?"),
        (dense, {"dtype": torch.float16}, "dtype is for loading, and the model is loaded already"),
        (dense, {"topk": 4, "nsa_topk": 4}, "nsa_topk is given twice"),
        (
            dense,
            {"attn_implementation": "sdpa"},
            "attn_implementation='sdpa' is not one of a sparse",
        ),
        (tmp_path / "model.gguf", {}, "is a file: expected a folder or a Hub id; nsa_hf.convert"),
        (dense.model, {}, "was given a LlamaModel: expected a LlamaForCausalLM"),
        (torch.nn.Linear(2, 2), {}, "got a Linear: give the model itself"),
        (nsa_hf.from_dense(dense, **SIZES), {}, "already a sparse one"),
        (GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)), {}, "the family 'gpt2' cannot be"),
        (tiny_dense("llama").to("meta"), {}, "weights on one device, and this model's are on meta"),
    ]:
        with pytest.raises(NsaError, match=re.escape(message)):
            nsa_hf.from_dense(source, **options)


def lora(dense, **settings):
    """A dense model with a LoRA adapter that changes it."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(dense, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if "lora_" in name else None
    return model.eval()


def test_a_merged_adapter_is_part_of_the_weights():
    adapted = lora(tiny_dense("llama"))
    x = tokens(1, EXACT)
    with torch.no_grad():
        expected = adapted(x).logits
        for source in (adapted, adapted.get_base_model()):
            with pytest.raises(NsaError, match=r"adapter 'default' is not merged .*: give what peft_model.merge"):
                nsa_hf.from_dense(source, **SIZES)
        adapted.merge_adapter()
        for source in (adapted, adapted.get_base_model()):
            model = nsa_hf.from_dense(source, **SIZES)
            torch.testing.assert_close(model(x).logits, expected, atol=5e-5, rtol=0)
            assert all(parameter.requires_grad for parameter in model.parameters())
        adapted.unmerge_adapter()
        torch.testing.assert_close(adapted(x).logits, expected, atol=5e-5, rtol=0)
        merged = nsa_hf.from_dense(adapted.merge_and_unload(), **SIZES)
        torch.testing.assert_close(merged(x).logits, expected, atol=5e-5, rtol=0)


def test_adapters_that_no_merged_weights_hold_are_refused():
    adapted = lora(tiny_dense("llama"), modules_to_save=["lm_head"])
    adapted.merge_adapter()
    with pytest.raises(NsaError, match="adapter 'default' is not merged"):
        nsa_hf.from_dense(adapted, **SIZES)
    peft = pytest.importorskip("peft")
    prompt = peft.get_peft_model(
        tiny_dense("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(NsaError, match="'default' is a learned prompt"):
        nsa_hf.from_dense(prompt, **SIZES)
