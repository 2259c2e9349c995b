"""nsa_hf/sliding.py: layers with a window of their own, beside Transformers' mask for them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_families import sparse_of, tiny_dense, tokens
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DataCollatorWithFlattening, DynamicCache, StaticCache

from nsa_hf import NsaError, sliding
from nsa_hf.releases import CACHE
from nsa_hf.segments import Segments
from nsa_hf.sliding import sliding_attention


@pytest.fixture(params=[16, 512], ids=["several chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(sliding, "LEAST_CHUNK", request.param)


def model_and_dense(**options):
    """All blocks selected: the sparse layers are dense, and what differs would come from the sliding ones."""
    dense = tiny_dense("gemma3_text", layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4)
    return sparse_of(dense, nsa_topk=20, **options), dense


def test_as_the_dense_model_with_its_mask(chunk):
    model, dense = model_and_dense()
    assert [layer.window for layer in model.attention_layers()] == [24, None] * 2
    x = tokens(2, 150)
    mask = torch.ones_like(x)
    mask[1, :37] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, dense(x).logits, atol=5e-5, rtol=0)
        padded, expected = (one(x, attention_mask=mask).logits for one in (model, dense))
    torch.testing.assert_close(padded[0], expected[0], atol=5e-5, rtol=0)
    torch.testing.assert_close(padded[1, 37:], expected[1, 37:], atol=5e-5, rtol=0)


@pytest.mark.parametrize("configured", [True, False], ids=["windows in the cache", "a plain DynamicCache"])
def test_in_pieces_through_a_cache(chunk, configured):
    model, dense = model_and_dense()
    x = tokens(2, 150)
    mask = torch.ones_like(x)
    mask[1, :37] = 0
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    pieces, start = [], 0
    with torch.no_grad():
        whole = dense(x, attention_mask=mask).logits
        for length in (70, 1, 1, 50, 28):
            seen = start + length
            out = model(x[:, start:seen], attention_mask=mask[:, :seen], **{CACHE: cache})
            pieces, start = [*pieces, out.logits], seen
    together = torch.cat(pieces, 1)
    torch.testing.assert_close(together[0], whole[0], atol=5e-5, rtol=0)
    torch.testing.assert_close(together[1, 37:], whole[1, 37:], atol=5e-5, rtol=0)
    if configured:
        assert cache.layers[0].keys.shape[2] == 23, "a sliding layer's cache holds its window only"


def test_packed_documents_do_not_see_each_other(chunk):
    model, _ = model_and_dense()
    documents = [tokens(1, length, seed)[0] for seed, length in enumerate((70, 5, 90))]
    packed = DataCollatorWithFlattening()([{"input_ids": document.tolist()} for document in documents])
    packed.pop("labels")
    with torch.no_grad():
        together = model(**packed).logits[0]
        alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(together, alone, atol=5e-5, rtol=0)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for output in out if isinstance(out, tuple) else (out,):
            self.most = max(self.most, output.numel() if isinstance(output, torch.Tensor) else 0)
        return out


def test_no_numbers_for_every_pair_of_tokens():
    """32,768 tokens have a thousand million pairs; a chunk of 512 with its window half a million."""
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
    q = torch.randn(1, 1, 32768, 8)
    starts = torch.tensor([5], dtype=torch.int32)
    with torch.no_grad(), Largest() as largest:
        out = sliding_attention(module, q, q, q, None, 0.0, 512, Segments(starts=starts))
    assert out.shape == (1, 32768, 1, 8) and out.isfinite().all()
    assert 2**18 <= largest.most < 2**21


def test_nor_in_a_whole_model():
    model, _ = model_and_dense()
    with torch.no_grad(), Largest() as largest:
        model.model(tokens(1, 4096), use_cache=False)
    assert largest.most < 4096**2 / 4


@pytest.mark.parametrize("steps", [[10, *[1] * 30, 60], [24, *[1] * 30], [23, 1, 1, 5], [25, 3, *[1] * 20], [150]])
def test_in_pieces_through_a_static_cache(chunk, steps):
    model, dense = model_and_dense()
    x = tokens(2, 150)
    mask = torch.ones_like(x)
    mask[1, :37] = 0
    cache, done = StaticCache(model.config, max_cache_len=160), 0
    with torch.no_grad():
        expected = dense(x, attention_mask=mask).logits
        for length in steps:
            now = slice(done, done + length)
            out = model(x[:, now], attention_mask=mask[:, : now.stop], **{CACHE: cache}).logits
            done = now.stop
            torch.testing.assert_close(out[0], expected[0, now], atol=5e-5, rtol=0)
            first = max(37, now.start)
            torch.testing.assert_close(out[1, first - now.start :], expected[1, first : now.stop], atol=5e-5, rtol=0)


def test_a_static_cache_shorter_than_the_window():
    model, dense = model_and_dense()
    x, cache = tokens(2, 20), StaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        out = torch.cat([model(x[:, i : i + 1], **{CACHE: cache}).logits for i in range(20)], dim=1)
        torch.testing.assert_close(out, dense(x).logits, atol=5e-5, rtol=0)


def test_generate_compiles_few_graphs():
    """One before the window is full, one after; Transformers counts these layers' tokens on the host."""
    model = sparse_of(tiny_dense("gemma3_text", layer_types=["sliding_attention", "full_attention"]))
    x = tokens(1, 15)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(x)}
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    out = model.generate(x, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(out, model.generate(x, **options))
    assert counters["stats"]["unique_graphs"] <= 3


LAYERS = ["full_attention", "sliding_attention"]


def check_goes_on(model, dense, cache, x, length: int) -> None:
    with torch.no_grad():
        out = model(x[:, length : length + 20], **{CACHE: cache}).logits
        torch.testing.assert_close(out, dense(x[:, : length + 20]).logits[:, length:], atol=5e-5, rtol=0)


@pytest.mark.parametrize("removed", [1, 5, 6, 9, 45])
def test_a_crop_deeper_than_was_recorded_is_refused(removed):
    model, dense = model_and_dense()
    x, cache = tokens(1, 150), DynamicCache(config=model.config)
    with torch.no_grad():
        model(x[:, :60], **{CACHE: cache})
        cache.activate_past_recording()
        model(x[:, 60:65], **{CACHE: cache})
    cache.crop(-removed)
    if removed <= 5:
        check_goes_on(model, dense, cache, x, 65 - removed)
        return
    with pytest.raises(NsaError, match=r"window of 24 .*activate_past_recording"):
        model(x[:, 65 - removed : 70], **{CACHE: cache})
    cache.reset()
    check_goes_on(model, dense, cache, x, 0)


def test_a_cache_with_a_recorded_or_short_past_is_cropped():
    model, dense = model_and_dense()
    x = tokens(1, 150)
    for first, recorded, removed in ((60, 45, 45), (60, 45, 30), (15, 0, 9)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(x[:, :first], **{CACHE: cache})
            if recorded:
                cache.activate_past_recording()
                model(x[:, first : first + recorded], **{CACHE: cache})
        cache.crop(-removed)
        check_goes_on(model, dense, cache, x, first + recorded - removed)


@pytest.mark.parametrize("kinds", [LAYERS, LAYERS[::-1]])
@pytest.mark.parametrize("removed", [5, 100])
def test_a_crop_that_stopped_halfway_leaves_no_cache_to_go_on_with(kinds, removed):
    model = sparse_of(tiny_dense("gemma3_text", layer_types=kinds, num_hidden_layers=2))
    x, cache = tokens(1, 150), DynamicCache(config=model.config)
    with torch.no_grad():
        model(x[:, :60], **{CACHE: cache})
        if removed == 100:
            cache.activate_past_recording()
            cache.crop(-removed)  # more than there is: Transformers' layers differ in what they make of it
        else:
            with pytest.raises(RuntimeError, match="does not track past states"):
                cache.crop(-removed)
            if kinds[0] == "sliding_attention":
                return  # refused before anything was cropped
        with pytest.raises(NsaError, match=r"layer [01] of this cache holds -?\d+ tokens and the first -?\d+"):
            model(x[:, 60:65], **{CACHE: cache})


@pytest.mark.parametrize("kinds", [LAYERS, LAYERS[::-1]])
@pytest.mark.parametrize("steps, removed", [([20, 30], 40), ([60, 1], 1), ([20, 5], 3)])
def test_a_static_window_is_not_cropped_to_what_it_has_overwritten(kinds, steps, removed):
    dense = tiny_dense("gemma3_text", layer_types=kinds, num_hidden_layers=2)
    model = sparse_of(dense, nsa_topk=20)
    x, cache = tokens(1, 150), StaticCache(model.config, max_cache_len=160)
    with torch.no_grad():
        for start, stop in ((0, steps[0]), (steps[0], sum(steps))):
            model(x[:, start:stop], **{CACHE: cache})
        with pytest.raises(NsaError, match=f"cannot remove {removed} tokens of {sum(steps)}: .* window of 24"):
            cache.crop(-removed)
        # nor gone on with, because other layers may have been cropped
        with pytest.raises(NsaError, match="cannot remove"):
            for place in range(2):
                model(x[:, place : place + 1], **{CACHE: cache})
        cache.reset()
    check_goes_on(model, dense, cache, x, 0)


@pytest.mark.parametrize("held, removed", [(24, 3), (15, 5), (15, 100)])
def test_a_static_window_that_was_never_full_is_cropped(held, removed):
    model, dense = model_and_dense()
    x, cache = tokens(1, 150), StaticCache(model.config, max_cache_len=160)
    with torch.no_grad():
        model(x[:, :held], **{CACHE: cache})
    cache.crop(-removed)
    check_goes_on(model, dense, cache, x, max(0, held - removed))


@pytest.mark.parametrize("assistant", ["itself", "lookup"])
def test_assisted_decoding_gives_the_same_tokens(assistant):
    model, _ = model_and_dense()
    x = tokens(1, 20).repeat(1, 3)
    helper = {"prompt_lookup_num_tokens": 4}
    if assistant == "itself":
        helper = {"assistant_model": sparse_of(tiny_dense("gemma3_text", layer_types=LAYERS), random=True)}
    options = {"max_new_tokens": 24, "attention_mask": torch.ones_like(x), "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(x, **helper, **options), model.generate(x, **options))


CACHES = {
    None: lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=64),
}


@pytest.mark.parametrize("dense_mode", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_attentions_of_every_layer(kind, dense_mode):
    """Padded, in pieces and with a cache: as the dense model's eager function has them, where a row has tokens."""
    model, dense = model_and_dense(nsa_dense_layers=[3])
    dense.set_attn_implementation("eager")
    x = tokens(2, 60)
    mask = torch.ones_like(x)
    mask[1, :17] = 0
    steps, pairs = [(0, 60)] if kind is None else [(0, 15), (15, 40), *((i, i + 1) for i in range(40, 60))], []
    for one in (model, dense):
        with torch.no_grad(), one.dense_attention() if dense_mode and one is model else nullcontext():
            cache = CACHES[kind](one.config)
            options, seen = {CACHE: cache, "use_cache": kind is not None, "output_attentions": True}, []
            for start, stop in steps:
                seen.append(one(x[:, start:stop], attention_mask=mask[:, :stop], **options).attentions)
        pairs.append(seen)
    for (start, _), got, expected in zip(steps, *pairs, strict=True):
        assert [weights.shape for weights in got] == [weights.shape for weights in expected]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours.sum(-1)[0], torch.ones(ours.shape[1:3]))
            torch.testing.assert_close(ours[0], theirs[0], atol=5e-5, rtol=0)
            real = max(0, 17 - start)
            torch.testing.assert_close(ours[1, :, real:], theirs[1, :, real:], atol=5e-5, rtol=0)


def test_attentions_of_packed_documents_end_at_their_borders():
    model, _ = model_and_dense(nsa_dense_layers=[3])
    borders, document = torch.tensor([0, 20, 60]), (torch.arange(60) >= 20).long()
    with torch.no_grad():
        attentions = model(tokens(1, 60), cu_seq_lens_q=borders, output_attentions=True, use_cache=False).attentions
    assert len(attentions) == 4
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        assert not weights[0, :, document[:, None] != document].any()
