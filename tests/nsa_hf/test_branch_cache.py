"""The cache of branches with keys and values of their own: it keeps what it will read again, and nothing else."""

from __future__ import annotations

import pytest
import torch
from generation_steps import BORDERS, GREEDY, LENGTH, check_dense_prefill, in_steps, left_padded, relative, tokens
from tiny_models import TINY_SIZES, tiny_dense_model
from transformers import DynamicCache

from nsa_hf import NsaError
from nsa_hf.cache.branches import NsaIndependentLayer
from nsa_hf.kernels import n_blocks
from nsa_hf.releases import CACHE

SIZE, STRIDE, WINDOW = (TINY_SIZES[f"nsa_{name}"] for name in ("kernel_size", "kernel_stride", "window_size"))
TINY_HEADS, HEAD_DIM = 2, 8


CHANNELS = {"nsa_selector": "channels", "nsa_selector_bits": 8}


@pytest.fixture(params=[{}, CHANNELS], ids=["compressed", "channels"])
def model(tiny_nsa_model, request):
    return tiny_nsa_model(nsa_branch_kv="independent", **request.param)


def held_bytes(layer: NsaIndependentLayer) -> int:
    """Of the memory behind the layer's tensors, which a slice of a longer one would keep alive."""
    tensors = [getattr(layer, name) for name in ("keys", "values", *layer.EXTRA)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("steps", [[length] for length in (*BORDERS, LENGTH)] + [[100] + [1] * 33, [7, 60, 1, 5]])
def test_the_bytes_are_those_of_the_specification(steps, model):
    x, cache, length = tokens(), DynamicCache(), sum(steps)
    with torch.no_grad():
        in_steps(model, x[:, :length], steps, cache)
    entries = n_blocks(length, SIZE, STRIDE)
    unfinished = length - entries * STRIDE
    tokens_kept = length + entries + unfinished + min(length, WINDOW)
    assert unfinished < SIZE
    # keys and values, two rows, float32; the index's keys of half the channels, a byte each, and their scales
    expected = 2 * 2 * tokens_kept * TINY_HEADS * HEAD_DIM * 4
    if model.config.nsa_selector == "channels":
        expected += 2 * length * TINY_HEADS * (HEAD_DIM // 2 + 2)
    assert [held_bytes(layer) for layer in cache.layers] == [expected] * 3


@pytest.mark.parametrize("prefill", [*BORDERS, 120])
@pytest.mark.parametrize("model, recording", [({}, False), ({}, True), (CHANNELS, True)], indirect=["model"])
def test_token_by_token_equals_one_pass(prefill, recording, model):
    x, cache = tokens(), DynamicCache(config=model.config)
    with torch.no_grad():
        first = in_steps(model, x, [prefill], cache)
        if recording:
            cache.activate_past_recording()
        stepped = torch.cat([first, in_steps(model, x[:, prefill:], [1] * 20 + [5, 2], cache)], dim=1)
        assert relative(stepped, model(x[:, : prefill + 27]).logits) < 1e-5


@pytest.mark.parametrize("dense", [False, True])
def test_left_padded_rows_in_steps(dense, model):
    x, starts = tokens(3), [0, 37, 90]
    inputs = left_padded(x, starts)
    with torch.no_grad(), model.dense_attention() if dense else torch.no_grad():
        stepped = in_steps(model, x, [41, 1, 7] + [1] * 101, DynamicCache(), **inputs)
        for row, start in enumerate(starts):
            assert relative(stepped[row, start:], model(x[row : row + 1, start:]).logits[0]) < 1e-5


def test_a_dense_prefill_can_be_continued_sparse(model):
    check_dense_prefill(model, (DynamicCache(), DynamicCache()), NsaIndependentLayer.EXTRA)


@pytest.mark.parametrize("removed", [1, 4, 9, 30, 60])
@pytest.mark.parametrize("starts", [[0, 0], [0, 29]])
def test_cropped_after_recording_and_gone_on(removed, starts, model):
    x, cache = tokens(), DynamicCache()
    inputs = left_padded(x, starts) if any(starts) else {}

    def part(first: int, last: int) -> dict[str, torch.Tensor]:
        positions = {"position_ids": inputs["position_ids"][:, first:last]} if inputs else {}
        return {"attention_mask": inputs["attention_mask"][:, :last], **positions} if inputs else {}

    with torch.no_grad():
        model(x[:, :50], **{CACHE: cache}, **part(0, 50))
        cache.activate_past_recording()
        model((x[:, 50:110] + 1) % 250, **{CACHE: cache}, **part(50, 110))
        cache.crop(-60)  # all of what was wrong
        model(x[:, 50:110], **{CACHE: cache}, **part(50, 110))
        cache.crop(-removed)
        left = 110 - removed
        assert cache.layers[0].window_keys.shape[2] == min(left, WINDOW), "no more is kept than is needed"
        got = model(x[:, left:], **{CACHE: cache}, **part(left, LENGTH)).logits
        for row, start in enumerate(starts):
            expected = model(x[row : row + 1, start:]).logits[0, left - start :]
            assert relative(got[row], expected) < 1e-5


@pytest.mark.parametrize("recorded, removed", [(0, 1), (0, 30), (6, 20), (1, 8)])
def test_a_deeper_crop_is_refused_and_changes_nothing(recorded, removed, model):
    x, cache = tokens(), DynamicCache()
    with torch.no_grad():
        model(x[:, :101], **{CACHE: cache})
        cache.activate_past_recording()
        for place in range(101, 101 + recorded):
            model(x[:, place : place + 1], **{CACHE: cache})
        length = 101 + recorded
        with pytest.raises(NsaError, match=rf"cannot remove {removed} tokens of {length}: .*activate_past_recording"):
            cache.crop(-removed)
        assert cache.get_seq_length() == length
        got = model(x[:, length:], **{CACHE: cache}).logits
        assert relative(got, model(x).logits[:, length:]) < 1e-5


def test_a_short_cache_can_be_cropped_anywhere(model):
    x, cache = tokens(), DynamicCache()
    with torch.no_grad():
        model(x[:, : SIZE - 1], **{CACHE: cache})
        cache.crop(-3)
        assert relative(model(x[:, SIZE - 4 :], **{CACHE: cache}).logits, model(x).logits[:, SIZE - 4 :]) < 1e-5
    with pytest.raises(NsaError, match="negative number of tokens to remove, got 3"):
        cache.crop(3)


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
)
def test_changes_of_the_batch_cover_everything(change, rows, model):
    x, cache = tokens(), DynamicCache()
    with torch.no_grad():
        model(x[:, :90], **{CACHE: cache})
        change(cache)
        got = in_steps(model, x[rows, 90:], [1] * 10 + [50], cache)
        assert relative(got, model(x[rows]).logits[:, 90:]) < 1e-5


def test_reset_forgets_everything(model):
    x, cache = tokens(), DynamicCache()
    with torch.no_grad():
        model((x[:, :90] + 1) % 250, **{CACHE: cache})
        cache.reset()
        assert relative(in_steps(model, x, [100, 50], cache), model(x).logits) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"prefill_chunk_size": 7},
        {},
    ],
)
def test_generate_equals_generation_without_a_cache(options, model):
    x = tokens(2, 70)
    out = []
    for use_cache in (True, False):
        generation = {key: value for key, value in options.items() if use_cache or key != "prefill_chunk_size"}
        torch.manual_seed(0)
        mask = left_padded(x, [0, 29])["attention_mask"]
        out.append(
            model.generate(x, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, **{**GREEDY, **generation})
        )
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize(
    "model, prompt", [*(({}, prompt) for prompt in (7, 62, 100)), (CHANNELS, 62)], indirect=["model"]
)
@pytest.mark.parametrize("assistant", ["dense", "itself", "lookup"])
def test_assisted_decoding_gives_the_same_tokens(prompt, assistant, model, tiny_nsa_model):
    x = tokens(1, 40).repeat(1, 3)[:, :prompt]
    helper = {
        "dense": lambda: {"assistant_model": tiny_dense_model()},
        "itself": lambda: {"assistant_model": tiny_nsa_model(nsa_branch_kv="independent", nsa_topk=2)},
        "lookup": lambda: {"prompt_lookup_num_tokens": 4},
    }[assistant]()
    options = {"max_new_tokens": 24, "attention_mask": torch.ones_like(x), **GREEDY}
    assert torch.equal(model.generate(x, **helper, **options), model.generate(x, **options))


def test_a_conversation_continues_from_its_cache(model):
    x, cache = tokens(1, 80), DynamicCache()
    first = model.generate(x, attention_mask=torch.ones_like(x), **{CACHE: cache}, max_new_tokens=10, **GREEDY)
    turn = torch.cat([first, tokens(1, 12)], dim=1)
    mask = torch.ones_like(turn)
    second = model.generate(turn, attention_mask=mask, **{CACHE: cache}, max_new_tokens=10, **GREEDY)
    assert torch.equal(second, model.generate(turn, attention_mask=mask, max_new_tokens=10, **GREEDY))


def test_caches_of_other_models_are_refused(model, tiny_nsa_model):
    x = tokens(1, 20)
    for maker, user in ((tiny_dense_model(), model), (tiny_nsa_model(), model), (model, tiny_nsa_model())):
        cache = DynamicCache()
        with torch.no_grad():
            maker(x, **{CACHE: cache})
            with pytest.raises(NsaError, match="neither can continue the other's cache: start with an empty one"):
                user(x[:, :1], **{CACHE: cache})
