"""The oracle itself, against numbers worked out by hand from the specification."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from oracle import Document, compress_oracle, count_blocks, documents, importances, mean, nsa_oracle, overlap, pick


def test_the_weights_at_the_default_sizes() -> None:
    weights = {i: overlap(i, 2, 32, 16, 64) // 16 for i in range(20) if overlap(i, 2, 32, 16, 64)}
    assert weights == {7: 1, 8: 2, 9: 2, 10: 2, 11: 1}


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (31, 0), (32, 1), (47, 1), (48, 2), (65536, 4095)])
def test_only_complete_blocks_count(tokens: int, blocks: int) -> None:
    assert count_blocks(tokens, 32, 16) == blocks


def test_documents() -> None:
    assert documents(1, 12, 4, 2, cu_seqlens=[0, 3, 12]) == [Document(0, 0, 3, 0, 0), Document(0, 3, 9, 0, 3)]
    assert documents(2, 9, 4, 2, starts=[0, 2], lengths=[4, 9]) == [Document(0, 0, 4, 0, 1), Document(1, 2, 7, 0, 2)]


def test_importance_of_one_visible_block_per_half() -> None:
    # l = 4, d = 2, l' = 4: compressed blocks cover 0-3, 2-5, 4-7; the middle one lies half in each selection block
    thirds = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    assert importances(thirds, 3, 4, 2, 4) == [Fraction(4, 3), Fraction(2, 3), 0]


def test_pick_takes_forced_blocks_first_and_the_lower_of_equals() -> None:
    assert pick([0, 5, 1, 5, 0, 0], topk=4, init_blocks=1, local_blocks=2) == [0, 1, 4, 5]
    assert pick([0, 1, 5, 5, 0, 0], topk=4, init_blocks=0, local_blocks=3) == [2, 3, 4, 5]
    assert pick([0, 1, 5, 5, 5, 0], topk=3, init_blocks=0, local_blocks=1) == [2, 3, 5]
    assert pick([3, 1], topk=4, init_blocks=1, local_blocks=1) == [0, 1]


def test_three_tokens_by_hand() -> None:
    # equal keys: each branch is an average. l = l' = d = 1, n = 1 (the query's own block), w = 2; gates 1, 10, 100.
    keys, values = torch.zeros(1, 3, 1, 1), torch.tensor([3.0, 6.0, 12.0]).view(1, 3, 1, 1)
    gates = torch.tensor([1.0, 10.0, 100.0]).expand(1, 3, 1, 3)
    sizes = {"kernel_size": 1, "kernel_stride": 1, "block_size": 1, "topk": 1, "init_blocks": 0, "local_blocks": 1}
    answer = nsa_oracle(keys, keys, values, keys, values, gates, window_size=2, **sizes)
    expected = [3 + 30 + 300, 4.5 + 60 + 450, 7 + 120 + 900]
    assert answer.output.flatten().tolist() == pytest.approx(expected)
    assert answer.selection.flatten().tolist() == [0, 1, 2]


def test_compression_blocks_of_a_padded_row() -> None:
    x = torch.arange(7.0).view(1, 7, 1, 1)
    blocks = compress_oracle(x, mean, 4, 2, starts=torch.tensor([1]), lengths=torch.tensor([7]))
    assert {slot: block.item() for slot, block in blocks.items()} == {(0, 0, 0): 2.5, (0, 1, 0): 4.5}
