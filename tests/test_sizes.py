"""The sizes' rules and the number of compressed blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import count_blocks

from nsa_hf.kernels import Sizes, n_blocks


@given(tokens=st.integers(0, 200), stride=st.integers(1, 20), ratio=st.integers(1, 4))
def test_number_of_blocks(tokens: int, stride: int, ratio: int) -> None:
    assert n_blocks(tokens, ratio * stride, stride) == count_blocks(tokens, ratio * stride, stride)


def test_number_of_blocks_of_the_paper() -> None:
    assert [n_blocks(tokens, 32, 16) for tokens in (0, 31, 32, 47, 48, 65536)] == [0, 0, 1, 1, 2, 4095]


def test_defaults() -> None:
    assert Sizes() == Sizes(32, 16, 64, 16, 1, 2, 512)
    assert Sizes().check() == Sizes() and Sizes().exact_tokens == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_stride": 24, "kernel_size": 48}, "nsa_kernel_stride must divide nsa_block_size.*24 and 64"),
        ({"kernel_stride": 12, "block_size": 96}, "nsa_kernel_stride must divide nsa_kernel_size.*12 and 32"),
        ({"kernel_size": 128}, "nsa_kernel_size.*nsa_block_size.*128 and 64"),
        ({"topk": 2}, "nsa_topk.*nsa_init_blocks.*nsa_local_blocks.*3.*2"),
        ({"init_blocks": -1}, "nsa_init_blocks.*-1"),
        *[
            ({name: 0}, f"nsa_{name}.*1.*0")
            for name in ("kernel_size", "kernel_stride", "block_size", "topk", "local_blocks", "window_size")
        ],
    ],
)
def test_refused_with_the_field_the_value_and_the_rule(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sizes(**change).check("nsa_")


@pytest.mark.parametrize("value", [16.0, "16", None, True])
def test_sizes_are_integers(value: object) -> None:
    with pytest.raises(TypeError, match="nsa_topk must be an int"):
        Sizes(topk=value).check("nsa_")  # type: ignore[arg-type]


def test_the_least_sizes() -> None:
    least = Sizes(1, 1, 1, 1, 0, 1, 1)
    assert least.check() is least
