"""Padding and packing, worked out once per forward pass."""

from __future__ import annotations

import pytest
import torch

from nsa_hf.errors import NsaError
from nsa_hf.segments import find_segments, static_mask, static_segments


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(letter) for letter in row] for row in rows])


def test_left_padding_gives_starts():
    found = find_segments(3, 4, 0, attention_mask=mask("1111", "0011", "0110"))
    assert found.starts.tolist() == [0, 2, 1] and found.starts.dtype == torch.int32 and found.cu_seqlens is None


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
    found = find_segments(1, 6, 0, position_ids=torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert found.borders == (0, 3, 4, 6) and found.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert found.cu_seqlens.dtype == torch.int32 and found.starts is None


def test_position_ids_mean_packing_only_without_a_mask():
    positions = torch.tensor([[0, 0, 0, 1]])
    found = find_segments(1, 4, 0, position_ids=positions, attention_mask=mask("0011"))
    assert found.cu_seqlens is None and found.starts.tolist() == [2]
    assert find_segments(1, 4, 0, position_ids=torch.arange(4)[None]).cu_seqlens is None
    assert find_segments(1, 1, 9, position_ids=torch.tensor([[9]])).cu_seqlens is None


def test_explicit_borders_come_first():
    borders = torch.tensor([0, 2, 4])
    found = find_segments(
        1, 4, 0, cu_seq_lens_q=borders, cu_seq_lens_k=borders.clone(), position_ids=torch.arange(4)[None]
    )
    assert found.borders == (0, 2, 4)
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
    found = static_segments(2, 1, past, 9, CPU)
    assert found.lengths.tolist() == [4, 4] and found.lengths.dtype == torch.int32 and found.starts is None
    for given in (mask("1111", "0011"), mask("111100000", "001100000")):
        found = static_segments(2, 1, past, 9, CPU, attention_mask=given)
        assert found.lengths.tolist() == [4, 4] and found.starts.tolist() == [0, 2]


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
