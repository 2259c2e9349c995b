"""Padding and packing, worked out once per forward pass."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from accelerate.utils import send_to_device
from generation_steps import LENGTH, in_steps, left_padded, relative, tokens
from transformers import DynamicCache, StaticCache

from nsa_hf.errors import NsaError
from nsa_hf.releases import CACHE
from nsa_hf.segments import Segments, find_segments, static_mask, static_segments


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(letter) for letter in row] for row in rows])


def test_left_padding_gives_starts():
    segments = find_segments(3, 4, 0, attention_mask=mask("1111", "0011", "0110"))
    assert (
        segments.starts.tolist() == [0, 2, 1] and segments.starts.dtype == torch.int32 and segments.cu_seqlens is None
    )


def test_full_and_right_padded_rows_need_nothing():
    assert find_segments(2, 4, 0, attention_mask=mask("1111", "1100")).starts is None
    assert find_segments(2, 4, 0).starts is None


def test_a_row_without_tokens_starts_behind_its_end():
    assert find_segments(2, 3, 0, attention_mask=mask("000", "111")).starts.tolist() == [3, 0]


def test_the_mask_of_a_decoding_step_covers_the_cache():
    assert find_segments(2, 1, 3, attention_mask=mask("1111", "0111")).starts.tolist() == [0, 1]


@pytest.mark.parametrize(
    "given, message",
    [
        (mask("1011", "1111"), "holes"),
        (mask("111", "111"), r"attention_mask must be \[2, 4\]"),
        (torch.ones(2, 1, 4, 4), r"2D attention_mask .* got \[2, 1, 4, 4\]"),
        ({"full_attention": None}, "got dict"),
    ],
)
def test_refused_masks(given, message):
    with pytest.raises(NsaError, match=message):
        find_segments(2, 4, 0, attention_mask=given)


def test_position_ids_that_restart_are_documents():
    segments = find_segments(1, 6, 0, position_ids=torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert segments.borders == (0, 3, 4, 6) and segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert segments.cu_seqlens.dtype == torch.int32 and segments.starts is None


def test_position_ids_mean_packing_only_without_a_mask():
    positions = torch.tensor([[0, 0, 0, 1]])
    segments = find_segments(1, 4, 0, position_ids=positions, attention_mask=mask("0011"))
    assert segments.cu_seqlens is None and segments.starts.tolist() == [2]
    assert find_segments(1, 4, 0, position_ids=torch.arange(4)[None]).cu_seqlens is None
    assert find_segments(1, 1, 9, position_ids=torch.tensor([[9]])).cu_seqlens is None


def test_explicit_borders_come_first():
    borders = torch.tensor([0, 2, 4])
    segments = find_segments(
        1, 4, 0, cu_seq_lens_q=borders, cu_seq_lens_k=borders.clone(), position_ids=torch.arange(4)[None]
    )
    assert segments.borders == (0, 2, 4)
    assert find_segments(1, 4, 0, cu_seq_lens_q=torch.tensor([0, 4])).cu_seqlens is None


@pytest.mark.parametrize("borders", [[0, 2, 3], [1, 4], [0, 3, 2, 4], [0, 2, 2, 4]])
def test_borders_that_do_not_cover_the_tokens_are_refused(borders):
    with pytest.raises(NsaError, match="rise from 0 to the 4 tokens"):
        find_segments(1, 4, 0, cu_seq_lens_q=torch.tensor(borders))


def test_packing_needs_one_row_an_empty_cache_and_equal_borders():
    restart = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(NsaError, match="batch size 1, got 2"):
        find_segments(2, 4, 0, position_ids=restart.expand(2, -1))
    with pytest.raises(NsaError, match="an empty cache"):
        find_segments(1, 4, 7, position_ids=restart)
    with pytest.raises(NsaError, match="must be equal"):
        find_segments(1, 4, 0, cu_seq_lens_q=torch.tensor([0, 2, 4]), cu_seq_lens_k=torch.tensor([0, 1, 4]))


CPU = torch.device("cpu")


@pytest.mark.parametrize("past", [3, torch.tensor(3)])
def test_a_static_cache_is_filled_so_far(past):
    segments = static_segments(2, 1, past, 9, CPU)
    assert segments.lengths.tolist() == [4, 4] and segments.lengths.dtype == torch.int32 and segments.starts is None
    for given in (mask("1111", "0011"), mask("111100000", "001100000")):
        segments = static_segments(2, 1, past, 9, CPU, attention_mask=given)
        assert segments.lengths.tolist() == [4, 4] and segments.starts.tolist() == [0, 2]


def test_a_row_of_a_static_cache_without_tokens_starts_behind_its_end():
    assert static_segments(2, 3, 0, 9, CPU, attention_mask=mask("000", "111")).starts.tolist() == [3, 0]


def test_a_static_mask_has_the_same_shape_at_every_step():
    assert static_mask(mask("01", "11"), 4).tolist() == [[0, 1, 0, 0], [1, 1, 0, 0]]
    whole = mask("0111", "1111")
    assert static_mask(whole, 4) is whole and static_mask(None, 4) is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"attention_mask": mask("10111", "11111")}, "holes"),
        ({"attention_mask": mask("111", "111")}, r"attention_mask must be \[2, 5\] or \[2, 9\] .* got \[2, 3\]"),
        ({"attention_mask": torch.ones(2, 1, 5, 9)}, "takes a 2D attention_mask"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, "static cache cannot hold packed documents"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "static cache cannot hold packed documents"),
    ],
)
def test_what_a_static_cache_refuses(given, message):
    with pytest.raises(NsaError, match=message):
        static_segments(2, 5, 0, 9, CPU, **given)


# Where rows start in a text of `LENGTH` tokens: at a border of nothing, and one full row.
STARTS = [0, 37, 90]


def rows_alone(model, x, starts=STARTS) -> list[torch.Tensor]:
    """What each row gives without its padding."""
    return [model(x[row : row + 1, start:]).logits[0] for row, start in enumerate(starts)]


def assert_rows(padded, alone, starts=STARTS) -> None:
    for row, start in enumerate(starts):
        assert relative(padded[row, start : start + len(alone[row])], alone[row]) < 1e-5
    assert padded.isfinite().all()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("options", [{}, {"nsa_compression": "linear"}, {"nsa_branch_kv": "independent"}])
def test_padded_rows_without_position_ids(options, dense, tiny_nsa_model):
    """A trained compressor reads keys after RoPE: where a row starts must not be in them."""
    model, x = tiny_nsa_model(**options), tokens(3)
    padding = left_padded(x, STARTS)
    with torch.no_grad(), model.dense_attention() if dense else nullcontext():
        alone = rows_alone(model, x)
        assert_rows(model(x, attention_mask=padding["attention_mask"]).logits, alone)
        embeds = model.get_input_embeddings()(x)
        assert_rows(model(inputs_embeds=embeds, attention_mask=padding["attention_mask"]).logits, alone)
        hidden = [model.model(x, **more)[0] for more in (padding, {**padding, "position_ids": None})]
    assert torch.equal(*hidden), "as with the position ids that the rows have"


def test_rows_padded_on_both_sides_as_a_trainer_scores_them(tiny_nsa_model):
    """A batch of prompts, padded on the left, and of their completions, padded on the right."""
    model, x = tiny_nsa_model(), tokens(3)
    mask = left_padded(x, STARTS)["attention_mask"]
    mask[1, 120:] = mask[2, 100:] = 0
    with torch.no_grad():
        got = model(x, attention_mask=mask).logits
        for row, (start, stop) in enumerate(zip(STARTS, (150, 120, 100), strict=True)):
            assert relative(got[row, start:stop], model(x[row : row + 1, start:stop]).logits[0]) < 1e-5


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("named", ["both", "cu_seq_lens_q", "cu_seq_lens_k"])
def test_borders_without_position_ids(named, dense, tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(1)
    borders = torch.tensor([0, 60, 61, 150])
    names = ["cu_seq_lens_q", "cu_seq_lens_k"] if named == "both" else [named]
    with torch.no_grad(), model.dense_attention() if dense else nullcontext():
        got = model(x, **dict.fromkeys(names, borders)).logits
        alone = [model(x[:, a:b]).logits for a, b in pairwise(borders.tolist())]
    assert relative(got, torch.cat(alone, 1)) < 1e-5


CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "configured": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=LENGTH),
    "per branch": lambda model: DynamicCache(),
    "static per branch": lambda model: StaticCache(model.config, max_cache_len=LENGTH),
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("steps", [[100] + [1] * 50, [41, 1, 7, 61] + [1] * 40])
def test_a_loop_of_ones_own_without_position_ids(steps, kind, dense, tiny_nsa_model):
    """The mask grows with every token, as in any loop that was written by hand."""
    model = tiny_nsa_model(nsa_branch_kv="independent" if kind.endswith("per branch") else "shared")
    x = tokens(3)
    mask = left_padded(x, STARTS)["attention_mask"]
    with torch.no_grad(), model.dense_attention() if dense else nullcontext():
        alone = rows_alone(model, x)
        assert_rows(in_steps(model, x, steps, CACHES[kind](model), attention_mask=mask), alone)


def test_a_cache_filled_dense_has_the_rows_own_positions(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(3)
    padding = left_padded(x, STARTS)
    caches = []
    for more in ({}, {"position_ids": padding["position_ids"]}):
        caches.append(DynamicCache())
        with torch.no_grad(), model.dense_attention():
            model(x, attention_mask=padding["attention_mask"], **{CACHE: caches[-1]}, **more)
    assert torch.equal(*(cache.layers[1].keys for cache in caches))


def test_given_position_ids_are_kept(tiny_nsa_model):
    model, x = tiny_nsa_model(), tokens(3)
    mask = left_padded(x, STARTS)["attention_mask"]
    with torch.no_grad():
        counted, shifted = (
            model(x, attention_mask=mask, position_ids=torch.arange(start, start + LENGTH).expand(3, -1)).logits
            for start in (0, 1000)
        )
        assert relative(shifted[1, 37:], counted[1, 37:]) > 1e-3
        assert relative(model(x, attention_mask=mask).logits[1, 37:], counted[1, 37:]) > 1e-3


def test_a_compiled_step_finds_the_positions_too(tiny_nsa_model):
    """In one graph, whatever the padding, and with nothing read on the host."""
    model, x = tiny_nsa_model(), tokens(3)
    mask, cache = left_padded(x, STARTS)["attention_mask"], StaticCache(model.config, max_cache_len=LENGTH)
    torch._dynamo.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    filled = torch.zeros_like(mask)
    with torch.no_grad():
        filled[:, :100] = mask[:, :100]
        parts = [model(x[:, :100], attention_mask=filled, **{CACHE: cache}).logits]
        for place in range(100, 120):
            filled[:, place] = 1
            parts.append(step(x[:, place : place + 1], attention_mask=filled, **{CACHE: cache}).logits)
        assert_rows(torch.cat(parts, 1), rows_alone(model, x[:, :120]))


def test_positions_are_left_to_the_family_where_nothing_is_padded(tiny_nsa_model):
    assert find_segments(2, 4, 0, attention_mask=mask("1111", "1100")).position_ids(4) is None
    assert find_segments(1, 4, 0).position_ids(4) is None
    assert find_segments(1, 4, 0, cu_seq_lens_q=torch.tensor([0, 4])).position_ids(4) is None


def test_positions_count_from_the_first_real_token():
    assert find_segments(2, 4, 0, attention_mask=mask("0011", "1111")).position_ids(4).tolist() == [
        [0, 0, 0, 1],
        [0, 1, 2, 3],
    ]
    step = find_segments(2, 1, 3, attention_mask=mask("0011", "1111"))
    assert step.position_ids(1).tolist() == [[1], [3]]
    assert find_segments(1, 5, 0, cu_seq_lens_q=torch.tensor([0, 2, 5])).position_ids(5).tolist() == [[0, 1, 0, 1, 2]]
    for past in (3, torch.tensor(3)):
        segments = static_segments(2, 1, past, 9, CPU, attention_mask=mask("001100000", "111100000"))
        assert segments.position_ids(1).tolist() == [[1], [3]] and segments.position_ids(1).dtype == torch.int64


def test_positions_of_four_dimensions_have_the_texts_first():
    """As Transformers has it for RoPE over pictures; three dimensions say nothing of documents."""
    text, other = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 0, 7, 8]])
    assert find_segments(1, 4, 0, position_ids=torch.stack([text, other, other, other])).borders == (0, 2, 4)
    assert find_segments(1, 4, 0, position_ids=torch.stack([other, other, other])) == Segments()
    rows = torch.arange(4).expand(2, 4)
    assert find_segments(2, 4, 0, position_ids=torch.stack([rows, *[other.expand(2, -1)] * 3])) == Segments()
    assert static_segments(1, 4, 0, 9, CPU, position_ids=torch.stack([other] * 3)).lengths.tolist() == [4]


def test_segments_move_as_tensors_do():
    """Accelerate's hooks move what a layer is given by its `to`."""
    segments = static_segments(2, 1, 3, 9, CPU, attention_mask=mask("0011", "1111"))
    moved = send_to_device({"nsa_segments": segments}, "meta", non_blocking=True)["nsa_segments"]
    assert moved.starts.is_meta and moved.lengths.is_meta and moved.cu_seqlens is None
    packed = find_segments(1, 5, 0, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    assert packed.to("meta").cu_seqlens.is_meta and packed.to("meta").borders == packed.borders
    assert segments.to("cpu").starts is segments.starts


@pytest.mark.parametrize(
    "given",
    [
        {"cu_seq_lens_q": [0, 30, 60]},
        {"cu_seq_lens_k": [0, 30, 60]},
        {"cu_seq_lens_q": torch.tensor([0, 30, 60]), "cu_seq_lens_k": [0, 30, 60]},
        {"position_ids": [list(range(60))]},
        {"input_ids": [list(range(60))]},
        {"inputs_embeds": [[0.0]], "input_ids": None},
        {"attention_mask": [[1] * 60]},
    ],
)
@pytest.mark.parametrize("static", [False, True])
def test_a_list_in_a_tensor_s_place_is_an_error_that_names_both(tiny_nsa_model, given, static):
    model = tiny_nsa_model()
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    name = next(name for name, value in reversed(given.items()) if isinstance(value, list))
    with pytest.raises(NsaError, match=rf"{name}.* got list"):
        model(**{"input_ids": torch.ones(1, 60, dtype=torch.long), CACHE: cache, **given})
