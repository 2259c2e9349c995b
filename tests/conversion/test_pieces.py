"""conversion/files/pieces.py: a tensor's pieces are all of it, and bits are compared as bits."""

from __future__ import annotations

import pytest
import torch

from nsa_hf.conversion.files.pieces import byte_ranges, pieces_of, same_bits


@pytest.mark.parametrize("count", [0, 1, 256, 257, 1000])
def test_pieces_are_all_of_a_tensor_in_order(count, monkeypatch):
    monkeypatch.setattr("nsa_hf.conversion.files.pieces.PIECE", 1024)
    tensor = torch.arange(count, dtype=torch.int32)
    pieces = list(pieces_of("x", tensor))
    assert torch.equal(torch.cat([piece.values for piece in pieces]), tensor)
    assert [piece.start for piece in pieces] == list(range(0, max(1, count), 256))
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [start for start, _ in byte_ranges(4 * count)] == [4 * piece.start for piece in pieces]


def test_same_bits_is_about_bits():
    x = torch.tensor([0.0, float("nan"), 1.0])
    assert same_bits(x, x.clone())
    assert same_bits(torch.zeros(3, 2).T, torch.zeros(2, 3))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(x, x.double())
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2))
