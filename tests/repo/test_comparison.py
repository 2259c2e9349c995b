"""The tables of docs/comparison.md are the rows of its CSV file: `python tests/repo/test_comparison.py` prints them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "comparison.md"
RESULTS = ROOT / "recipes" / "results" / "others-h100-2026-11-26.csv"
SYSTEMS = {
    "fa2": "FlashAttention-2",
    "cudnn": "cuDNN",
    "flash_nsa": "flash_nsa",
    "xunhaolai": "XunhaoLai",
    "fla": "fla, no window",
    "fsa": "FSA",
    "nsa": "nsa-hf",
}
OTHERS, SAME_RUN = list(SYSTEMS)[:-1], ["nsa", "flash_nsa", "cudnn", "fa2"]


def table(date: str, systems: list[str]) -> str:
    """A row for each shape, length and pass of a day; "-" is not measured."""
    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["date"] == date]
    cells: dict[tuple[str, int, str], dict[str, str]] = {}
    for row in rows:
        place = cells.setdefault((row["config"], int(row["tokens"]), row["part"]), {})
        place[row["system"]] = row["median_ms"] or row["note"]
    lines = [f"| shape | tokens | pass | {' | '.join(SYSTEMS[name] for name in systems)} |"]
    lines.append("| --- | ---: | --- |" + " ---: |" * len(systems))
    for (shape, tokens, part), found in cells.items():
        figures = " | ".join(found.get(name, "-") for name in systems)
        lines.append(f"| {shape} | {tokens:,} | {part} | {figures} |")
    return "\n".join(lines)


def test_the_tables_are_the_csv_files() -> None:
    page = PAGE.read_text()
    assert table("2026-11-22", OTHERS) in page
    assert table("2026-11-26", SAME_RUN) in page


def test_every_version_that_was_read_is_named() -> None:
    rows = re.findall(r"^\| \[[^|]+\| `([0-9a-f]{7})`[^|]*\|", PAGE.read_text(), flags=re.MULTILINE)
    assert len(rows) == 5


if __name__ == "__main__":
    print(table("2026-11-26", SAME_RUN), table("2026-11-22", OTHERS), sep="\n\n")
