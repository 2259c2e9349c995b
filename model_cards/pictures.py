"""The card's pictures, drawn from results alone: training curve, perplexity by position, selected blocks, gates.

Drawn with matplotlib's Figure, without pyplot: no window, no global state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Result = dict[str, Any]  # as a command wrote it, see card.RESULTS
Pictures = dict[str, Callable[[], Figure] | None]  # by file name, how each is drawn; None for what was not measured

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e8ee"
BLUE, ORANGE, GREEN, VIOLET = "#2563c9", "#dd6b20", "#23875a", "#7c4dbd"
SHADES = LinearSegmentedColormap.from_list("selected", ["#f4f7fb", "#a9c7ee", "#3f7fd6", "#123a7a", "#071a3d"])
DPI = 160
NEEDLES = "needle.png"
TRAINING = "training.png"
RATES = (("lr_backbone", "backbone"), ("lr_nsa", "NSA parameters"))  # in a step's row, and their names
MAPS_ACROSS, MAPS_DOWN = 6, 4  # layers and heads shown at most


def pictures_of(
    training: Result | None, verify: Result | None, inspection: Result | None, evaluation: Result | None = None
) -> Pictures:
    """The card's pictures, which are not drawn yet; `evaluation` is by suite, see evaluation.py."""
    needles, recall = (evaluation or {}).get("needle"), ((evaluation or {}).get("ppl") or {}).get("recall")
    return {
        TRAINING: (lambda: training_curve(training)) if training else None,
        "perplexity.png": perplexity_picture(training, verify),
        "selection.png": (lambda: selection_maps(inspection)) if inspection and inspection["layers"] else None,
        "gates.png": (lambda: gate_lines(inspection)) if inspection and inspection["layers"] else None,
        "recall.png": (lambda: recall_lines(recall)) if recall else None,
        NEEDLES: (lambda: needle_maps(needles)) if needles else None,
    }


def draw_pictures(
    folder: Path,
    training: Result | None,
    verify: Result | None,
    inspection: Result | None,
    evaluation: Result | None = None,
) -> list[str]:
    """Draws what was measured, and removes old pictures of what was not.

    A file that is a link is replaced, and what it points to stays.

    Args:
        folder: for the pictures.
        training, verify, inspection, evaluation: the results; None for one that was not measured.

    Returns:
        The files' names.
    """
    pictures = pictures_of(training, verify, inspection, evaluation)
    drawn = {name: draw() for name, draw in pictures.items() if draw is not None}
    for name in pictures:
        (folder / name).unlink(missing_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=DPI, facecolor="white", metadata={"Software": None})
    return list(drawn)


def perplexity_picture(training: Result | None, verify: Result | None) -> Callable[[], Figure] | None:
    """How perplexity by position is drawn: before and after training, or else of `verify`; None without either."""
    if training:
        held_out = training["held_out"]
        before, after, own_dense = held_out["before"], held_out["after"], held_out["after_own_dense"]
        if held_out.get("teacher") == "none":  # before it the model knew nothing
            series = [("sparse, after", BLUE, [row["ppl"] for row in after])]
            return lambda: perplexity_by_position(own_dense, series, "held-out text, after training")
        series = [
            ("sparse, before training", ORANGE, [row["ppl"] for row in before]),
            ("sparse, after", BLUE, [row["ppl"] for row in after]),
            ("after, run dense", GREEN, [row["ppl_reference"] for row in own_dense]),
        ]
        return lambda: perplexity_by_position(before, series, "held-out text, before and after training")
    if verify:
        rows = verify["by_position"]
        return lambda: perplexity_by_position(rows, [("sparse", ORANGE, [row["ppl"] for row in rows])], "held-out text")
    return None


def training_curve(training: Result) -> Figure:
    """By step next-token loss, KL to the teacher with lines for the held-out KL before and after, and the rates.

    The rates are left out where the result has none, as it had in older versions.
    """
    curve, held_out = training["curve"], training["held_out"]
    steps = [row["step"] for row in curve]
    rates = [(key, name) for key, name in RATES if any(row.get(key) for row in curve)]
    panels = 3 if rates else 2
    figure = Figure(figsize=(9 if panels == 2 else 11.5, 3.7), layout="constrained")
    left, middle, *others = figure.subplots(1, panels)
    line: dict[str, Any] = {"linewidth": 1.8, **({"marker": "o", "markersize": 4} if len(steps) <= 40 else {})}
    left.plot(steps, as_array([row["ce"] for row in curve]), color=BLUE, **line)
    style(left, "next-token loss", "step", "nats a token")
    alone = held_out.get("teacher") == "none"
    if not alone:
        kl = as_array([row["kl"] for row in curve])
        middle.plot(steps, kl, color=VIOLET, label="training text, each step", **line)
    for key, name, color in (("kl_before", "before", ORANGE), ("kl_after", "after", GREEN)):
        if held_out[key] is not None:
            label = f"held-out, {name}: {held_out[key]:.4g}"
            middle.axhline(held_out[key], color=color, linewidth=1.4, linestyle=(0, (5, 3)), label=label)
    style(middle, "KL to the same weights run dense" if alone else "KL to the dense teacher", "step", "nats a token")
    middle.set_ylim(bottom=0)
    for axes in others:
        for (key, name), color in zip(rates, (GREEN, ORANGE), strict=False):
            # a zero has no place on a logarithmic axis
            axes.plot(steps, as_array([row.get(key) or None for row in curve]), color=color, label=name, **line)
        axes.set_yscale("log")
        style(axes, "rates", "step", "rate")
    for axes in (middle, *others):  # below the axes, where no line is
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    for axes in (left, middle, *others):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_training(folder: Path, training: Result) -> None:
    """Draws `training_curve` into a folder; a file that is a link is replaced."""
    (folder / TRAINING).unlink(missing_ok=True)
    training_curve(training).savefig(folder / TRAINING, dpi=DPI, facecolor="white", metadata={"Software": None})


