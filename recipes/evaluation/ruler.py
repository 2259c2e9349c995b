"""The suite `ruler`: answers generated to prompts like RULER's, or to its own, sparse beside dense."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import mean
from typing import Any

from rich.table import Table

from nsa_hf.errors import NsaError

from ..terminal import track
from ..training.sources import named_texts
from .answers import answer, batches
from .haystack import Haystack
from .ruler_tasks import TASKS, Row, make_row, read_rows
from .subject import WAYS, Settings, Subject

Result = dict[str, Any]


def ruler(subject: Subject, settings: Settings) -> Result:
    """Answers every prompt both ways.

    Returns:
        `rows`, for each task and length the share of the right answers that each way gave; `data`, where the prompts
        are from, None where they were made.

    Raises:
        NsaError: lengths beyond the model's, or data that cannot be read.
    """
    asked = prompts(subject, settings)
    scores: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for group in track(batches([row.question for row in asked], subject.model.device.type), "RULER"):
        for way in WAYS:
            rows = [asked[place] for place in group]
            for row, given in zip(rows, answer(subject, way, [row.question for row in rows]), strict=True):
                # a question about a text has several right answers, of which one is enough
                score = float(given.found > 0) if row.task.startswith("qa") else given.found
                scores[row.task, row.length][way].append(score)
    return {
        "data": None if settings.ruler_data is None else str(settings.ruler_data),
        "text": settings.text if settings.ruler_data is None else None,
        "rows": [
            {"task": task, "length": length, "questions": len(by_way["dense"]), **{w: mean(by_way[w]) for w in WAYS}}
            for (task, length), by_way in sorted(scores.items())
        ],
    }


def prompts(subject: Subject, settings: Settings) -> list[Row]:
    """The prompts: made of the given text, or read. Lengths of read ones are the next power of two."""
    if settings.ruler_data is None:
        haystack = Haystack(subject.tokenizer, named_texts(settings.text))
        return [
            make_row(task, haystack, length, str(sample))
            for task in TASKS
            for length in subject.lengths(settings)
            for sample in range(settings.samples)
        ]
    rows = list(read_rows(settings.ruler_data, subject.tokenizer, settings.limit))
    most = subject.positions
    for row in rows:
        tokens = len(row.question.prompt) + row.question.new_tokens
        if most is not None and tokens > most:
            raise NsaError(
                f"{settings.ruler_data}: a prompt of {row.task} has {tokens:,} tokens with its answer, and the model "
                f"{most:,} positions: give shorter ones, or --rope-scaling yarn:{-(-tokens // most)}"
            )
    return [row._replace(length=1 << (row.length - 1).bit_length()) for row in rows]


def render_ruler(result: Result, name: str) -> Iterator[Table]:
    """The shares by task and length."""
    table = Table("task", "tokens", "prompts", "dense", "sparse", title=f"{name}: RULER's tasks, right answers given")
    for row in result["rows"]:
        shares = [f"{row[way]:.1%}" for way in WAYS]
        table.add_row(row["task"], f"{row['length']:,}", str(row["questions"]), *shares)
    yield table
