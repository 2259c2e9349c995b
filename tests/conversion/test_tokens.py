"""conversion/compare/tokens.py: texts to windows of tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from nsa_hf.conversion.compare.metrics import NO_LABEL
from nsa_hf.conversion.compare.tokens import next_tokens, token_windows
from nsa_hf.errors import NsaError


def test_windows_are_the_texts_first_tokens_and_short_texts_are_passed_over(tiny_dense_dir):
    windows = token_windows(
        tiny_dense_dir, [("short", "ab"), ("a", "abc" * 9), ("b", "x" * 30), ("c", "y" * 30)], 20, 2, 256
    )
    assert [name for name, _ in windows] == ["a", "b"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense_dir)
    assert [tokenizer.decode(ids[0]) for _, ids in windows] == [("abc" * 9)[:20], "x" * 20]
    with pytest.raises(NsaError, match=r"expected 2 texts of at least 31 tokens, found 0 among 2 .* has 30"):
        token_windows(tiny_dense_dir, [("a", "x" * 30), ("b", "x" * 29)], 31, 2, 256)


def test_a_folder_without_a_tokenizer_gets_the_same_random_tokens_every_time(tmp_path):
    first, second = (token_windows(tmp_path, [], 30, 2, 17) for _ in range(2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert [tuple(ids.shape) for _, ids in first] == [(1, 30), (1, 30)]
    assert not torch.equal(first[0][1], first[1][1])
    assert min(ids.min() for _, ids in first) >= 0
    assert max(ids.max() for _, ids in first) < 17


def test_next_tokens():
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [6, 7, NO_LABEL]
