"""Models in parts on several devices, and in few bits: what Accelerate's hooks and Transformers' quantisers do.

No second device and no quantiser is needed: hooks run on the CPU and on "meta", quantisers are asked what they choose.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from generation_steps import in_steps, left_padded, tokens
from tiny_families import sparse_of, tiny_dense
from tiny_families import tokens as tiny_tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from nsa_hf.families import define_family
from nsa_hf.releases import CACHE
from nsa_hf.segments import Segments


class Arrived(Exception):
    """Leaves a forward with what a layer was given."""


class Stop(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        raise Arrived(args, kwargs)


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, Segments):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors_in(one)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("inputs", ["padded", "packed", "static"])
def test_a_layer_on_another_device_is_given_all_of_it_there(inputs, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2)
    inputs = left_padded(x, [0, 37])
    if inputs == "packed":
        x, inputs = x[:1], {"cu_seq_lens_q": torch.tensor([0, 60, 150])}
    if inputs == "static":
        inputs[CACHE] = StaticCache(model.config, max_cache_len=160)
    hook = SequentialHook(AlignDevicesHook("meta"), Stop())
    add_hook_to_module(model.model.layers[1], hook)
    with torch.no_grad(), pytest.raises(Arrived) as arrived:
        model(x, **inputs)
    args, kwargs = arrived.value.args
    arrived_tensors = tensors_in([args, kwargs])
    assert len(tensors_in(kwargs["nsa_segments"])) == (2 if inputs == "static" else 1)
    assert len(arrived_tensors) > 3 and all(tensor.is_meta for tensor in arrived_tensors)


@pytest.mark.parametrize("options", [{}, {"nsa_branch_kv": "independent"}])
def test_layers_kept_on_disk(options, tiny_nsa_model, tmp_path):
    model, x = tiny_nsa_model(**options), tokens(2)
    inputs = left_padded(x, [0, 37])
    with torch.no_grad():
        expected = model(x, **inputs).logits
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        assert model.model.layers[1].self_attn.nsa.gate.up.weight.is_meta
        torch.testing.assert_close(model(x, **inputs).logits, expected)
        torch.testing.assert_close(in_steps(model, x, [100, 1, 49], DynamicCache(), **inputs)[1, 37:], expected[1, 37:])


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_loaded_with_most_of_it_on_disk(tied, tmp_path):
    """`device_map="auto"` where memory is short, and saved again from there."""
    dense = tiny_dense("llama", tie_word_embeddings=tied, num_hidden_layers=4)
    model, x = sparse_of(dense, random=True), tiny_tokens(2)
    model.save_pretrained(tmp_path / "whole")
    room = {"cpu": int(0.6 * sum(parameter.nbytes for parameter in model.parameters()))}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", device_map="auto", max_memory=room, offload_folder=tmp_path / "disk"
    )
    places = [loaded.hf_device_map[f"model.layers.{layer}"] for layer in range(4)]
    assert places == ["cpu", "disk", "disk", "disk"]
    assert {parameter.is_meta for parameter in loaded.model.layers[1].self_attn.nsa.parameters()} == {True}
    assert torch.equal(loaded(x).logits, model(x).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(x, **options), model.generate(x, **options))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="auto", low_cpu_mem_usage=True)
    assert torch.equal(again(x).logits, model(x).logits)


def skipped_by_quantisers(model) -> list[str]:
    return HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)


@pytest.mark.parametrize("model_type", ["llama", "afmoe", "jetmoe"])
@pytest.mark.parametrize("part", ["model_class", "causal_lm_class"])
def test_quantisers_leave_gates_and_compressors_alone(model_type, part):
    """Linear layers of few bits take three dimensions at most, and nothing was gained: these are small."""
    config = sparse_of(tiny_dense(model_type), nsa_branch_kv="shared").config
    model = getattr(define_family(model_type), part)(config)
    chosen = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and should_convert_module(name, skipped_by_quantisers(model))
    }
    assert chosen and not any(".nsa." in name for name in chosen)
    weights = {
        name for name, _ in model.named_parameters() if should_convert_module(name, skipped_by_quantisers(model))
    }
    assert weights and not any(".nsa." in name for name in weights), "torchao asks by the parameter's name"
    in_family = set(getattr(define_family(model_type).dense.causal_lm, "_keep_in_fp32_modules", None) or [])
    assert in_family < model._keep_in_fp32_modules


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_not_quantised_has_the_models_dtype(dtype, tiny_nsa_model, tmp_path):
    tiny_nsa_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(tokens(1, 40)).logits.dtype == dtype
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
