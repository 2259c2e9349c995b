"""conversion/options.py: options' names, dtypes, and the config that follows."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from nsa_hf.conversion.options import dtype_name, nsa_options, parse_dtype, target_config
from nsa_hf.errors import NsaError


@pytest.fixture
def dense_config(tiny_config_kwargs) -> LlamaConfig:
    return LlamaConfig(**tiny_config_kwargs, dtype=torch.bfloat16)


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
    config, _ = target_config(dense_config, {"topk": 5})
    assert (config.model_type, config.nsa_topk, config.dtype) == ("nsa_llama", 5, torch.bfloat16)
    assert (config.hidden_size, config.num_key_value_heads, config.tie_word_embeddings) == (48, 2, True)
    assert target_config(dense_config, {}, torch.float16)[0].dtype == torch.float16
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
