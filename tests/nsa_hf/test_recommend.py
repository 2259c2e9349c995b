"""nsa_hf/recommend.py: what a conversion chooses, and that what was given is never changed."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_families import refusal, sparse_of, tiny_config, tiny_dense
from tiny_models import TINY_SIZES, tiny_dense_model
from transformers import GPT2Config, Lfm2Config, LlamaConfig

import nsa_hf
from nsa_hf import NsaError
from nsa_hf.channels import slowest_channels
from nsa_hf.discovery import causal_model_types
from nsa_hf.errors import NotPlain
from nsa_hf.fields import NSA_FIELDS
from nsa_hf.recommend import INDEX, PAPER, chosen_fields, recommend

HALVES = [2, 3, 6, 7]
INDEXED, PAPERS, BOTH = ("channels", "none"), ("compressed", "mlp"), ("channels", "mlp")


def way(**given: object) -> tuple[str, str]:
    """Selector and compression that are chosen beside what is given."""
    fields = chosen_fields(recommend(tiny_config("llama"), given))
    assert {name: fields.get(name, value) for name, value in given.items()} == given
    return fields["nsa_selector"], fields["nsa_compression"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, INDEXED),
        # what neither way has for itself
        ({"nsa_topk": 32, "nsa_block_size": 32, "nsa_init_blocks": 0, "nsa_local_blocks": 1}, INDEXED),
        ({"nsa_window_size": 64, "nsa_dense_layers": [0], "nsa_gate_dim": 8}, INDEXED),
        ({"nsa_gate": "residual", "nsa_branch_kv": "shared"}, INDEXED),
        ({"nsa_gate": "blend", "nsa_gate_blend": 0.0}, INDEXED),
        # what only an index has a use for
        ({"nsa_selector_dim": 4}, INDEXED),
        ({"nsa_selector_bits": 16}, INDEXED),
        ({"nsa_compression": "none"}, INDEXED),
        # what only the compressed branch, or the paper's gates, have a use for
        ({"nsa_compression": "mean"}, ("compressed", "mean")),
        ({"nsa_compression": "mlp"}, PAPERS),
        ({"nsa_compression_dim": 8}, PAPERS),
        ({"nsa_kernel_size": 32}, PAPERS),
        ({"nsa_kernel_stride": 8}, PAPERS),
        ({"nsa_rope_order": "post"}, PAPERS),
        ({"nsa_rope_order": "pre"}, PAPERS),
        ({"nsa_branch_kv": "independent"}, PAPERS),
        ({"nsa_gate": "sigmoid"}, PAPERS),
        ({"nsa_gate": "blend", "nsa_gate_blend": 0.5}, PAPERS),
        # both
        ({"nsa_selector_dim": 4, "nsa_kernel_size": 16}, BOTH),
        ({"nsa_selector_dim": 4, "nsa_compression": "linear"}, ("channels", "linear")),
        ({"nsa_compression": "none", "nsa_kernel_stride": 8}, INDEXED),
        # by name
        ({"nsa_selector": "compressed"}, PAPERS),
        ({"nsa_selector": "channels"}, INDEXED),
        ({"nsa_selector": "channels", "nsa_kernel_size": 16}, BOTH),
        ({"nsa_selector": "channels", "nsa_branch_kv": "independent"}, BOTH),
        ({"nsa_selector": "channels", "nsa_compression": "mean"}, ("channels", "mean")),
        # left to the config's rules, which refuse them
        ({"nsa_selector": "compressed", "nsa_compression": "none"}, ("compressed", "none")),
        ({"nsa_selector": "random", "nsa_compression": "max"}, ("random", "max")),
    ],
    ids=str,
)
def test_what_is_chosen_beside_what_is_given(given, expected):
    assert way(**given) == expected


def test_every_option_of_a_rule_is_a_field_and_no_other_changes_the_way():
    assert {*INDEX, *PAPER} < {*NSA_FIELDS}
    others = {name for name in NSA_FIELDS if name not in {*INDEX, *PAPER, "nsa_selector"}}
    assert all(way(**{name: NSA_FIELDS[name].default}) == INDEXED for name in others - {"nsa_dense_layers"})


@pytest.mark.parametrize("block", [1, 8, 16, 24, 48, 64, 128])
@pytest.mark.parametrize("given", [{}, {"nsa_compression": "none"}])
def test_blocks_of_any_size_need_no_sizes_of_entries_that_there_are_not(block, given):
    config = nsa_hf.nsa_config_from_dense(tiny_config("llama"), nsa_block_size=block, **given)
    assert (config.nsa_selector, config.nsa_compression, config.nsa_block_size) == (*INDEXED, block)
    usual = (config.nsa_kernel_size, config.nsa_kernel_stride) == (32, 16)
    assert usual == (block in (64, 128))
    with pytest.raises(NsaError, match="nsa_kernel_size must be at most nsa_block_size, got 32 and 16"):
        nsa_hf.nsa_config_from_dense(tiny_config("llama"), nsa_block_size=16, nsa_kernel_size=32)


def test_half_of_each_heads_channels_as_if_they_had_been_asked_for():
    dense = tiny_dense_model().config
    chosen, asked = (
        nsa_hf.nsa_config_from_dense(dense, **fields)
        for fields in ({}, {"nsa_selector": "channels", "nsa_compression": "none"})
    )
    assert chosen.to_dict() == asked.to_dict()
    assert (chosen.nsa_selector_dim, chosen.nsa_selector_channels) == (4, [HALVES] * 3)
    assert nsa_hf.nsa_config_from_dense(dense, nsa_selector=None, nsa_compression=None).to_dict() == chosen.to_dict()


def test_the_papers_way_is_what_a_config_has_by_itself():
    dense = tiny_dense_model().config
    asked = nsa_hf.nsa_config_from_dense(dense, nsa_selector="compressed").to_dict()
    alone = nsa_hf.NsaLlamaConfig(**{name: value for name, value in asked.items() if not name.startswith("nsa_")})
    assert alone.to_dict() == asked
    assert {name: asked[name] for name in NSA_FIELDS} == {
        **{name: field.default for name, field in NSA_FIELDS.items()},
        "nsa_dense_layers": [],
    }


def test_a_model_in_memory_is_converted_the_same_way():
    model = nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense_model())
    assert (model.config.nsa_selector, model.config.nsa_compression) == INDEXED
    assert not [name for name, _ in model.named_parameters() if "compress" in name]
    x = torch.randint(3, 256, (1, 50))
    with torch.no_grad(), model.dense_attention():
        dense = model(x).logits
    with torch.no_grad():
        assert (model(x).logits - dense).abs().max() < 1e-5


def test_where_channels_cannot_be_found_it_is_the_papers_way_and_said():
    dense = tiny_dense("ctrl")
    with pytest.warns(UserWarning, match="nsa_selector is compressed: which channels RoPE turns slowest could not be"):
        choice = recommend(dense.config, {})["selector"]
    assert choice.fields == {"nsa_selector": "compressed"} and not choice.given
    assert choice.why.endswith("channel 0 is not turned together with one other channel")
    with pytest.warns(UserWarning, match="nsa_selector is compressed"):
        config = nsa_hf.nsa_config_from_dense(dense.config)
    assert (config.nsa_selector, config.nsa_compression) == PAPERS
    # asked for, by its name or by what needs it
    for given in ({"nsa_selector": "channels"}, {"nsa_selector_dim": 4}, {"nsa_compression": "none"}):
        with pytest.raises(NsaError, match="is not turned together with one other channel"):
            nsa_hf.nsa_config_from_dense(dense.config, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparse_of(dense).config.nsa_selector == "compressed"


def test_what_is_refused_is_refused_without_a_word_on_channels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NsaError, match="already a sparse one"):
            nsa_hf.nsa_config_from_dense(nsa_hf.nsa_config_from_dense(LlamaConfig(), **TINY_SIZES))
        with pytest.raises(NsaError, match="the family 'gpt2' cannot be converted"):
            nsa_hf.nsa_config_from_dense(GPT2Config())
        with pytest.raises(NsaError, match="no layer has full attention"):
            nsa_hf.nsa_config_from_dense(Lfm2Config(layer_types=["conv"] * 2, num_hidden_layers=2))


def test_reasons_are_of_one_line_and_name_what_decided():
    choices = recommend(tiny_config("llama"), {"nsa_kernel_size": 8, "nsa_gate": "sigmoid", "nsa_topk": 4})
    assert list(choices) == ["selector", "compression", "blocks", "dense_layers"]
    assert choices["selector"].why.startswith("nsa_kernel_size=8 and nsa_gate=sigmoid belongs to the paper's way")
    assert choices["blocks"].given and choices["blocks"].fields == {"nsa_topk": 4, "nsa_block_size": 64}
    assert not any("\n" in choice.why + choice.hint for choice in choices.values())
    assert all(choice.why for choice in choices.values())


def test_every_family_but_one_has_channels_to_choose_by():
    supported = [model_type for model_type in causal_model_types() if refusal(model_type) is None]
    without = []
    for model_type in supported:
        try:
            assert any(slowest_channels(tiny_config(model_type), None)), model_type
        except NotPlain:
            without.append(model_type)
    assert without == ["ctrl"] and len(supported) > 60
