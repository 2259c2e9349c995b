"""What training has brought a converted model: a row for each run and range of positions, of the runs' own records.

    python -m nsa_hf.recipes.benchmarks.adaptation --csv adaptation.csv build/adapt-3m build/adapt-10m ...
    python -m nsa_hf.recipes.benchmarks.adaptation --csv adaptation.csv --picture adaptation.png

Each run is a folder that `nsa-hf train` wrote, or a training.json out of one, named by the folder or file. Rises are of
the perplexity over the dense teacher's on the same held-out texts, in per cent, with the standard error over documents.
The picture shows KL and rise over the tokens trained on, of the runs whose names begin with --curve. A run without a
teacher stands beside its own weights run dense: before training in `before`, after it in `after` and `ppl_dense`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nsa_hf.errors import NsaError

from .common import git_commit, write_rows

RUN = ("run", "gpus", "processes", "torch", "transformers", "commit", "tokens", "steps")
SPEED = ("seconds", "tokens_per_second", "memory_gib", "mfu")
RANGE = ("from", "to", "documents", "ppl_dense", "ppl_before", "ppl_after", "ppl_own_dense")
CHANGE = ("kl_before", "kl_after", "rise_before_pct", "rise_after_pct", "rise_after_error_pct", "same_top1_after")
COLUMNS = (*RUN, *SPEED, "settings", *RANGE, *CHANGE)
# Settings that say nothing of what a run teaches.
LEFT_OUT = {"model", "out", "stages", "data", "held_out", "save_every", "keep", "log_every", "trackers"}


def read_record(path: Path) -> tuple[str, dict[str, Any]]:
    """A run's name and its training.json.

    Raises:
        NsaError: there is none.
    """
    file = path / "training.json" if path.is_dir() else path
    try:
        return (path.name if path.is_dir() else path.stem), json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NsaError(f"no record of a finished run at {file}: {error}") from error


def rows_of(name: str, record: dict[str, Any], commit: str) -> list[dict[str, Any]]:
    """A run's rows, COLUMNS each.

    Args:
        name: the run's.
        record: its training.json.
        commit: of the code that it ran with.
    """
    held_out, curve = record["held_out"], record["curve"]
    tokens = sum(stage["steps"] * stage["tokens_per_step"] for stage in record["stages"])
    run = {
        "run": name,
        "gpus": " + ".join(record["hardware"]["gpus"][: record["processes"]]) or record["hardware"]["cpu"],
        "processes": record["processes"],
        "torch": record["versions"]["torch"],
        "transformers": record["versions"]["transformers"],
        "commit": commit,
        "tokens": tokens,
        "steps": len(curve),
        "seconds": f"{sum(row['seconds'] for row in curve):.1f}",
        "tokens_per_second": f"{median(row['tokens_per_second'] for row in curve):.0f}",
        "memory_gib": figure(max((row["memory"] for row in curve if "memory" in row), default=None), 1, 1 / 2**30),
        "mfu": figure(median(mfu) if (mfu := [row["mfu"] for row in curve if "mfu" in row]) else None, 3),
        "settings": " ".join(filter(None, (told_settings(record["config"]), told_model(record.get("nsa", {}))))),
    }
    ranges = zip(held_out["before"], held_out["after"], held_out["after_own_dense"], strict=True)
    return [
        run
        | {
            "from": after["from"],
            "to": after["to"],
            "documents": len(held_out["names"]),
            "ppl_dense": figure(after["ppl_reference"], 4),
            "ppl_before": figure(before["ppl"], 4),
            "ppl_after": figure(after["ppl"], 4),
            "ppl_own_dense": figure(own["ppl_reference"], 4),
            "kl_before": figure(before["kl"], 6),
            "kl_after": figure(after["kl"], 6),
            "rise_before_pct": figure(before["rise"], 3, 100),
            "rise_after_pct": figure(after["rise"], 3, 100),
            "rise_after_error_pct": figure(after["rise_error"], 3, 100),
            "same_top1_after": figure(after["same_top1"], 5),
        }
        for before, after, own in ranges
    ]


def figure(value: float | None, digits: int, times: float = 1.0) -> str:
    """A number for the table; empty where nothing was measured."""
    return "" if value is None else f"{value * times:.{digits}f}"


def told_settings(config: dict[str, Any]) -> str:
    """The settings that differ from the defaults, as `name=value name=value`.

    Of several stages: those of the whole run, then each stage's, with bars between them.
    """
    from ..training.config import WHOLE_RUN, RunConfig

    defaults = RunConfig(model="", out="").as_dict()
    differ = lambda stage: " ".join(  # noqa: E731
        f"{name}={value}" for name, value in stage.items() if name not in LEFT_OUT and value != defaults.get(name)
    )
    if not config.get("stages"):
        return differ(config)
    whole = {name: value for name, value in config.items() if name in WHOLE_RUN}
    return " | ".join(map(differ, [whole, *config["stages"]]))


def told_model(fields: dict[str, Any]) -> str:
    """What a model is made with, its `nsa_*` fields that are not as by default, as `name=value name=value`."""
    return " ".join(f"{name}={str(value).replace(' ', '')}" for name, value in fields.items())


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A picture of KL and rise over the tokens trained on, a line for each range of positions.

    Args:
        rows: of one series of runs.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4.5), layout="constrained")
    kl_axes, rise_axes = picture.subplots(1, 2)
    ranges = sorted({(int(row["from"]), int(row["to"])) for row in rows})
    for start, end in ranges:
        of_range = sorted((row for row in rows if int(row["from"]) == start), key=lambda row: int(row["tokens"]))
        tokens = [0.0] + [int(row["tokens"]) / 1e6 for row in of_range]
        label = f"positions {start:,} to {end:,}"
        kl_axes.plot(tokens, [float(of_range[0]["kl_before"])] + [float(row["kl_after"]) for row in of_range], "o-")
        rises = [float(of_range[0]["rise_before_pct"])] + [float(row["rise_after_pct"]) for row in of_range]
        errors = [0.0] + [float(row["rise_after_error_pct"] or 0) for row in of_range]
        rise_axes.errorbar(tokens, rises, errors, fmt="o-", capsize=2, label=label)
    kl_axes.set(xlabel="million tokens of training", ylabel="KL to the dense model, nats a token", yscale="log")
    rise_axes.set(xlabel="million tokens of training", ylabel="rise of perplexity over dense, %")
    rise_axes.axhline(0, color="grey", linewidth=0.8)
    for axes in (kl_axes, rise_axes):
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlim(-0.1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    rise_axes.legend()
    picture.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, or their training.json")
    parser.add_argument("--csv", type=Path, required=True, help="rows are appended to it")
    parser.add_argument("--commit", help="of the code that they ran with; default: git's")
    parser.add_argument("--picture", type=Path, help="PNG to draw of the CSV")
    parser.add_argument("--curve", default="", help="how the names of the runs in the picture begin")
    args = parser.parse_args(arguments)
    try:
        for path in args.runs:
            write_rows(args.csv, COLUMNS, rows_of(*read_record(path), args.commit or git_commit()))
    except NsaError as error:
        parser.error(str(error))
    if args.picture:
        with args.csv.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["run"].startswith(args.curve)]
        if not rows:
            parser.error(f"{args.csv} has no run whose name begins with {args.curve!r}")
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
