"""conversion/tensors.py: names and shapes of a converted model's tensors, and sources that do not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa_hf.conversion.files.pieces import TensorInfo
from nsa_hf.conversion.options import target_config
from nsa_hf.conversion.tensors import converted_tensors
from nsa_hf.errors import NsaError


@pytest.fixture
def dense_config(tiny_config_kwargs) -> LlamaConfig:
    return LlamaConfig(**tiny_config_kwargs, dtype=torch.bfloat16)


def table_of(config: LlamaConfig) -> dict[str, TensorInfo]:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: TensorInfo(tuple(tensor.shape), torch.float32) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_dense_names_and_shapes_are_those_of_the_dense_class(dense_config, tiny_sizes, tied):
    dense_config.tie_word_embeddings = tied
    tensors = converted_tensors(target_config(dense_config, {**tiny_sizes, "dense_layers": [-1]})[0])
    table = table_of(dense_config)
    assert tensors.dense == {name: info.shape for name, info in table.items()}
    assert ("lm_head.weight" in tensors.dense) is not tied
    assert tensors.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert all(".self_attn.nsa." in name for name in tensors.added)
    assert {name.split(".")[2] for name in tensors.added} == {"0", "1"}
    assert tensors.check(table, "src") == list(table)


def test_check_keeps_the_source_s_order_and_passes_over_copies_and_ignored(dense_config):
    tensors = converted_tensors(target_config(dense_config, {})[0])
    table = dict(reversed(table_of(dense_config).items()))
    extra = {
        "lm_head.weight": table["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": TensorInfo((4,), torch.float32),
    }
    assert tensors.check({**extra, **table}, "src") == list(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"src does not hold .*, a LlamaForCausalLM: 1 missing tensors \(model.norm.weight\)$",
        ),
        (lambda t: t.update({"score.weight": t["model.norm.weight"]}), r"1 unknown tensors \(score.weight\)$"),
        (
            lambda t: [t.update({f"model.{name}": t.pop(name)}) for name in list(t)],
            r"29 missing tensors \(.*, and 25 more\) and 29 unknown tensors",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": TensorInfo((8, 48), torch.float32)}),
            r"model.layers.1.self_attn.k_proj.weight has shape \[8, 48\], and the config asks for \[16, 48\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(dense_config, change, message):
    table = table_of(dense_config)
    change(table)
    with pytest.raises(NsaError, match=message):
        converted_tensors(target_config(dense_config, {})[0]).check(table, "src")
