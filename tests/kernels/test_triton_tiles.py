"""In which tiles the numbers of a head are."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("dim", "widths"),
    [
        (1, (16, 0)),
        (24, (32, 0)),
        (40, (32, 16)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128, 0)),
        (128, (128, 0)),
        (192, (128, 64)),
        (224, (256, 0)),
        (256, (256, 0)),
    ],
)
def test_widths(dim: int, widths: tuple[int, int]) -> None:
    from nsa_hf.kernels.gpu.common import first_width, second_width, tile_width

    assert (first_width(dim), second_width(dim)) == widths
    assert tile_width(dim) == sum(widths)


def test_tiles_no_wider_than_asked_for() -> None:
    from nsa_hf.kernels.gpu.common import first_width, second_width

    for dim, widths in ((128, (64, 64)), (120, (64, 64)), (96, (64, 32)), (64, (64, 0)), (72, (64, 16))):
        assert (first_width(dim, 64), second_width(dim, 64)) == widths


def test_two_tiles_hold_everything_and_are_less_than_one() -> None:
    from nsa_hf.kernels.gpu.common import first_width, padded, second_width

    for dim in range(1, 257):
        first, second = first_width(dim), second_width(dim)
        assert dim <= first + second <= padded(dim)
        assert (second == 0) == (first + second == padded(dim))
