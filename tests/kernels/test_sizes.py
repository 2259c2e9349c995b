"""The sizes' rules and the number of compressed blocks."""

from __future__ import annotations

import pytest
from attention_inputs import Sizes as AnySizes
from attention_inputs import any_sizes
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


@pytest.mark.parametrize("name", Sizes.__dataclass_fields__)
def test_no_size_is_larger_than_positions_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"nsa_{name} must be at most 2\^31 - 1 = 2147483647, got {2**70}"):
        Sizes(**{name: 2**70}).check("nsa_")


@pytest.mark.parametrize("value", [16.0, "16", None, True])
def test_sizes_are_integers(value: object) -> None:
    with pytest.raises(TypeError, match="nsa_topk must be an int"):
        Sizes(topk=value).check("nsa_")  # type: ignore[arg-type]


def test_the_least_sizes() -> None:
    least = Sizes(1, 1, 1, 1, 0, 1, 1)
    assert least.check() is least


@given(sizes=any_sizes(), keys=st.integers(0, 100_000), times=st.sampled_from([1, 10**3, 10**7]))
def test_within_a_text_sizes_are_those_that_the_text_needs(sizes: AnySizes, keys: int, times: int) -> None:
    x = sizes.__dict__
    grown = Sizes(**{**x, **{name: times * x[name] for name in x if name != "kernel_stride"}}).check()
    within = grown.within(keys).check()
    assert within.within(keys) == within
    assert n_blocks(keys, grown.kernel_size, x["kernel_stride"]) == n_blocks(
        keys, within.kernel_size, x["kernel_stride"]
    )
    assert within.block_size == grown.block_size or keys < within.block_size <= 2 * max(keys + 1, 4096)
    blocks = -(-keys // within.block_size)
    for name in ("topk", "init_blocks", "local_blocks"):
        cut = getattr(within, name)
        assert cut == getattr(grown, name) or blocks <= cut <= 4 * max(blocks, 64)
    assert within.window_size == grown.window_size or keys < within.window_size <= 2 * max(keys + 1, 4096)


@pytest.mark.parametrize("keys", [0, 30, 512, 10**6])
def test_the_usual_sizes_are_left_as_they_are(keys: int) -> None:
    assert Sizes().within(keys) == Sizes()
    assert Sizes(64, 16, 128, 64, 2, 4, 4096).within(keys) == Sizes(64, 16, 128, 64, 2, 4, 4096)
