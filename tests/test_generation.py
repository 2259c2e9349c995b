"""Generation with the cache equals one pass over the whole text, with random NSA parameters."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_SIZES
from transformers import DynamicCache

from nsa_hf import NsaError

LENGTH = 150
BORDERS = sorted({size + step for size in (1, 4, 8, 16, 24, 64) for step in (-1, 0, 1)} - {0})


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(5))


def in_steps(model, x, steps, cache, **inputs) -> torch.Tensor:
    logits, done = [], 0
    for step in steps:
        now = slice(done, done + step)
        given = {
            name: value[:, now] if name == "position_ids" else value[:, : done + step] for name, value in inputs.items()
        }
        logits.append(model(x[:, now], past_key_values=cache, use_cache=True, **given).logits)
        done += step
    return torch.cat(logits, dim=1)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


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
    mask = torch.ones_like(x)
    for row, start in enumerate(starts):
        mask[row, :start] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
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


def test_greedy(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert torch.equal(out[:, LENGTH:], rescored(model, out, LENGTH))


def test_greedy_of_a_left_padded_batch_is_that_of_each_row_alone(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(3)
    mask = torch.ones_like(x)
    mask[1, :50], mask[2, :100] = 0, 0
    options = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None}
    together = model.generate(x, attention_mask=mask, **options)[:, LENGTH:]
    for row, start in enumerate((0, 50, 100)):
        alone = x[row : row + 1, start:]
        alone = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0, LENGTH - start :]
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 5, "num_return_sequences": 3}, {"num_beams": 3}])
def test_sampling_and_beams_with_the_cache_equal_those_without(options, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 70)
    out = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        out.append(
            model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=16, use_cache=use_cache, **options)
        )
    assert torch.equal(out[0], out[1])


def test_prompt_lookup_crops_the_cache(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(1, 40).repeat(1, 3)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(x)}
    assert torch.equal(model.generate(x, prompt_lookup_num_tokens=4, **options), model.generate(x, **options))


def test_a_conversation_continues_from_its_cache(tiny_nsa_model):
    model, x, cache = tiny_nsa_model(), tokens(1, 80), DynamicCache()
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    first = model.generate(x, attention_mask=torch.ones_like(x), past_key_values=cache, **options)
    turn = torch.cat([first, tokens(1, 12)], dim=1)
    second = model.generate(turn, attention_mask=torch.ones_like(turn), past_key_values=cache, **options)
    assert torch.equal(second, model.generate(turn, attention_mask=torch.ones_like(turn), **options))


def test_the_static_cache_is_refused_by_name(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens()
    with pytest.raises(NsaError, match=r"cannot use a StaticCache .*Use DynamicCache"):
        model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3, cache_implementation="static")


def test_a_packed_cache_is_refused_after_the_first_pass(tiny_nsa_model):
    model, x, cache = tiny_nsa_model(), tokens(1, 20), DynamicCache()
    with torch.no_grad():
        model(x, position_ids=torch.arange(20)[None] % 10, past_key_values=cache)
        with pytest.raises(NsaError, match="packed documents"):
            model(x[:, :1], past_key_values=cache)


def test_the_sizes_cross_every_border_here():
    sizes = {name.removeprefix("nsa_"): value for name, value in TINY_SIZES.items()}
    assert 2 * sizes["topk"] * sizes["block_size"] < LENGTH
