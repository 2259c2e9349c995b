"""The decode benchmark's byte counts against figures worked out by hand, and what it says and draws of a CSV."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_hf.recipes.benchmarks.common import STAMP, Heads, write_rows
from nsa_hf.recipes.benchmarks.figures import (
    COLUMNS,
    bytes_read,
    draw,
    full_batch,
    growth,
    printed,
    read_curves,
    step_row,
    token_bytes,
)

LLAMA, PAPER, SMALL = map(Heads.parse, ("32:8:128", "64:4:128", "9:3:64"))
RATE = 3e12


def tokens_read(tokens: int, queries: int = 1, *, once: bool = False) -> float:
    return bytes_read(PAPER, tokens, "nsa", queries, once=once) / token_bytes(PAPER)


def test_the_paper_s_count() -> None:
    assert tokens_read(65536) == 4095 + 16 * 64 + 512 == 5631
    assert 65536 / tokens_read(65536) == pytest.approx(11.64, abs=0.005)
    assert 131072 / tokens_read(131072) == pytest.approx(13.5, abs=0.05)
    assert tokens_read(131072) / tokens_read(8192) == pytest.approx(4.75, abs=0.005)


def test_what_is_read_once() -> None:
    # two local blocks of 64 lie in the window; at 65,537 the query's own block holds one token
    assert tokens_read(65536, once=True) == 5631 - 128
    assert tokens_read(65537, once=True) == 5631 - 65
    # 3 forced blocks for all four queries, 13 for each, and a window of 515
    assert tokens_read(65536, 4) == 4095 + (3 + 4 * 13) * 64 + 515


def test_a_short_text_is_read_once_a_branch() -> None:
    assert tokens_read(40) == 1 + 40 + 40
    assert tokens_read(40, once=True) == 1 + 40


def test_an_index_is_read_whole() -> None:
    attended = (16 * 64 + 512) * 4096
    # 8 heads of 32 channels: 64 bytes each, or 32 and a scale of 2
    assert bytes_read(LLAMA, 65536, "nsa-index") == attended + 65536 * 8 * 64
    assert bytes_read(LLAMA, 65536, "nsa-index8") == attended + 65536 * 8 * 34
    assert bytes_read(LLAMA, 65536, "nsa-index8", once=True) == attended - 128 * 4096 + 65536 * 8 * 34
    assert bytes_read(LLAMA, 65536, "flash") == 65536 * 4096


def test_full_batches() -> None:
    assert (token_bytes(PAPER), token_bytes(LLAMA), token_bytes(SMALL)) == (2048, 4096, 768)
    assert [full_batch(LLAMA, tokens, 4) for tokens in (65536, 131072, 1 << 24)] == [16, 8, 1]
    assert (full_batch(PAPER, 8192, 4), full_batch(PAPER, 65536, 32), full_batch(SMALL, 65536, 4)) == (256, 256, 85)


def test_a_row() -> None:
    row = step_row(LLAMA, 65536, 16, 1, "nsa", (0.2, 0.19, 0.21), 1.4, RATE)
    assert row["bytes"] == 5631 * 16 * 4096 and row["bytes_once"] == 5503 * 16 * 4096
    # 360.6 MB in .2 ms
    assert (row["gb_s"], row["share_of_card"]) == ("1803", "0.601")
    assert (row["times_dense"], row["ceiling"], row["share_of_ceiling"]) == ("7.00", "11.64", "0.601")
    independent = step_row(LLAMA, 65536, 16, 1, "nsa-independent", (0.2, 0.19, 0.21), 1.4, RATE)
    assert independent["bytes"] == independent["bytes_once"] == row["bytes"]
    dense = step_row(LLAMA, 65536, 16, 1, "flash", (1.4, 1.4, 1.4), None, RATE)
    assert dense["bytes"] == dense["bytes_once"] == 1 << 32
    assert "ceiling" not in dense and set(dense) < set(row) and set(row) | set(STAMP) == set(COLUMNS)
    assert "7.00 times dense" in printed(row) and "times dense" not in printed(dense)


def write(path: Path, rows: list[tuple]) -> None:
    for run, heads, tokens, batch, queries, system, ms in rows:
        stamp = dict.fromkeys(STAMP, run)
        write_rows(path, COLUMNS, [stamp | step_row(heads, tokens, batch, queries, system, (ms, ms, ms), None, RATE)])


def test_curves_and_picture(tmp_path: Path) -> None:
    path = tmp_path / "decode.csv"
    write(
        path,
        [
            ("old", PAPER, 8192, 1, 1, "nsa", 9.0),
            ("new", PAPER, 8192, 1, 1, "flash", 0.03),
            ("new", PAPER, 8192, 1, 1, "cudnn, folded", 0.02),
            ("new", PAPER, 8192, 1, 1, "efficient", 0.05),
            ("new", PAPER, 8192, 1, 1, "nsa", 0.01),
            ("new", PAPER, 8192, 1, 4, "nsa", 7.0),
            ("new", PAPER, 131072, 1, 1, "nsa", 0.015),
            ("new", PAPER, 131072, 7, 1, "nsa", 8.0),
            ("new", PAPER, 8192, 1, 1, "nsa-independent", 0.02),
            ("new", PAPER, 131072, 1, 1, "nsa-independent", 0.05),
            ("new", PAPER, 65536, 32, 1, "flash", 1.6),
            ("new", PAPER, 65536, 32, 1, "nsa", 0.16),
            ("new", PAPER, 65536, 256, 1, "nsa", 1.024),
        ],
    )
    curves = read_curves(path)
    assert curves["batch 1", "64:4:128", "dense"] == {8192: pytest.approx(20)}
    assert curves["batch 1", "64:4:128", "nsa"] == {8192: pytest.approx(10), 131072: pytest.approx(15)}
    assert curves["4 GiB", "64:4:128", "dense"] == {65536: pytest.approx(50)}
    assert curves["4 GiB", "64:4:128", "nsa"] == {65536: pytest.approx(5)}
    assert curves["32 GiB", "64:4:128", "nsa"] == {65536: pytest.approx(4)}
    assert growth(curves) == [
        "64:4:128 batch 1, nsa: 1.50 times from 8192 to 131072, bytes 4.75, those of the window once 5.00",
        "64:4:128 batch 1, nsa-independent: 2.50 times from 8192 to 131072, bytes 4.75",
    ]
    write(tmp_path / "other.csv", [("new", PAPER, 131072, 7, 1, "nsa", 8.0)])
    assert draw(tmp_path / "other.csv") is None
    picture = draw(path)
    assert picture == tmp_path / "decode.png" and picture.read_bytes()[:4] == b"\x89PNG"


def test_a_csv_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns run_id,.*got a,b: name another file"):
        write_rows(path, COLUMNS, [])
    assert path.read_text() == "a,b\n1,2\n"
