"""Generation with the cache equals one pass over the whole text, with random NSA parameters."""

from __future__ import annotations

import pytest
import torch
from generation_steps import BORDERS, GREEDY, LENGTH, check_dense_prefill, in_steps, left_padded, relative, tokens
from tiny_models import SELECTORS, TINY_SIZES, tiny_dense_model
from transformers import DynamicCache, StaticCache

from nsa_hf import NsaError
from nsa_hf.cache.dynamic import NsaDynamicLayer
from nsa_hf.releases import CACHE

# Where the texts of samples and beams start, and by how much they grow: together across every border.
SAMPLED, NEW = (5, 18, 60, 70), 16


# With an index in 8 bits too; other tests without.
EVERY_SELECTOR = pytest.mark.parametrize("tiny_nsa_model", SELECTORS, indirect=True)


@pytest.fixture(params=["compressed", "channels"])
def tiny_nsa_model(tiny_nsa_model, request):
    """As the fixture of this name, for both ways of choosing blocks."""
    return lambda **fields: tiny_nsa_model(**{**SELECTORS[request.param], **fields})


@pytest.mark.parametrize(
    "tiny_nsa_model, compression",
    [*(("compressed", kind) for kind in ("mean", "linear", "mlp")), ("channels", "none"), ("channels-8", "mean")],
    indirect=["tiny_nsa_model"],
)
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


@EVERY_SELECTOR
@pytest.mark.parametrize("chunk", [3, 16, 40])
def test_chunked_prefill(chunk, tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_dense_layers=[1]), tokens(1)
    steps = [chunk] * (LENGTH // chunk)
    with torch.no_grad():
        assert relative(in_steps(model, x, steps, DynamicCache()), model(x[:, : sum(steps)]).logits) < 1e-5


@EVERY_SELECTOR
@pytest.mark.parametrize("dense", [False, True])
def test_left_padded_rows_token_by_token(dense, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(3)
    starts = [0, 37, 90]
    inputs = left_padded(x, starts)
    with torch.no_grad(), model.dense_attention() if dense else torch.no_grad():
        stepped = in_steps(model, x, [41, 1, 7] + [1] * 101, DynamicCache(), **inputs)
        for row, start in enumerate(starts):
            assert relative(stepped[row, start:], model(x[row : row + 1, start:]).logits[0]) < 1e-5


@EVERY_SELECTOR
def test_a_dense_prefill_can_be_continued_sparse(tiny_nsa_model):
    check_dense_prefill(tiny_nsa_model(), (DynamicCache(), DynamicCache()), NsaDynamicLayer.EXTRA)


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


@EVERY_SELECTOR
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
@pytest.mark.parametrize(
    "tiny_nsa_model, prompt",
    [*(("compressed", prompt) for prompt in SAMPLED), ("channels-8", 60)],
    indirect=["tiny_nsa_model"],
)
def test_sampling_and_beams_with_the_cache_equal_those_without(options, padded, prompt, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, prompt)
    mask = (
        left_padded(x, [0, {5: 2, 18: 5, 60: 21, 70: 29}[prompt]])["attention_mask"] if padded else torch.ones_like(x)
    )
    out = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        out.append(model.generate(x, attention_mask=mask, max_new_tokens=NEW, use_cache=use_cache, **options))
    assert torch.equal(out[0], out[1])
    assert out[0].shape[1] == prompt + NEW, "ended before the borders"


@EVERY_SELECTOR
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


@pytest.mark.parametrize("target", ["dense", "sparse"])
def test_an_assistant_takes_padding_tokens_in_the_text_for_text(target, tiny_nsa_model):
    """It is given no mask, and Transformers would infer one with holes."""
    model, x = tiny_dense_model() if target == "dense" else tiny_nsa_model(), tokens(1, 70)
    x[0, [5, 40]] = model.config.pad_token_id
    options = {"max_new_tokens": 24, "attention_mask": torch.ones_like(x), **GREEDY}
    helper = tiny_nsa_model(nsa_topk=2, nsa_window_size=9)
    assert torch.equal(model.generate(x, assistant_model=helper, **options), model.generate(x, **options))


def test_the_mask_that_is_inferred_where_none_is_given(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 70)
    x[1, :20] = model.config.pad_token_id
    mask = torch.ones_like(x)
    mask[1, :20] = 0
    options = {"max_new_tokens": 8, **GREEDY}
    assert torch.equal(model.generate(x, **options), model.generate(x, attention_mask=mask, **options))
    x[1, 30] = model.config.pad_token_id
    with pytest.raises(NsaError, match="no attention_mask was given, and pad_token_id 2 stands behind other tokens"):
        model.generate(x, **options)


# Where the real tokens of three rows stand in prompts of 90 tokens: right padding, none, both sides.
SPANS = [(0, 70), (0, 90), (13, 77)]


def spans_mask(x, spans=SPANS) -> torch.Tensor:
    place = torch.arange(x.shape[1])
    return torch.stack([((place >= start) & (place < stop)).long() for start, stop in spans])


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("given", ["inputs", "input_ids", "inputs_embeds"])
def test_greedy_of_a_right_padded_batch_is_that_of_each_row_alone(given, kind, tiny_nsa_model):
    """Transformers warns and goes on; so does this, from each row's last real token."""
    model, x = tiny_nsa_model(), tokens(3, 90)
    prompt = {given: model.get_input_embeddings()(x) if given == "inputs_embeds" else x}
    options = {"max_new_tokens": 20, "cache_implementation": kind, **GREEDY}
    together = model.generate(**prompt, attention_mask=spans_mask(x), **options)
    if given != "inputs_embeds":
        assert torch.equal(together[:, :90], x), "the prompt as it was given"
    for row, (start, stop) in enumerate(SPANS):
        alone = x[row : row + 1, start:stop]
        alone = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0, stop - start :]
        assert torch.equal(together[row, -20:], alone)


def test_a_negative_prompt_keeps_its_own_order(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 40)
    mask = spans_mask(x, [(0, 30), (0, 40)])
    left = x.clone()
    left[0] = x[0].roll(10)
    options = {"guidance_scale": 2.0, "negative_prompt_ids": tokens(2, 80)[:, 40:], "max_new_tokens": 6, **GREEDY}
    expected = model.generate(left, attention_mask=spans_mask(x, [(10, 40), (0, 40)]), **options)[:, 40:]
    assert torch.equal(model.generate(x, attention_mask=mask, **options)[:, 40:], expected)


def test_a_right_padded_batch_in_beams_and_as_a_conversation(tiny_nsa_model):
    model, x, cache = tiny_nsa_model(), tokens(2, 90), DynamicCache()
    mask = spans_mask(x, SPANS[:2])
    options = {"max_new_tokens": 10, **GREEDY}
    beams = model.generate(x, attention_mask=mask, num_beams=3, num_return_sequences=2, **options)
    assert torch.equal(beams[:, :90], x.repeat_interleave(2, 0))
    alone = model.generate(x[:1, :70], attention_mask=torch.ones(1, 70), num_beams=3, num_return_sequences=2, **options)
    assert torch.equal(beams[:2, 90:], alone[:, 70:])
    first = model.generate(x, attention_mask=mask, return_dict_in_generate=True, **{CACHE: cache}, **options)
    turn = torch.cat([first.sequences, tokens(2, 12)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 22, dtype=torch.long)], dim=1)  # as a dense model's user goes on
    second = model.generate(turn, attention_mask=mask, **{CACHE: cache}, **options)
    assert torch.equal(second, model.generate(turn, attention_mask=mask, **options))
    alone = torch.cat([turn[:1, :70], turn[:1, 90:]], dim=1)
    alone = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
    assert torch.equal(second[0, -10:], alone[0, -10:])
    with pytest.raises(NsaError, match=r"must have the prompt's shape \[2, 12\]"):
        model.generate(turn[:, -12:], attention_mask=mask, **options)


