"""What converted models answer beside dense: a row for each needle's place, RULER task and lm-eval figure.

    python -m nsa_hf.recipes.benchmarks.answers --csv answers.csv build/adapt-10m ...

Each model is a folder in which `nsa-hf eval --suite needle,ruler,lm-eval` wrote an eval.json, or such a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsa_hf.errors import NsaError

from ..evaluation.suites import read_suites
from .common import git_commit, write_rows

ASKED = ("model", "suite", "task", "figure", "tokens", "depth", "prompts")
FOUND = ("dense", "sparse", "dense_nll", "sparse_nll", "dense_error", "sparse_error")
RAN = ("rope_scaling", "dtype", "device", "torch", "transformers", "commit")
COLUMNS = (*ASKED, *FOUND, *RAN)

Result = dict[str, Any]


def rows_of(model: str, suites: Result, commit: str) -> list[Result]:
    """A model's rows, COLUMNS each; empty where a suite has no such figure.

    Args:
        model: its name.
        suites: the results of its eval.json.
        commit: of the code that measured them.
    """
    rows = []
    for suite, figures in FIGURES.items():
        if suite in suites:
            ran = {"rope_scaling": suites[suite]["rope_scaling"], "dtype": suites[suite]["dtype"], "commit": commit}
            hardware = suites[suite]["hardware"]
            on_gpu = str(suites[suite]["device"]).startswith("cuda")
            ran["device"] = hardware["gpus"][0] if on_gpu else hardware["cpu"]
            ran |= {package: suites[suite]["versions"][package] for package in ("torch", "transformers")}
            rows += [{"model": model, "suite": suite, **row, **ran} for row in figures(suites[suite])]
    return [{name: told(row.get(name)) for name in COLUMNS} for row in rows]


def needles(result: Result) -> Iterator[Result]:
    """A row for each kind, length and depth."""
    for cell in result["cells"]:
        asked = {"task": cell["kind"], "figure": "found", "tokens": cell["length"], "depth": cell["depth"]}
        dense, sparse = cell["dense"], cell["sparse"]
        found = {"dense": dense["found"], "sparse": sparse["found"]}
        yield {**asked, "prompts": result["samples"], **found, "dense_nll": dense["nll"], "sparse_nll": sparse["nll"]}


def tasks(result: Result) -> Iterator[Result]:
    """A row for each of RULER's tasks and lengths."""
    for row in result["rows"]:
        asked = {"task": row["task"], "figure": "found", "tokens": row["length"], "prompts": row["questions"]}
        yield {**asked, "dense": row["dense"], "sparse": row["sparse"]}


def harness(result: Result) -> Iterator[Result]:
    """A row for each of lm-eval's figures."""
    for row in result["rows"]:
        yield {**row, "figure": row["metric"]}


FIGURES = {"needle": needles, "ruler": tasks, "lm-eval": harness}


def told(value: Any) -> str:
    """A value as the table has it: five digits of a share, empty where there is none."""
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of models, or their eval.json")
    parser.add_argument("--csv", type=Path, required=True, help="rows are appended to it")
    parser.add_argument("--commit", help="of the code that measured them; default: git's")
    args = parser.parse_args(arguments)
    commit = args.commit or git_commit()
    try:
        for path in args.models:
            rows = rows_of(path.name if path.is_dir() else path.stem, read_suites(evaluation_of(path)), commit)
            if not rows:
                parser.error(f"{evaluation_of(path)} has none of the suites {', '.join(FIGURES)}: run nsa-hf eval")
            write_rows(args.csv, COLUMNS, rows)
    except NsaError as error:
        parser.error(str(error))


def evaluation_of(path: Path) -> Path:
    """The eval.json of a folder, or the file itself."""
    return path / "eval.json" if path.is_dir() else path


if __name__ == "__main__":
    main()