def perplexity_by_position(
    dense: Sequence[Result], series: Sequence[tuple[str, str, Sequence[float | None]]], what: str
) -> Figure:
    """Perplexity by position, and beside it each series' difference from dense in percent; curves nearly coincide.

    Args:
        dense: a row for each range of positions, with "from", "to" and "ppl_reference".
        series: name, color and perplexities of each.
        what: which text, for the title.
    """
    labels = [f"{row['from']:,}–\n{row['to']:,}" for row in dense]
    base = as_array([row["ppl_reference"] for row in dense])
    place = np.arange(len(labels))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
    left.plot(place, base, color=INK, linewidth=1.8, marker="o", markersize=4, label="dense")
    width = 0.8 / len(series)
    for index, (name, color, values) in enumerate(series):
        array = as_array(values)
        left.plot(place, array, color=color, linewidth=1.5, marker="o", markersize=3.5, label=name)
        percent = (array / base - 1) * 100
        offset = (index - (len(series) - 1) / 2) * width
        bars = right.bar(place + offset, percent, width * 0.9, color=color, label=name)
        right.bar_label(bars, [percent_label(value) for value in percent], fontsize=7, color=MUTED, padding=2)
    style(left, f"perplexity, {what}", "position", "perplexity")
    style(right, "difference from dense", "position", "percent")
    right.axhline(0, color=INK, linewidth=0.9)
    right.margins(y=0.16)
    for axes in (left, right):
        axes.set_xticks(place, labels)
    handles = left.get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside lower center", ncols=len(series) + 1, frameon=False, fontsize=8, labelcolor=INK
    )
    return figure


def selection_maps(inspection: Result) -> Figure:
    """Which key blocks (columns) the queries of each block (rows) select: some layers across, KV heads down."""
    shown_layers = spread(len(inspection["layers"]), MAPS_ACROSS)
    heads = spread(len(inspection["map"][0]), MAPS_DOWN)
    figure = Figure(figsize=(1.55 * len(shown_layers) + 1.2, 1.55 * len(heads) + 0.9), layout="constrained")
    grid = figure.subplots(len(heads), len(shown_layers), squeeze=False)
    image = None
    for row, head in enumerate(heads):
        for column, index in enumerate(shown_layers):
            axes = grid[row][column]
            shares = np.asarray(inspection["map"][index][head], dtype=float)
            future = np.triu(np.ones_like(shares, dtype=bool), 1)
            image = axes.imshow(
                np.ma.masked_where(future, shares), cmap=SHADES, vmin=0, vmax=1, interpolation="nearest"
            )
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(GRID)
            if row == 0:
                axes.set_title(f"layer {inspection['layers'][index]}", fontsize=9, color=INK)
            if column == 0:
                axes.set_ylabel(f"KV head {head}", fontsize=9, color=INK)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, fraction=0.025, pad=0.02, ticks=[0, 0.5, 1], format="{x:.0%}")
    bar.set_label("of a block's queries select it", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8, color=GRID, labelcolor=MUTED)
    bar.outline.set_edgecolor(GRID)
    figure.supxlabel("key block", fontsize=9, color=MUTED)
    figure.supylabel("query block", fontsize=9, color=MUTED)
    return figure


