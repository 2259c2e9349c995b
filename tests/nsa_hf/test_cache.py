"""Caches come in: those that sparse attention can use are adopted, the others refused by name."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SELECTORS
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from nsa_hf import NsaError
from nsa_hf.cache.adopt import adopt_layer, static_length
from nsa_hf.cache.branches import NsaIndependentLayer
from nsa_hf.cache.dynamic import NsaDynamicLayer
from nsa_hf.cache.extras import Extras
from nsa_hf.cache.static import NsaStaticLayer
from nsa_hf.index import Index
from nsa_hf.releases import CACHE

CPU = torch.device("cpu")


def states(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, tokens, 6), torch.randn(batch, 2, tokens, 6)


def test_plain_layers_are_adopted_with_what_they_hold(tiny_nsa_model):
    for cache in (DynamicCache(), DynamicCache(config=tiny_nsa_model().config)):
        cache.update(*states(1, 5), 1)
        layer = adopt_layer(cache, 1, Extras((32, 16)), CPU)
        assert isinstance(layer, NsaDynamicLayer) and layer is cache.layers[1] and layer.get_seq_length() == 5
        assert adopt_layer(cache, 1, Extras((32, 16)), CPU) is layer
        assert type(cache.layers[0]) is DynamicLayer


class SomeQuantizedLayer(DynamicLayer):
    """Stands for the quantized ones, whose packages are not installed here."""


def test_other_caches_are_refused_by_name(tiny_nsa_model, monkeypatch):
    # PyTorch built for CUDA has no stream on a machine without a GPU
    monkeypatch.setattr(torch, "Stream", object)
    quantized = Cache(layers=[SomeQuantizedLayer()])
    with pytest.raises(
        NsaError, match=r"cannot use a Cache \(SomeQuantizedLayer\).*Use DynamicCache\(\).*or StaticCache"
    ):
        adopt_layer(quantized, 0, Extras((32, 16)), CPU)
    with pytest.raises(NsaError, match=r"DynamicCache\(offloading=True\) cannot be used: .* do without"):
        adopt_layer(DynamicCache(offloading=True), 0, Extras((32, 16)), CPU)
    with pytest.raises(NsaError, match=r"cannot use a EncoderDecoderCache: .*Use DynamicCache"):
        adopt_layer(EncoderDecoderCache(DynamicCache(), DynamicCache()), 0, Extras((32, 16)), CPU)
    offloaded = StaticCache(tiny_nsa_model().config, max_cache_len=8, offloading=True)
    with pytest.raises(NsaError, match=r"does not support an offloaded static cache: use .*'offloaded'"):
        adopt_layer(offloaded, 0, Extras((32, 16)), CPU)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_is_of_one_compression_only(kind, tiny_nsa_model):
    model, x = tiny_nsa_model(), torch.arange(60)[None]
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=80)
    with torch.no_grad():
        model(x, **{CACHE: cache})
        other = tiny_nsa_model(nsa_kernel_size=4, nsa_kernel_stride=4)
        with pytest.raises(NsaError, match=r"kernel_stride \(8, 4\), and the model needs \(4, 4\): start with a new"):
            other(x[:, :1], **{CACHE: cache})
        if kind == "dynamic":
            cache.reset()
            assert torch.equal(other(x, **{CACHE: cache}).logits, other(x).logits)


COMPRESSED = {"nsa_selector": "compressed", "nsa_selector_bits": 16}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "other, said",
    [
        ({"nsa_selector_bits": 16}, "an index of channels 2-3, 6-7 in 8 bits, .* channels 2-3, 6-7 in 16 bits"),
        ({"nsa_selector_channels": [[0, 1, 4]] * 3}, "channels 2-3, 6-7 in 8 bits, .* channels 0-1, 4 in 8 bits"),
        (COMPRESSED, "an index of channels 2-3, 6-7 in 8 bits, and the model needs none"),
        ({"nsa_compression": "none"}, r"nsa_kernel_stride \(8, 4\), and the model needs none"),
    ],
)
def test_a_cache_is_of_one_index_only(other, said, kind, tiny_nsa_model):
    fields = {"nsa_selector": "channels", "nsa_selector_bits": 8}
    model, x = tiny_nsa_model(**fields), torch.arange(60)[None]
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=80)
    other = tiny_nsa_model(**{**fields, **other})
    with torch.no_grad():
        model(x, **{CACHE: cache})
        with pytest.raises(NsaError, match=f"this cache holds .*{said}: start with a new cache"):
            other(x[:, :1], **{CACHE: cache})
        if kind == "dynamic":
            cache.reset()
            assert torch.equal(other(x, **{CACHE: cache}).logits, other(x).logits)


def test_an_index_is_caught_up_with_where_a_model_without_one_began(tiny_nsa_model):
    """Keys are keys: a dynamic cache makes of them what is missing. The buffers of a static one are made at once."""
    x = torch.randint(3, 250, (1, 90), generator=torch.Generator().manual_seed(0))
    first, second = tiny_nsa_model(), tiny_nsa_model(nsa_selector="channels", nsa_selector_bits=8)
    cache, static = DynamicCache(), StaticCache(first.config, max_cache_len=99)
    with torch.no_grad():
        first(x[:, :60], **{CACHE: cache})
        second(x[:, 60:], **{CACHE: cache})
        layer = cache.layers[1]
        assert torch.equal(layer.index_keys, layer.index.keys(layer.keys).keys)
        first(x[:, :60], **{CACHE: static})
        with pytest.raises(NsaError, match="this cache has no room for an index of channels 2-3"):
            second(x[:, 60:], **{CACHE: static})


def test_a_static_layer_is_adopted_with_room_for_its_entries_and_its_index(tiny_nsa_model):
    cache = StaticCache(tiny_nsa_model().config, max_cache_len=40)
    assert static_length(cache) == (0, 40)
    layer = adopt_layer(cache, 1, Extras((8, 4), Index(((2, 5),), 8)), CPU)
    assert isinstance(layer, NsaStaticLayer) and layer is cache.layers[1]
    layer.update(*states(3, 5))
    assert layer.index_keys.shape == (3, 2, 40, 3) and layer.index_scales.shape == (3, 2, 40)
    assert layer.compressed_keys.shape == (3, 9, 2, 6) and static_length(cache) == (0, 40)
    adopt_layer(cache, 0, Extras((8, 4)), CPU).update(*states(3, 5))
    assert isinstance(static_length(cache)[0], torch.Tensor) and int(static_length(cache)[0]) == 5


def test_keys_and_values_per_branch_have_their_own_layer():
    cache = DynamicCache()
    assert isinstance(adopt_layer(cache, 0, Extras((32, 16), independent=True), CPU), NsaIndependentLayer)
    with pytest.raises(NsaError, match="neither can continue the other's cache"):
        adopt_layer(cache, 0, Extras((32, 16)), CPU)


def test_a_dynamic_cache_is_not_static(tiny_nsa_model):
    assert static_length(None) is None and static_length(DynamicCache()) is None
    assert static_length(DynamicCache(config=tiny_nsa_model().config)) is None


@pytest.mark.parametrize("kind", ["dynamic", "static", "independent"])
@pytest.mark.parametrize("selector", ["compressed", "channels", "channels-8"])
def test_rows_begin_where_they_began(selector, kind, tiny_nsa_model):
    """Entries are of blocks counted from a row's first token: with another mask they would be of no row's blocks."""
    independent = {"nsa_branch_kv": "independent", "nsa_compression": "mlp"} if kind == "independent" else {}
    model = tiny_nsa_model(**{**SELECTORS[selector], **independent})
    x = torch.randint(3, 250, (3, 90), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(90) >= torch.tensor([[0], [37], [9]])).long()
    moved = mask.clone()
    moved[0, :20] = 0

    def filled(*pieces: tuple[int, torch.Tensor | None]):
        cache = StaticCache(model.config, max_cache_len=100) if kind == "static" else DynamicCache()
        start, logits = 0, []
        for end, mask_so_far in pieces:
            mask_so_far = mask_so_far if mask_so_far is None else mask_so_far[:, :end]
            logits.append(model(x[:, start:end], attention_mask=mask_so_far, **{CACHE: cache}).logits)
            start = end
        return cache, torch.cat(logits, 1)

    with torch.no_grad():
        for first, second, begin in ((mask, None, r"\[0, 0, 0\]"), (None, mask, r"\[0, 37, 9\]"), (mask, moved, "20")):
            with pytest.raises(NsaError, match=f"this cache holds rows that begin at .* would begin at .*{begin}"):
                filled((60, first), (90, second))
        # a row that has not begun yet, and one that is done
        whole, gone = model(x, attention_mask=mask).logits, mask.clone()
        gone[2] = 0
        cache, logits = filled((20, mask), (89, mask), (90, gone))
        torch.testing.assert_close(logits[:2][mask[:2] > 0], whole[:2][mask[:2] > 0], atol=1e-5, rtol=0)
        # rows that are put in another order begin where they begin there
        cache, _ = filled((60, mask))
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        logits = model(x[order, 60:], attention_mask=mask[order], **{CACHE: cache}).logits
        torch.testing.assert_close(logits, whole[order, 60:], atol=1e-5, rtol=0)
        cache.reset()
        again = model(x, **{CACHE: cache}).logits
        torch.testing.assert_close(again, model(x).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("selector", ["compressed", "channels"])
def test_dense_forwards_note_where_rows_begin(selector, kind, tiny_nsa_model):
    model, x = tiny_nsa_model(**SELECTORS[selector]), torch.arange(3, 123).view(2, 60)
    mask = (torch.arange(60) >= torch.tensor([[0], [9]])).long()
    cache = StaticCache(model.config, max_cache_len=70) if kind == "static" else DynamicCache()
    with torch.no_grad():
        with model.dense_attention():
            model(x[:, :40], attention_mask=mask[:, :40], **{CACHE: cache})
        for later in (None, torch.ones_like(mask)):
            for context in (torch.no_grad(), model.dense_attention()):
                with context, pytest.raises(NsaError, match=r"rows that begin at token \[0, 9\]"):
                    model(x[:, 40:], attention_mask=later, **{CACHE: cache})
        model(x[:, 40:], attention_mask=mask, **{CACHE: cache})
