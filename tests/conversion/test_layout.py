"""conversion/layout.py: the tensors of an NSA checkpoint, and the options' names."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa_hf.conversion.files.checkpoint import CheckpointError, TensorInfo
from nsa_hf.conversion.layout import dtype_name, layout_of, nsa_options, parse_dtype, target_config
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
    layout = layout_of(target_config(dense_config, {**tiny_sizes, "dense_layers": [-1]}))
    table = table_of(dense_config)
    assert layout.dense == {name: info.shape for name, info in table.items()}
    assert ("lm_head.weight" in layout.dense) is not tied
    assert layout.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert all(".self_attn.nsa." in name for name in layout.added)
    assert {name.split(".")[2] for name in layout.added} == {"0", "1"}
    assert layout.check(table, "src") == list(table)


def test_check_keeps_the_source_s_order_and_passes_over_copies_and_ignored(dense_config):
    layout = layout_of(target_config(dense_config, {}))
    table = dict(reversed(table_of(dense_config).items()))
    extra = {
        "lm_head.weight": table["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": TensorInfo((4,), torch.float32),
    }
    assert layout.check({**extra, **table}, "src") == list(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"src does not hold .* 1 missing tensors \(model.norm.weight\)$"),
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
    with pytest.raises(CheckpointError, match=message):
        layout_of(target_config(dense_config, {})).check(table, "src")


def test_options_go_with_and_without_prefix():
    assert nsa_options({"topk": 4, "nsa_gate": "blend", "window_size": None}) == {"nsa_topk": 4, "nsa_gate": "blend"}
    with pytest.raises(NsaError, match="'top_k': did you mean topk"):
        nsa_options({"top_k": 4})
    with pytest.raises(NsaError, match=r"'zzzz': choose among kernel_size, "):
        nsa_options({"zzzz": 4})
    with pytest.raises(NsaError, match="'format'"):
        nsa_options({"format": 1})
    with pytest.raises(NsaError, match="nsa_topk is given twice"):
        nsa_options({"topk": 4, "nsa_topk": 5})


def test_target_config_has_the_options_the_dtype_and_the_dense_fields(dense_config):
    config = target_config(dense_config, {"topk": 5})
    assert (config.model_type, config.nsa_topk, config.dtype) == ("nsa_llama", 5, torch.bfloat16)
    assert (config.hidden_size, config.num_key_value_heads, config.tie_word_embeddings) == (48, 2, True)
    assert target_config(dense_config, {}, torch.float16).dtype == torch.float16
    with pytest.raises(NsaError, match="nsa_topk"):
        target_config(dense_config, {"topk": 1})
    with pytest.raises(NsaError, match="already a sparse one"):
        target_config(config, {})


def test_dtypes_by_name():
    assert parse_dtype(None) is None
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is parse_dtype(torch.bfloat16) is torch.bfloat16
    assert dtype_name(torch.float16) == "float16"
    for wrong in ("int8", "auto", torch.int64, torch.float64, 3):
        with pytest.raises(NsaError, match="dtype must be one of float32"):
            parse_dtype(wrong)
