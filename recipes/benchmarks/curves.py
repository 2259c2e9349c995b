"""The loss of several runs while they trained, in one table and one picture, and their gates.

    python -m nsa_hf.recipes.benchmarks.curves --csv curves.csv --picture curves.png build/scratch-*
    python -m nsa_hf.recipes.benchmarks.curves --csv curves.csv --gates gates.csv build/paper

Each run is a folder that `nsa-hf train` wrote, or a training.json out of one. The picture shows the next-token loss
over the tokens trained on, and beside it the held-out perplexity by position after training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nsa_hf.errors import NsaError

from .adaptation import figure, read_record
from .common import write_rows

COLUMNS = ("run", "tokens", "steps", "loss", "ce", "kl", "grad_norm")
GATES = ("run", "tokens", "layer", "compressed", "selected", "window")
POINTS = 200  # of a run's curve in table and picture, each the mean over its steps

Record = dict[str, Any]


def points(curve: Sequence[Record], count: int = POINTS) -> Iterator[list[Record]]:
    """A curve's steps in at most `count` runs of the same length, but for the last."""
    size = -(-len(curve) // count)
    return (list(curve[first : first + size]) for first in range(0, len(curve), size))


def curve_rows(name: str, record: Record) -> list[Record]:
    """A run's rows, COLUMNS each: means over the steps since the row before; nats a token.

    Args:
        name: the run's.
        record: its training.json.
    """
    return [
        {"run": name, "tokens": part[-1]["tokens"], "steps": len(part)}
        | {key: figure(fmean(row[key] for row in part), 5) for key in ("loss", "ce", "kl", "grad_norm")}
        for part in points(record["curve"])
    ]


def gate_rows(name: str, record: Record) -> list[Record]:
    """A run's mean gates, GATES each, of every step at which they were looked at; none where no gate was trained."""
    return [
        {"run": name, "tokens": row["tokens"], "layer": layer}
        | {branch: figure(mean, 4) for branch, mean in means.items()}
        for row in record["curve"]
        for layer, means in row.get("gates", {}).items()
    ]


def draw(runs: Sequence[tuple[str, Record]], path: Path) -> None:
    """A picture of the runs' losses and of their held-out perplexities.

    Args:
        runs: name and training.json of each.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4.5), layout="constrained")
    loss_axes, ppl_axes = picture.subplots(1, 2)
    for name, record in runs:
        curve = [(part[-1]["tokens"] / 1e6, fmean(row["ce"] for row in part)) for part in points(record["curve"])]
        loss_axes.plot(*zip(*curve, strict=True), label=name, linewidth=1.4)
        after = record["held_out"]["after"]
        labels = [f"{row['from']:,}-\n{row['to']:,}" for row in after]
        ppl_axes.plot(labels, [row["ppl"] for row in after], "o-", label=name)
    loss_axes.set(xlabel="million tokens of training", ylabel="next-token loss, nats a token", xscale="log")
    loss_axes.xaxis.set_major_formatter("{x:g}")
    ppl_axes.set(xlabel="position", ylabel="held-out perplexity after training")
    for axes in (loss_axes, ppl_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    picture.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, or their training.json")
    parser.add_argument("--csv", type=Path, required=True, help="rows of the curves are appended to it")
    parser.add_argument("--gates", type=Path, help="rows of the gates are appended to it")
    parser.add_argument("--picture", type=Path, help="PNG to draw of these runs")
    args = parser.parse_args(arguments)
    try:
        runs = [read_record(path) for path in args.runs]
        write_rows(args.csv, COLUMNS, [row for run in runs for row in curve_rows(*run)])
        if args.gates:
            write_rows(args.gates, GATES, [row for run in runs for row in gate_rows(*run)])
    except NsaError as error:
        parser.error(str(error))
    if args.picture:
        draw(runs, args.picture)


if __name__ == "__main__":
    main()
