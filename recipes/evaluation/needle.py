"""The suite `needle`: a number, or four, hidden at every depth of texts of several lengths, sparse beside dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from rich.table import Table

from ..terminal import track
from ..training.sources import named_texts
from .answers import Answered, Question, answer, batches
from .haystack import Haystack, multiple, single
from .subject import WAYS, Settings, Subject

KINDS = {"single": single, "multiple": multiple}
# Where dense attention finds more than this share, sparse attention is held against it.
FOUND = 0.8

Result = dict[str, Any]
Cell = tuple[str, int, float]  # kind, length, depth


def needle(subject: Subject, settings: Settings) -> Result:
    """Asks for what is hidden, by generation and by likelihood.

    Returns:
        `cells`, one for each kind, length and depth with what each way `found` (a mean share) and its `nll` (nats a
        token of the right answer); `means` over the depths; `lost`, the cells where dense finds over 80 % and sparse
        finds less.

    Raises:
        NsaError: lengths beyond the model's, or too short for a question.
    """
    haystack = Haystack(subject.tokenizer, named_texts(settings.text))
    places = [round(index / max(1, settings.depths - 1), 4) for index in range(settings.depths)]
    lengths = subject.lengths(settings)
    asked: list[tuple[Cell, Question]] = [
        ((kind, length, depth), make(haystack, length, depth, f"{length} {depth} {sample}"))
        for kind, make in KINDS.items()
        for length in lengths
        for depth in places
        for sample in range(settings.samples)
    ]
    answers: dict[Cell, dict[str, list[Answered]]] = {cell: {way: [] for way in WAYS} for cell, _ in asked}
    groups = batches([each for _, each in asked], subject.model.device.type)
    for group in track(groups, "Needles"):
        for way in WAYS:
            given = answer(subject, way, [asked[place][1] for place in group])
            for place, each in zip(group, given, strict=True):
                answers[asked[place][0]][way].append(each)
    cells: list[Result] = [
        {"kind": kind, "length": length, "depth": depth, **{way: figures(by_way[way]) for way in WAYS}}
        for (kind, length, depth), by_way in answers.items()
    ]
    return {
        "lengths": lengths,
        "depths": places,
        "samples": settings.samples,
        "text": settings.text,
        "cells": cells,
        "means": means(cells, lengths),
        "lost": [{name: cell[name] for name in ("kind", "length", "depth")} for cell in cells if is_lost(cell)],
    }


def is_lost(cell: Result) -> bool:
    """Whether sparse attention finds less where dense attention finds nearly all."""
    return bool(cell["dense"]["found"] > FOUND and cell["sparse"]["found"] < cell["dense"]["found"])


def means(cells: Sequence[Result], lengths: Sequence[int]) -> list[Result]:
    """The means over all depths, for each kind and length."""
    rows = []
    for kind in KINDS:
        for length in lengths:
            here = [cell for cell in cells if (cell["kind"], cell["length"]) == (kind, length)]
            both = {way: {key: mean(cell[way][key] for cell in here) for key in ("found", "nll")} for way in WAYS}
            rows.append({"kind": kind, "length": length, **both})
    return rows


def figures(answers: Sequence[Answered]) -> dict[str, float]:
    """The means over a cell's samples."""
    nll = [each.nll for each in answers if each.nll is not None]
    return {"found": mean(each.found for each in answers), "nll": mean(nll)}


def render_needle(result: Result, name: str) -> Iterator[Table]:
    """What was found by kind and length, the means over all depths."""
    table = Table("needles", "tokens", "found dense", "sparse", "nats dense", "sparse", title=f"{name}: needles found")
    for row in result["means"]:
        found, nll = ([row[way][key] for way in WAYS] for key in ("found", "nll"))
        table.add_row(row["kind"], f"{row['length']:,}", *(f"{x:.0%}" for x in found), *(f"{x:.3f}" for x in nll))
    table.caption = (
        f"{len(result['lost'])} of {len(result['cells'])} cells where dense finds over {FOUND:.0%} and sparse less"
    )
    yield table