def gate_lines(inspection: Result) -> Figure:
    """Mean gate of each branch by layer; the selected branch has a panel of its own, far from the others."""
    layers, gates = inspection["layers"], np.asarray(inspection["gates"], dtype=float)
    branches = inspection["branches"]
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 2)
    colors = {"compressed": ORANGE, "selected": BLUE, "window": GREEN}
    others = [branch for branch in branches if branch != "selected"]
    for axes, names in zip(panels, (["selected"], others), strict=True):
        for name in names:
            values = gates[:, branches.index(name)]
            axes.plot(layers, values, color=colors[name], linewidth=1.6, marker="o", markersize=3.5, label=name)
        style(axes, "mean gate: " + " and ".join(names), "layer", "gate")
        axes.ticklabel_format(useOffset=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].axhline(0, color=MUTED, linewidth=0.9)
    panels[0].axhline(1, color=MUTED, linewidth=0.9)
    panels[1].legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def recall_lines(recall: Sequence[Result]) -> Figure:
    """By layer the recall of the oracle's blocks, and how much of dense attention lies in the selected blocks."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = [row["layer"] for row in recall]
    dots = {"linewidth": 1.6, "marker": "o", "markersize": 3.5}
    left.plot(layers, as_array([row["recall"] for row in recall]), color=BLUE, **dots)
    for key, name, color in (("oracle", "the best blocks", INK), ("captured", "the selected ones", BLUE)):
        right.plot(layers, as_array([row[key] for row in recall]), color=color, label=name, **dots)
    style(left, "share of the best blocks that is selected", "layer", "recall")
    style(right, "share of dense attention that lies in", "layer", "share")
    right.legend(frameon=False, fontsize=8, labelcolor=INK)
    left.set_ylim(0, 1.02)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def needle_maps(needles: Result) -> Figure:
    """What is found by length (columns) and depth (rows), dense beside sparse: one needle above, several below.

    Args:
        needles: of the suite `needle`.
    """
    lengths, depths = needles["lengths"], needles["depths"]
    figure = Figure(figsize=(1.2 * len(lengths) + 4.4, 5.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    image = None
    for row, (kind, words) in enumerate((("single", "one needle"), ("multiple", "several needles"))):
        for column, way in enumerate(("dense", "sparse")):
            found = {
                (cell["depth"], cell["length"]): cell[way]["found"] for cell in needles["cells"] if cell["kind"] == kind
            }
            shares = [[found[depth, length] for length in lengths] for depth in depths]
            axes = grid[row][column]
            image = axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for place, line in enumerate(shares):
                for across, share in enumerate(line):
                    color = "white" if share > 0.4 else INK
                    axes.text(across, place, f"{share:.0%}", ha="center", va="center", fontsize=7, color=color)
            axes.set_title(f"{words}, {way}", fontsize=10, color=INK, loc="left")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            shown = spread(len(depths), 6)
            axes.set_yticks(shown, [f"{depths[place]:.0%}" for place in shown])
            axes.tick_params(labelsize=8, color=GRID, labelcolor=MUTED)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02, ticks=[0, 0.5, 1], format="{x:.0%}")
    bar.set_label("found", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8, color=GRID, labelcolor=MUTED)
    figure.supxlabel("tokens", fontsize=9, color=MUTED)
    figure.supylabel("depth", fontsize=9, color=MUTED)
    return figure


def draw_needles(folder: Path, needles: Result) -> None:
    """Draws `needle_maps` into a folder; a file that is a link is replaced."""
    (folder / NEEDLES).unlink(missing_ok=True)
    needle_maps(needles).savefig(folder / NEEDLES, dpi=DPI, facecolor="white", metadata={"Software": None})


def layer_bars(measured: Result) -> Figure:
    """The KL with one layer sparse, for every layer; those that are worth being left dense in another color.

    Args:
        measured: of a plan, see `nsa_hf.conversion.plan`.
    """
    rows, worth = measured["by_layer"], measured["dense_layers"]["layers"]
    figure = Figure(figsize=(max(4.5, 1.5 + 0.2 * len(rows)), 3.2), layout="constrained")
    axes = figure.subplots()
    colors = [ORANGE if row["layer"] in worth else BLUE for row in rows]
    axes.bar([row["layer"] for row in rows], [row["kl"] for row in rows], 0.75, color=colors)
    tokens = max(text["tokens"] for text in measured["documents"])
    positions = f"positions {measured['exact_up_to']:,} to {tokens:,}"
    style(axes, f"KL to dense with one layer sparse, {positions}", "layer", "nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if worth:
        axes.bar([], [], color=ORANGE, label="worth leaving dense")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def draw_layers(path: Path, measured: Result) -> None:
    """Draws `layer_bars` into a file."""
    layer_bars(measured).savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})


def percent_label(value: float) -> str:
    """A difference in percent with two or three digits, "0" for a tiny one, nothing where nothing was measured."""
    if np.isnan(value):
        return ""
    return "0" if abs(value) < 0.005 else f"{value:+.2f}" if abs(value) < 1 else f"{value:+.1f}"


def style(axes: Axes, title: str, x: str, y: str) -> None:
    """Gives axes their title, labels and colors."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=8)
    axes.set_xlabel(x, fontsize=8.5, color=MUTED)
    axes.set_ylabel(y, fontsize=8.5, color=MUTED)
    axes.tick_params(labelsize=8, color=GRID, labelcolor=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. count - 1, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def as_array(values: Sequence[float | None]) -> np.ndarray:
    """Numbers as an array, NaN for what was not measured."""
    return np.asarray([np.nan if value is None else value for value in values], dtype=float)
