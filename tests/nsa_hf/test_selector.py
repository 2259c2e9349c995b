"""Blocks chosen by the channels that RoPE turns slowest (`nsa_selector="channels"`): models, caches, configs."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import EXACT, ROUNDING, SIZES, sparse_of, tiny_config, tiny_dense, tokens
from tiny_models import TINY_SIZES, randomize_nsa, tiny_dense_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import nsa_hf
from nsa_hf import NsaError
from nsa_hf.conversion import convert, export_dense, plan, verify
from nsa_hf.index import Index, IndexKeys
from nsa_hf.kernels import dequantize_index_keys, quantize_index_keys
from nsa_hf.releases import CACHE

COMPRESSIONS = ["none", "mean", "mlp"]
FAMILIES = ["llama", "gemma3_text", "qwen3_moe", "cohere", "exaone4", "lfm2_moe", "hunyuan_v1_dense"]


def tiny_model(compression: str, **fields: object) -> nsa_hf.NsaLlamaForCausalLM:
    options = {**TINY_SIZES, "nsa_selector": "channels", "nsa_compression": compression, **fields}
    model = nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense_model(), **options)
    randomize_nsa(model)
    return model


@pytest.mark.parametrize("compression, bits", [("none", 16), ("none", 8), ("mean", 16), ("mlp", 8)])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_gives_what_one_pass_gives(compression, bits, kind):
    model = tiny_model(compression, nsa_selector_bits=bits)
    x = torch.randint(3, 256, (2, 130), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(x)
    mask[1, :30] = 0
    with torch.no_grad():
        expected = model(x, attention_mask=mask).logits
        cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=140)
        steps = [(0, 70), (70, 96), *((place, place + 1) for place in range(96, 130))]
        logits = [model(x[:, first:end], attention_mask=mask[:, :end], **{CACHE: cache}).logits for first, end in steps]
        difference = (torch.cat(logits, dim=1) - expected) * mask[..., None]
        assert difference.abs().max() < 2e-5
        alone = model(x[1:, 30:]).logits
    assert (expected[1, 30:] - alone[0]).abs().max() < 2e-5


@pytest.mark.parametrize("bits", [16, 8])
def test_generation_with_every_cache_and_after_a_crop(bits):
    model = tiny_model("none", nsa_selector_bits=bits)
    x = torch.randint(3, 256, (2, 90), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(x, use_cache=False, **options)
    for kind in (None, "static"):
        assert torch.equal(model.generate(x, cache_implementation=kind, **options), expected)
    assert torch.equal(model.generate(x[:1], num_beams=3, **options)[:, :90], x[:1])
    cache = DynamicCache()
    with torch.no_grad():
        model(x, **{CACHE: cache})
        cache.crop(-20)
        again = model(x[:, 70:], **{CACHE: cache}).logits
        assert (again - model(x).logits[:, 70:]).abs().max() < 2e-5


@pytest.mark.parametrize("bits", [16, 8])
def test_a_static_cache_has_no_buffers_for_what_there_is_not(bits):
    x = torch.randint(3, 256, (1, 20))
    for compression, entries in (("none", set()), ("mean", {"compressed_keys", "compressed_values"})):
        model = tiny_model(compression, nsa_selector_bits=bits)
        cache = StaticCache(model.config, max_cache_len=64)
        with torch.no_grad():
            model(x, **{CACHE: cache})
        held = {name for name, value in vars(cache.layers[0]).items() if isinstance(value, torch.Tensor)}
        index = {"index_keys", "index_scales"} if bits == 8 else {"index_keys"}
        assert held == {"keys", "values", "cumulative_length"} | index | entries


def test_another_mask_than_before_is_refused():
    model, x = tiny_model("none"), torch.randint(3, 256, (2, 60))
    mask, cache = torch.ones_like(x), DynamicCache()
    mask[1, :9] = 0
    with torch.no_grad():
        model(x[:, :50], attention_mask=mask[:, :50], **{CACHE: cache})
        with pytest.raises(NsaError, match="attention_mask: this cache holds rows that begin at token"):
            model(x[:, 50:], **{CACHE: cache})


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_training_reaches_every_parameter(compression):
    model = tiny_model(compression).train()
    x = torch.randint(3, 256, (1, 120))
    model(x, labels=x).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    added = {name.rpartition(".nsa.")[2] for name, _ in model.named_parameters() if ".nsa." in name}
    assert any(name.startswith("compress_") for name in added) is (compression == "mlp")


def test_what_is_chosen_follows_from_the_slowest_channels_alone():
    """The same model with its other channels of queries and keys changed by a rotation chooses the same blocks."""
    model, x = tiny_model("none", nsa_selector_dim=4), torch.randint(3, 256, (1, 200))
    channels = model.config.nsa_selector_channels[0]
    assert channels == [2, 3, 6, 7]
    with torch.no_grad(), model.record_selection() as chosen:
        model(x)
    before = chosen[0].clone()
    attention = model.model.layers[0].self_attn
    fast = [channel for channel in range(8) if channel not in channels]
    with torch.no_grad(), model.record_selection() as chosen:
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.view(-1, 8, 48)[:, fast] *= 0.1
        model(x)
    assert torch.equal(chosen[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_start_exact(family):
    dense, x = tiny_dense(family), tokens()
    model = sparse_of(dense, nsa_selector="channels", nsa_compression="none")
    with torch.no_grad():
        expected = dense(x).logits
        difference = (model(x).logits - expected).abs().amax((0, 2))
        assert difference[:EXACT].max() < ROUNDING and difference[EXACT + 2 :].max() > 1e-4
        with model.dense_attention():
            assert (model(x).logits - expected).abs().max() < ROUNDING


def test_converted_verified_and_back(tiny_dense_dir, tmp_path):
    options = {**TINY_SIZES, "nsa_selector": "channels", "nsa_compression": "none"}
    assert plan(tiny_dense_dir, **options)["parameters"]["added"] == 3 * (48 * 64 + 64 + 64 * 18 + 18)
    out = convert(tiny_dense_dir, tmp_path / "out", **options)
    assert verify(tiny_dense_dir, out, length=150, documents=1)["exact"] is True
    config = AutoConfig.from_pretrained(out)
    assert config.nsa_selector_channels == [[2, 3, 6, 7]] * 3 and config.nsa_selector_dim == 4
    assert config.nsa_format == 2
    model, x = AutoModelForCausalLM.from_pretrained(out), torch.randint(3, 256, (1, 100))
    made = nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense_dir, **options)
    with torch.no_grad():
        assert torch.equal(model(x).logits, made(x).logits)
    report = export_dense(out, tmp_path / "back")
    assert report["as_in_source"] == report["tensors"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nsa_selector": "random"}, "nsa_selector must be one of compressed, channels, got 'random'"),
        ({"nsa_compression": "none"}, "nsa_compression='none' needs nsa_selector='channels', got 'compressed'"),
        (
            {"nsa_compression": "none", "nsa_selector": "channels", "nsa_branch_kv": "independent"},
            "needs nsa_branch_kv='shared', got 'independent'",
        ),
        ({"nsa_selector": "channels", "nsa_selector_dim": 0}, "nsa_selector_dim must be an int within 1 .. 256"),
        ({"nsa_selector": "channels", "nsa_selector_dim": 9}, "a head has 8 channels, and 9 of them were asked for"),
        ({"nsa_selector_bits": 4}, "nsa_selector_bits must be 16 .* or 8 .*, got 4"),
        ({"nsa_selector_bits": 8.0}, "nsa_selector_bits must be 16 .* or 8 .*, got 8.0"),
        ({"nsa_selector": "channels", "nsa_selector_channels": [[1], []]}, "must be within 0 .. 7, got none"),
        ({"nsa_selector": "channels", "nsa_selector_channels": [[1]]}, "for each of 2 layers, got"),
        ({"nsa_selector": "channels", "nsa_selector_channels": [[1], [99]]}, "channels must be within 0 .. 7, got 99"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(NsaError, match=message):
        sparse_of(tiny_dense("llama"), **fields)


def test_a_family_without_rotation_is_refused_where_channels_are_asked_for():
    with pytest.raises(NsaError, match="is not turned together with one other channel"):
        nsa_hf.nsa_config_from_dense(tiny_config("ctrl"), **{**SIZES, "nsa_selector": "channels"})


def test_configs_load_that_lack_fields(tmp_path):
    """They mean what they meant when they were saved, whatever new ones are by default."""
    options = {**TINY_SIZES, "nsa_selector": "channels"}
    config = nsa_hf.nsa_config_from_dense(tiny_dense_model().config, **options)
    fields = config.to_dict()
    del fields["nsa_selector_bits"]
    assert type(config).from_dict(fields).nsa_selector_bits == 16
    assert type(config).from_dict({**fields, "nsa_selector_bits": 8}).nsa_selector_bits == 8
    old = {name: value for name, value in fields.items() if "selector" not in name} | {"nsa_format": 1}
    (tmp_path / "config.json").write_text(json.dumps(old))
    old = AutoConfig.from_pretrained(tmp_path)
    assert old.nsa_selector == "compressed" and old.nsa_selector_channels is None and old.nsa_selector_bits == 16


def test_with_8_bits_blocks_are_chosen_by_the_quantised_keys():
    """With and without a cache, asked for weights or not: by what the operation makes of them."""
    x = torch.randint(3, 256, (1, 150), generator=torch.Generator().manual_seed(1))
    chosen = {}
    for bits in (16, 8):
        model = tiny_model("none", nsa_selector_bits=bits)
        with torch.no_grad(), model.record_selection() as record:
            model(x, use_cache=False)
            chosen[bits] = dict(record)
            for more in ({"use_cache": True}, {"output_attentions": True}, {"output_attentions": True, CACHE: None}):
                model(x, **more)
                assert all(torch.equal(record[layer], chosen[bits][layer]) for layer in record), more
    model = tiny_model("none", nsa_selector_bits=16)
    nothing_lost = Index.keys

    def rounded(index: Index, keys: torch.Tensor) -> IndexKeys:
        codes, scales = quantize_index_keys(nothing_lost(index, keys).keys)
        return IndexKeys(dequantize_index_keys(codes, scales, keys.dtype), None)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), model.record_selection() as record:
        patch.setattr(Index, "keys", rounded)
        model(x)
    # the first layer's keys do not depend on what is chosen
    assert torch.equal(record[0], chosen[8][0]) and not torch.equal(record[0], chosen[16][0])