@pytest.mark.parametrize(
    "tiny_nsa_model, prompt",
    [*(("compressed", prompt) for prompt in (7, 18, 62, 100)), ("channels", 62), ("channels-8", 100)],
    indirect=["tiny_nsa_model"],
)
@pytest.mark.parametrize("assistant", ["dense", "sparse"])
def test_several_rejected_drafts_are_cropped_at_once(prompt, assistant, tiny_nsa_model, monkeypatch):
    model, x = tiny_nsa_model(), tokens(1, prompt)
    helper = tiny_dense_model() if assistant == "dense" else tiny_nsa_model(nsa_topk=2, nsa_window_size=9)
    helper.generation_config.assistant_confidence_threshold = 0  # else it stops at the first doubtful token
    helper.generation_config.num_assistant_tokens = 6
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    dropped: dict[NsaDynamicLayer, list[tuple[int, int]]] = {}
    crop = NsaDynamicLayer.crop

    def lengths(layer: NsaDynamicLayer) -> torch.Tensor:
        held = layer.index_keys.shape[2] if layer.compressed_keys is None else layer.compressed_keys.shape[1]
        return torch.tensor([layer.get_seq_length(), held])

    def spy(layer: NsaDynamicLayer, *args) -> None:
        before = lengths(layer)
        crop(layer, *args)
        dropped.setdefault(layer, []).append(tuple((before - lengths(layer)).tolist()))

    monkeypatch.setattr(NsaDynamicLayer, "crop", spy)
    options = {"max_new_tokens": 24, "attention_mask": torch.ones_like(x), **GREEDY}
    assisted = model.generate(x, assistant_model=helper, **options)
    # of the model and, where it is sparse, the assistant: every layer lost several tokens, and entries or index keys
    assert len(dropped) == model.config.num_hidden_layers * (1 if assistant == "dense" else 2)
    for crops in dropped.values():
        assert max(lost for lost, _ in crops) >= 2
        assert max(held for _, held in crops) >= 1
    assert torch.equal(assisted, model.generate(x, use_cache=False, **options))


