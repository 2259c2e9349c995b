"""Generation with the cache equals one pass over the whole text, with random NSA parameters."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_SIZES, tiny_dense_model
from generation_steps import BORDERS, GREEDY, LENGTH, in_steps, left_padded, relative, tokens
from transformers import DynamicCache

from nsa_hf import NsaError


@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("gate", ["residual", "sigmoid"])
def test_token_by_token_equals_one_pass(compression, gate, tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_compression=compression, nsa_gate=gate), tokens()
    with torch.no_grad():
        stepped = in_steps(model, x, [1] * LENGTH, DynamicCache())
        assert relative(stepped, model(x).logits) < 1e-5


@pytest.mark.parametrize("prefill", BORDERS)
def test_prefill_to_every_border_then_token_by_token(prefill, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    with torch.no_grad():
        stepped = in_steps(model, x, [prefill] + [1] * 20, DynamicCache(config=model.config))
        assert relative(stepped, model(x[:, : prefill + 20]).logits) < 1e-5


@pytest.mark.parametrize("chunk", [3, 16, 40])
def test_chunked_prefill(chunk, tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_dense_layers=[1]), tokens(1)
    steps = [chunk] * (LENGTH // chunk)
    with torch.no_grad():
        assert relative(in_steps(model, x, steps, DynamicCache()), model(x[:, : sum(steps)]).logits) < 1e-5


@pytest.mark.parametrize("dense", [False, True])
def test_left_padded_rows_token_by_token(dense, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(3)
    starts = [0, 37, 90]
    inputs = left_padded(x, starts)
    with torch.no_grad(), model.dense_attention() if dense else torch.no_grad():
        stepped = in_steps(model, x, [41, 1, 7] + [1] * 101, DynamicCache(), **inputs)
        for row, start in enumerate(starts):
            assert relative(stepped[row, start:], model(x[row : row + 1, start:]).logits[0]) < 1e-5


def test_a_dense_prefill_can_be_continued_sparse(tiny_nsa_model):
    model, x, cache = tiny_nsa_model(), tokens(1), DynamicCache()
    with torch.no_grad():
        with model.dense_attention():
            model(x[:, :100], past_key_values=cache)
        model(x[:, 100:], past_key_values=cache)
        layer = cache.layers[0]
        fresh = DynamicCache()
        model(x, past_key_values=fresh)
        # the first layer's keys do not depend on attention, so its compressed entries are those of a sparse pass
        torch.testing.assert_close(layer.compressed_keys, fresh.layers[0].compressed_keys)


def rescored(model, sequences, prompt: int) -> torch.Tensor:
    """The greedy continuation according to passes without a cache."""
    with torch.no_grad():
        return model(sequences[:, :-1]).logits[:, prompt - 1 :].argmax(-1)


@pytest.mark.parametrize("prompt", [*BORDERS, LENGTH])
@pytest.mark.parametrize("kind", [None, "static"])
def test_greedy(prompt, kind, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(length=prompt)
    out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12, cache_implementation=kind, **GREEDY)
    assert torch.equal(out[:, prompt:], rescored(model, out, prompt))


@pytest.mark.parametrize("starts", [[0, 50, 100], [3, 0, 149]])
def test_greedy_of_a_left_padded_batch_is_that_of_each_row_alone(starts, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(3)
    mask = left_padded(x, starts)["attention_mask"]
    together = model.generate(x, attention_mask=mask, max_new_tokens=25, **GREEDY)[:, LENGTH:]
    for row, start in enumerate(starts):
        alone = x[row : row + 1, start:]
        alone = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=25, **GREEDY)
        assert torch.equal(together[row], alone[0, LENGTH - start :])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_sampling_and_beams_with_the_cache_equal_those_without(options, padded, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 70)
    mask = left_padded(x, [0, 29])["attention_mask"] if padded else torch.ones_like(x)
    out = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        out.append(model.generate(x, attention_mask=mask, max_new_tokens=16, use_cache=use_cache, **options))
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("prompt", [23, 64, 120])
def test_prompt_lookup_crops_the_cache(prompt, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(1, 40).repeat(1, 3)[:, :prompt]
    options = {"max_new_tokens": 30, "attention_mask": torch.ones_like(x), **GREEDY}
    assert torch.equal(model.generate(x, prompt_lookup_num_tokens=4, **options), model.generate(x, **options))


@pytest.mark.parametrize("prompt", [7, 62, 100])
@pytest.mark.parametrize("assistant", ["dense", "sparse", "itself"])
def test_assisted_decoding_gives_the_same_tokens(prompt, assistant, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(1, prompt)
    helper = {
        "dense": lambda: tiny_dense_model(),
        "sparse": lambda: tiny_nsa_model(nsa_topk=2, nsa_window_size=9),
        "itself": lambda: tiny_nsa_model(),
    }[assistant]()
    options = {"max_new_tokens": 24, "attention_mask": torch.ones_like(x), **GREEDY}
    assert torch.equal(model.generate(x, assistant_model=helper, **options), model.generate(x, **options))


@pytest.mark.parametrize("prompt", [6, 63, 90])
def test_rows_repeated_and_selected_go_on_as_themselves(prompt, tiny_nsa_model):
    """What contrastive search does to a cache, with several samples."""
    model, x, cache = tiny_nsa_model(), tokens(2), DynamicCache()
    with torch.no_grad():
        model(x[:, :prompt], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        tried = torch.cat([x[:, prompt : prompt + 1].repeat_interleave(3, 0) % 250 + torch.arange(6)[:, None] % 3])
        model(tried, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1, 5]))
        stepped = in_steps(model, x[:, prompt + 1 :], [1] * 20, cache)
        whole = torch.cat([x[:, :prompt], tried[[1, 5]], x[:, prompt + 1 : prompt + 21]], dim=1)
        assert relative(stepped, model(whole).logits[:, prompt + 1 :]) < 1e-5


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_generate_with_chunked_prefill(chunk, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 90)
    options = {"max_new_tokens": 8, "attention_mask": left_padded(x, [0, 31])["attention_mask"], **GREEDY}
    assert torch.equal(model.generate(x, prefill_chunk_size=chunk, **options), model.generate(x, **options))


def test_a_conversation_continues_from_its_cache(tiny_nsa_model):
    model, x, cache = tiny_nsa_model(), tokens(1, 80), DynamicCache()
    options = {"max_new_tokens": 10, **GREEDY}
    first = model.generate(x, attention_mask=torch.ones_like(x), past_key_values=cache, **options)
    turn = torch.cat([first, tokens(1, 12)], dim=1)
    second = model.generate(turn, attention_mask=torch.ones_like(turn), past_key_values=cache, **options)
    assert torch.equal(second, model.generate(turn, attention_mask=torch.ones_like(turn), **options))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("quantized", "cache_implementation='quantized' cannot be used: .*use the default dynamic cache"),
        ("offloaded_static", "cache_implementation='offloaded_static' cannot be used: .*use .*'offloaded'"),
        ("offloaded", "cache_implementation='offloaded' cannot be used: .*this model is on the CPU: do without"),
        ("paged", r"does not support continuous batching.*use generate\(\) with left-padded rows"),
    ],
)
def test_caches_that_cannot_be_right_are_refused_by_name(kind, message, tiny_nsa_model):
    x = tokens(1, 20)
    with pytest.raises(NsaError, match=message):
        tiny_nsa_model().generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3, cache_implementation=kind)


def test_continuous_batching_is_refused(tiny_nsa_model):
    for start in ("generate_batch", "init_continuous_batching"):
        with pytest.raises(NsaError, match="paged cache"):
            getattr(tiny_nsa_model(), start)([[3, 4, 5]])


def test_a_packed_cache_is_refused_after_the_first_pass(tiny_nsa_model):
    model, x, cache = tiny_nsa_model(), tokens(1, 20), DynamicCache()
    with torch.no_grad():
        model(x, position_ids=torch.arange(20)[None] % 10, past_key_values=cache)
        with pytest.raises(NsaError, match="packed documents"):
            model(x[:, :1], past_key_values=cache)


def test_the_sizes_cross_every_border_here():
    sizes = {name.removeprefix("nsa_"): value for name, value in TINY_SIZES.items()}
    assert 2 * sizes["topk"] * sizes["block_size"] < LENGTH
