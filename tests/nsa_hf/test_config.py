"""The `nsa_*` fields: their rules, their final form, what is refused."""

from __future__ import annotations

import json
import pickle

import pytest
from transformers import AutoConfig, LlamaConfig

import nsa_hf
from nsa_hf import NsaError, NsaLlamaConfig, nsa_config_from_dense
from nsa_hf.kernels import COMPRESSORS


def test_defaults_are_the_papers():
    config = NsaLlamaConfig()
    sizes = config.nsa_sizes
    assert (sizes.kernel_size, sizes.kernel_stride, sizes.block_size, sizes.topk) == (32, 16, 64, 16)
    assert (sizes.init_blocks, sizes.local_blocks, sizes.window_size) == (1, 2, 512)
    assert sizes.exact_tokens == 1024


def test_every_field_is_documented_and_flat():
    assert set(nsa_hf.NSA_FIELDS) <= set(NsaLlamaConfig().to_dict())
    assert all(field.name.startswith("nsa_") and field.metadata["help"] for field in nsa_hf.NSA_FIELDS.values())


def test_every_choice_is_named_in_its_help():
    choices = {name: field.metadata["choices"] for name, field in nsa_hf.NSA_FIELDS.items() if field.type == "str"}
    assert all(choices.values())
    assert choices["nsa_compression"] == (*COMPRESSORS, "none")
    for name, values in choices.items():
        assert nsa_hf.NSA_FIELDS[name].default in values
        assert all(value in nsa_hf.NSA_FIELDS[name].metadata["help"] for value in values)


CHANNELS = {"nsa_selector": "channels"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"nsa_kernel_stride": 24}, "nsa_kernel_stride must divide nsa_kernel_size, got 24 and 32"),
        ({"nsa_selector_dim": 8}, "nsa_selector_dim is of an index, and nsa_selector is 'compressed': leave it out"),
        ({"nsa_selector_bits": 8}, "nsa_selector_bits is of an index"),
        (CHANNELS | {"nsa_selector_channels": [[1, 0]] * 32}, "nsa_selector_channels must be ascending, each once"),
        (
            CHANNELS | {"nsa_selector_channels": [[0, 1]] * 32, "nsa_selector_dim": 4},
            "has 2 channels: give one of them",
        ),
        ({"nsa_selector_channels": [[0, 1]] * 32}, "nsa_selector_channels is of an index"),
        (
            {"nsa_kernel_size": 48, "nsa_kernel_stride": 24},
            "nsa_kernel_stride must divide nsa_block_size, got 24 and 64",
        ),
        ({"nsa_kernel_size": 128}, "nsa_kernel_size must be at most nsa_block_size, got 128 and 64"),
        ({"nsa_topk": 2}, "nsa_topk counts the forced blocks, .* = 3, got 2"),
        ({"nsa_window_size": 0}, "nsa_window_size must be at least 1, got 0"),
        ({"nsa_init_blocks": -1}, "nsa_init_blocks must be at least 0, got -1"),
        ({"nsa_compression": "max"}, "nsa_compression must be one of mean, linear, mlp, none, got 'max'"),
        ({"nsa_gate": "softmax"}, "nsa_gate must be one of residual, sigmoid, blend"),
        ({"nsa_gate_blend": 1.5}, "nsa_gate_blend must be between 0 and 1, got 1.5"),
        ({"nsa_gate_blend": "half"}, "nsa_gate_blend must be between 0 and 1, got 'half'"),
        ({"nsa_gate_dim": 0}, "nsa_gate_dim must be an int of at least 1, got 0"),
        ({"nsa_gate_dim": True}, "nsa_gate_dim must be an int of at least 1, got True"),
        ({"nsa_format": 99}, "nsa_format is 99, .* newer"),
        ({"nsa_rope_order": "pre"}, "nsa_rope_order='pre' is not supported yet"),
        ({"nsa_branch_kv": "own"}, "nsa_branch_kv must be one of shared, independent, got 'own'"),
        ({"nsa_dense_layers": [32]}, "nsa_dense_layers must be layers within -32 .. 31"),
        ({"nsa_dense_layers": 5}, "nsa_dense_layers must be layers within -32 .. 31, got 5"),
    ],
)
def test_broken_rules_name_field_value_and_rule(fields, message):
    with pytest.raises(NsaError, match=message):
        NsaLlamaConfig(**fields)


def test_dense_layers_count_from_the_end_too():
    config = NsaLlamaConfig(num_hidden_layers=4, nsa_dense_layers=[-1, 0, 3])
    assert config.nsa_dense_layers == [0, 3]
    assert [config.is_nsa_layer(layer) for layer in range(4)] == [False, True, True, False]


def test_saved_and_loaded_the_same(tmp_path):
    config = NsaLlamaConfig(nsa_topk=8, nsa_gate="blend", nsa_gate_blend=0.25, nsa_dense_layers=[-1])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    same = {name: value for name, value in loaded.to_dict().items() if name != "_name_or_path"}
    assert type(loaded) is NsaLlamaConfig and same == {name: config.to_dict()[name] for name in same}
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    # an older checkpoint, in which a field of today is missing, loads with its default
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["nsa_gate_dim"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path).nsa_gate_dim == 64


def test_from_dense_keeps_every_dense_field():
    dense = LlamaConfig(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=3e-5, dtype="bfloat16"
    )
    config = nsa_config_from_dense(dense, nsa_topk=4)
    fields = dense.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    assert {name: config.to_dict()[name] for name in fields} == fields
    assert config.model_type == "nsa_llama" and config.architectures == ["NsaLlamaForCausalLM"] and config.nsa_topk == 4


def test_from_dense_refuses_what_it_cannot_convert():
    assert nsa_config_from_dense(LlamaConfig(), topk=4).nsa_topk == 4
    with pytest.raises(NsaError, match="unknown option 'nsa_top_k': did you mean topk"):
        nsa_config_from_dense(LlamaConfig(), nsa_top_k=4)
    with pytest.raises(NsaError, match="already a sparse one"):
        nsa_config_from_dense(NsaLlamaConfig())
    with pytest.raises(NsaError, match=r"'gpt2' cannot be converted: gpt2 has cross-attention"):
        nsa_config_from_dense(AutoConfig.for_model("gpt2"))


def test_channels_that_were_given_stay_with_other_fields():
    config = NsaLlamaConfig(num_hidden_layers=2, **CHANNELS, nsa_selector_channels=[[0, 1]] * 2)
    assert config.with_fields(nsa_topk=5).nsa_selector_channels == [[0, 1]] * 2
    assert config.with_fields(nsa_selector_dim=4).nsa_selector_dim == 4
    assert config.with_fields(nsa_selector="compressed").nsa_selector_channels is None