@EVERY_SELECTOR
@pytest.mark.parametrize("prompt", [6, 63, 90])
def test_rows_repeated_and_selected_go_on_as_themselves(prompt, tiny_nsa_model):
    """What contrastive search does to a cache, with several samples."""
    model, x, cache = tiny_nsa_model(), tokens(2), DynamicCache()
    with torch.no_grad():
        model(x[:, :prompt], **{CACHE: cache})
        cache.batch_repeat_interleave(3)
        tried = torch.cat([x[:, prompt : prompt + 1].repeat_interleave(3, 0) % 250 + torch.arange(6)[:, None] % 3])
        model(tried, **{CACHE: cache})
        cache.batch_select_indices(torch.tensor([1, 5]))
        stepped = in_steps(model, x[:, prompt + 1 :], [1] * 20, cache)
        whole = torch.cat([x[:, :prompt], tried[[1, 5]], x[:, prompt + 1 : prompt + 21]], dim=1)
        assert relative(stepped, model(whole).logits[:, prompt + 1 :]) < 1e-5


@EVERY_SELECTOR
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_generate_with_chunked_prefill(chunk, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, 90)
    options = {"max_new_tokens": 8, "attention_mask": left_padded(x, [0, 31])["attention_mask"], **GREEDY}
    assert torch.equal(model.generate(x, prefill_chunk_size=chunk, **options), model.generate(x, **options))


@EVERY_SELECTOR
def test_a_conversation_continues_from_its_cache(tiny_nsa_model):
    model, x, cache = tiny_nsa_model(), tokens(1, 80), DynamicCache()
    options = {"max_new_tokens": 10, **GREEDY}
    first = model.generate(x, attention_mask=torch.ones_like(x), **{CACHE: cache}, **options)
    turn = torch.cat([first, tokens(1, 12)], dim=1)
    second = model.generate(turn, attention_mask=torch.ones_like(turn), **{CACHE: cache}, **options)
    assert torch.equal(second, model.generate(turn, attention_mask=torch.ones_like(turn), **options))


@pytest.mark.parametrize("kind", ["shared", "independent", "static"])
@pytest.mark.parametrize("prompt, starts", [(12, [0, 7]), (20, [9, 0]), (50, [0, 29])])
def test_a_conversation_of_two_padded_rows_continued_twice_equals_passes_without_a_cache(
    kind, prompt, starts, tiny_nsa_model
):
    fields = {"nsa_branch_kv": "independent", "nsa_compression": "mlp"} if kind == "independent" else {}
    model, words = tiny_nsa_model(**fields), tokens(2)
    cache = StaticCache(model.config, max_cache_len=LENGTH) if kind == "static" else DynamicCache()
    text, written = words[:, :prompt], []
    for turn in (12, 9, 0):
        mask = left_padded(text, starts)["attention_mask"]
        written.append(text.shape[1])
        text = model.generate(text, attention_mask=mask, **{CACHE: cache}, max_new_tokens=10, **GREEDY)
        # the last token's keys are not computed before the next turn
        assert int(cache.get_seq_length()) == text.shape[1] - 1
        text = torch.cat([text, words[:, prompt : prompt + turn]], dim=1)
    for row, start in enumerate(starts):
        greedy = rescored(model, text[row : row + 1, start:], 1)[0]
        for first in written:
            assert torch.equal(text[row, first : first + 10], greedy[first - start - 1 :][:10])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prompt", [1, 7, 16, 24, 60, 64])
def test_a_users_own_cache_gives_what_generate_gives_by_itself(prompt, padded, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(2, prompt)
    mask = left_padded(x, [0, prompt // 3])["attention_mask"] if padded else torch.ones_like(x)
    cache = DynamicCache(config=model.config)
    options = {"attention_mask": mask, "max_new_tokens": 10, **GREEDY}
    out = model.generate(x, **{CACHE: cache}, **options)
    assert cache.get_seq_length() == prompt + 9, "used"
    assert all(isinstance(layer, NsaDynamicLayer) for layer in cache.layers)
    assert torch.equal(out, model.generate(x, **options))
    assert torch.equal(out, model.generate(x, use_cache=False, **options))


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
        model(x, position_ids=torch.arange(20)[None] % 10, **{CACHE: cache})
        with pytest.raises(NsaError, match="packed documents"):
            model(x[:, :1], **{CACHE: cache})


def test_the_sizes_cross_every_border_here():
    sizes = {name.removeprefix("nsa_"): value for name, value in TINY_SIZES.items()}
    selected = sizes["topk"] * sizes["block_size"]
    assert 2 * selected < LENGTH
    for border in (sizes["kernel_size"], sizes["block_size"], sizes["window_size"], selected):
        assert any(prompt < border < prompt + NEW - 1 for prompt in SAMPLED)


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_of_a_filled_cache_is_refused(how, tiny_nsa_model):
    """Transformers reads the whole text again behind what the cache holds: other tokens, without a word."""
    model, x, cache = tiny_nsa_model(), tokens(1, 40), DynamicCache()
    with torch.no_grad():
        model(x[:, :30], **{CACHE: cache})
        options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": tiny_dense_model()}
        with pytest.raises(NsaError, match="cannot go on with a cache that holds 30 tokens"):
            model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=3, **options, **{CACHE: cache})
