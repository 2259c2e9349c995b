"""What the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_hf.recipes.benchmarks.common import Cost, achieved, draw_and_say, make_parser


def test_what_was_done_a_second_beside_what_the_card_gives() -> None:
    # 2 ms by operations, 1 by bytes, of 4
    bound_by_operations = achieved(Cost(1e12, 3e9), 4.0, flops=5e14, moved=3e12)
    assert bound_by_operations == {
        "flops": "1e+12",
        "bytes": "3e+09",
        "floor_ms": "2.0000",
        "tflop_s": "250",
        "gb_s": "750",
        "share_of_card": "0.500",
    }
    bound_by_bytes = achieved(Cost(0, 6e9), 2.5, flops=5e14, moved=3e12)
    assert (bound_by_bytes["floor_ms"], bound_by_bytes["share_of_card"]) == ("2.0000", "0.800")


def test_options_of_every_benchmark() -> None:
    options = make_parser("what it is", "a/b.csv").parse_args([])
    assert options.out == Path("a/b.csv") and options.commit is None


def test_the_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "x.csv"

    def without_matplotlib(path: Path) -> Path:
        raise ImportError

    draw_and_say(path, without_matplotlib)
    assert capsys.readouterr().out == "", "nothing was measured"
    path.touch()
    draw_and_say(path, lambda path: path.with_suffix(".png"))
    draw_and_say(path, lambda path: None)
    draw_and_say(path, without_matplotlib)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}, {path.with_suffix('.png')}"
    assert "too little to compare" in lines[1] and "matplotlib is not installed" in lines[2]
