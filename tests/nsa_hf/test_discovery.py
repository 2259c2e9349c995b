"""nsa_hf/discovery.py: reading a family off its classes. (All families: test_families.py.)"""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from tiny_families import SIZES, tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

import nsa_hf
from nsa_hf import families
from nsa_hf.discovery import (
    attention_arguments,
    causal_model_types,
    families_by_class_name,
    find_family,
    names_of,
    parts_of,
)
from nsa_hf.errors import NotPlain
from nsa_hf.families import define_family, nsa_config_from_dense


def test_the_classes_of_a_family():
    family = find_family("mistral")
    assert family.layers == {modeling_mistral.MistralDecoderLayer: modeling_mistral.MistralAttention}
    assert family.model is modeling_mistral.MistralModel and family.causal_lm is modeling_mistral.MistralForCausalLM
    assert family.masks_slide and not family.is_recurrent and not find_family("llama").masks_slide
    assert find_family("qwen3_next").is_recurrent


def test_what_an_attention_hands_over():
    assert set(attention_arguments(modeling_llama.LlamaAttention)) == {"dropout", "scaling"}
    assert set(attention_arguments(modeling_mistral.MistralAttention)) == {"dropout", "scaling", "sliding_window"}


def test_layers_that_keep_their_arguments_from_their_attention_are_seen():
    (layer,) = find_family("nemotron").layers
    assert find_family("nemotron").attention_without_kwargs(layer) == "self_attn"
    (layer,) = find_family("llama").layers
    assert find_family("llama").attention_without_kwargs(layer) is None


def test_parts_are_found_in_tables_and_helpers_too():
    names = {part.__name__ for part in parts_of(find_family("jamba").model)}
    assert {"JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"} <= names
    assert "DynamicCache" in names_of(modeling_llama.LlamaModel.forward)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("vit", "vit is not among Transformers .* causal language models"),
        ("gpt2", r"cross-attention \(encoder_hidden_states\)"),
        ("deepseek_v3", r"latent attention \(MLA, kv_lora_rank\)"),
        ("gemma3", r"several models in one, as multimodal ones are \(text_config"),
        ("mamba", "no attention at all"),
        ("bloom", r"ALiBi, .* \(BloomAttention\)"),
        ("xlnet", r"does not go through Transformers' attention interface \(XLNetRelativeAttention\)"),
    ],
)
def test_reasons(model_type, message):
    with pytest.raises(NotPlain, match=message):
        find_family(model_type)


def test_the_classes_are_attributes_by_name():
    assert nsa_hf.NsaQwen3ForCausalLM is define_family("qwen3").causal_lm_class
    assert nsa_hf.NsaGemma3TextModel is define_family("gemma3_text").model_class
    with pytest.raises(AttributeError, match=r"there is no NsaGPT2LMHeadModel: gpt.* has cross-attention"):
        _ = nsa_hf.NsaGPT2LMHeadModel
    with pytest.raises(AttributeError, match="no attribute 'NsaNothing'"):
        _ = nsa_hf.NsaNothing
    assert not hasattr(nsa_hf, "NsaQwen3Nothing") and not hasattr(nsa_hf, "torch")


def test_an_attention_that_would_stay_dense_is_an_error(monkeypatch):
    family = define_family("llama")
    without = {
        dense: sparse for dense, sparse in family.model_class.sparse_classes.items() if "Attention" not in str(dense)
    }
    for model_class in (family.model_class, family.causal_lm_class):
        monkeypatch.setattr(model_class, "sparse_classes", without)
        with pytest.raises(NotPlain, match=r"LlamaAttention is not among the attentions of the family's layers"):
            model_class(nsa_config_from_dense(tiny_config("llama"), **SIZES))


def test_import_makes_no_family_and_auto_config_finds_them_all():
    code = """
import sys, nsa_hf, transformers
from transformers import AutoConfig
made = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
assert set(made) <= {"transformers.models.auto.modeling_auto"}, made
assert type(AutoConfig.for_model("nsa_qwen3")) is nsa_hf.NsaQwen3Config
assert type(AutoConfig.for_model("qwen3")) is transformers.Qwen3Config
assert AutoConfig.for_model("nsa_granitemoehybrid").model_type == "nsa_granitemoehybrid"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def made_names() -> dict[str, str]:
    """The names of all sparse classes, each to the family that makes it."""
    names: dict[str, str] = {}
    for model_type in causal_model_types():
        try:
            dense = define_family(model_type).dense
        except NotPlain:
            continue
        for part in {dense.config, dense.model, dense.causal_lm, *dense.layers, *dense.layers.values()}:
            name = dense.sparse_name(part)
            assert names.setdefault(name, model_type) == model_type, f"two classes are called {name}"
    return names


FIRST_THING = """
import inspect, pickle, sys, threading
import nsa_hf

def found_by_four(name):
    classes = []
    threads = [threading.Thread(target=lambda: classes.append(getattr(nsa_hf, name))) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(classes) == 4 and len(set(classes)) == 1, (name, classes)
    return classes[0]

part, *names = sys.argv[1:]
assert pickle.load(open(part, "rb")).__name__ == "NsaCTRLEncoderLayer"
assert [found_by_four(name).__name__ for name in names] == names
assert not hasattr(nsa_hf, "Nsa") and not hasattr(nsa_hf, "NsaGemma3Nothing") and not hasattr(nsa_hf, "__path_")
assert all(hasattr(nsa_hf, name) for name in dir(nsa_hf)) and inspect.getmembers(nsa_hf)
from nsa_hf import *
"""


def test_every_class_is_found_by_its_name_whatever_was_made_before(tmp_path):
    names = made_names()
    for name, model_type in names.items():
        assert model_type in families_by_class_name(name), f"{name} is not found"
    # those that another family could have too: several models in one, of which one is of text
    shared = [name for name, owner in names.items() if families_by_class_name(name)[0] != owner]
    first = [name for name in shared if name.endswith("ForCausalLM")]
    assert {"NsaGemma3ForCausalLM", "NsaQwen3_5ForCausalLM"} <= set(first)
    part = tmp_path / "part"
    part.write_bytes(pickle.dumps(families.NsaCTRLEncoderLayer))
    command = [sys.executable, "-c", FIRST_THING, str(part), *first]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_families_that_borrow_llamas_classes_have_sparse_ones_of_their_own():
    borrowing = [name for name, lm in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if lm == "LlamaForCausalLM"]
    sparse = [define_family(name) for name in (*borrowing, "mistral")]
    for classes in ("config_class", "model_class", "causal_lm_class"):
        names = [getattr(family, classes).__name__ for family in sparse]
        assert len(set(names)) == len(names) == len(borrowing) + 1
        assert all(
            getattr(nsa_hf, name) is getattr(family, classes) for name, family in zip(names, sparse, strict=True)
        )
