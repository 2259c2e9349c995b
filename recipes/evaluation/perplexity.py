"""Perplexity and KL by position: what `nsa-hf eval OUT` and a training run show.

    (rows,) = compare([(Way(teacher, dense=True), Way(student))], windows)

A few texts are taken at a time: their hidden states stay on the model's GPU and are gone before the next ones', and
logits exist for some positions of one text.
How two models are compared stands in `nsa_hf.conversion.compare.models`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from nsa_hf.conversion.compare import models
from nsa_hf.conversion.compare.metrics import Accumulator, position_edges
from nsa_hf.conversion.compare.texts import provenance
from nsa_hf.errors import NsaError
from nsa_hf.model_cards.escaping import figure

from ..load import check_token_ids
from ..terminal import track
from ..training.data import Window, held_out_documents, held_out_windows
from .recall import recall_by_layer
from .share import Share
from .subject import Settings, Subject

TOKENS_AT_ONCE = 32_768  # of one forward pass on a GPU, which a single text does not fill
Row = dict[str, Any]
Autocast = Callable[[], AbstractContextManager]


class Way(NamedTuple):
    """A model, and whether it runs dense."""

    model: Any
    dense: bool = False

    def states(self, ids: Tensor, autocast: Autocast) -> Tensor:
        """The final hidden states [B, T, hidden] of texts `ids` [B, T], on their device."""
        with self.model.dense_attention() if self.dense else nullcontext():
            return models.final_states(self.model, [("", ids)], autocast)[0]


def compare(
    pairs: Sequence[tuple[Way, Way]],
    windows: Sequence[Window],
    autocast: Autocast = nullcontext,
    *,
    chunk: int | None = None,
    tokens_at_once: int | None = None,
    progress: str | None = None,
    share: Share = Share(),  # noqa: B008, it is frozen
) -> list[list[Row]]:
    """Pairs of models by position: both's perplexity, KL(first || second) and same top-1.

    Args:
        pairs: the model compared with, and the sparse model; each way to run a model runs once over each text.
        windows: name and token ids of each text.
        autocast: makes the context that each forward pass runs in, such as Accelerate's mixed precision.
        chunk: positions whose logits exist at a time; None takes what suits the device and the vocabulary.
        tokens_at_once: of a forward pass; None takes what suits the device.
        progress: words before a bar; None shows no bar.
        share: of the texts, that this process reads; the rows are of all of them, in each process.

    Returns:
        For each pair rows as `Accumulator.as_dict` has them; one ends where an untrained conversion ceases to be exact.

    Raises:
        NsaError: a token that a model has no embedding for, or logits that are not finite.
    """
    ways = list(dict.fromkeys(way for pair in pairs for way in pair))
    for _, ids in windows:
        check_token_ids(ways[0].model, ids)
    longest = max(len(ids) for _, ids in windows)
    edges = [position_edges(longest, [sparse.model.config.nsa_sizes.exact_tokens]) for _, sparse in pairs]
    device = comparing_device(ways[0].model)
    if tokens_at_once is None:
        tokens_at_once = TOKENS_AT_ONCE if device.type == "cuda" else 0
    every = list(batches(windows, tokens_at_once))
    found: dict[int, list[Accumulator]] = {}  # by the number of the batch, one for each pair
    for number in track(share.numbers(len(every)), progress):
        batch = every[min(number, len(every) - 1)]
        rows = torch.tensor([ids for _, ids in batch], device=device)
        states = {way: way.states(rows, autocast) for way in ways}
        if number >= len(every):
            continue
        found[number] = [Accumulator(each) for each in edges]
        for place, (name, _) in enumerate(batch):
            one = slice(place, place + 1)
            for comparison, (dense, sparse) in zip(found[number], pairs, strict=True):
                sides = (dense.model, [states[dense][one]], sparse.model, [states[sparse][one]])
                comparison.merge(models.compare_models(*sides, [(name, rows[one])], comparison.edges, chunk=chunk))
    return [finite_rows(comparison) for comparison in merged(share.together(found).values(), edges)]


def merged(found: Iterable[Sequence[Accumulator]], edges: Sequence[Sequence[int]]) -> list[Accumulator]:
    """The comparisons of several batches, one for each pair of models, as one for each pair."""
    totals = [Accumulator(each) for each in edges]
    for comparisons in found:
        for total, comparison in zip(totals, comparisons, strict=True):
            total.merge(comparison)
    return totals


def batches(windows: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """The windows in order, neighbours of one length together up to so many tokens; at least one at a time."""
    batch: list[Window] = []
    for window in windows:
        length = len(window[1])
        if batch and (len(batch[0][1]) != length or (len(batch) + 1) * length > tokens):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def comparing_device(model: Any) -> torch.device:
    """Where a model's logits are compared: its GPU, else the CPU, which has float64 everywhere."""
    return model.device if model.device.type == "cuda" else torch.device("cpu")


def finite_rows(comparison: Accumulator) -> list[Row]:
    """The rows of a comparison; NsaError where logits are not finite."""
    rows = comparison.as_dict()
    if wrong := [span(row) for row in rows if row["kl"] is None]:
        raise NsaError(
            f"logits are not finite (positions {', '.join(wrong)}): the weights are damaged, or were trained at rates "
            "that are too high"
        )
    return rows


def mean_kl(rows: Sequence[Row], start: int = 0) -> float | None:
    """KL in nats per token over the rows that begin at position `start` or later; None when there are none."""
    counted = [row for row in rows if row["from"] >= start and row["kl"] is not None]
    tokens = sum(row["tokens"] for row in counted)
    return sum(row["kl"] * row["tokens"] for row in counted) / tokens if tokens else None


def mean_perplexity(rows: Sequence[Row]) -> float:
    """A sparse model's perplexity over all rows."""
    return math.exp(sum(math.log(row["ppl"]) * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows))


def perplexity(subject: Subject, settings: Settings) -> Row:
    """The suite `ppl`: a sparse model beside the same weights run dense.

    Returns:
        `rows` by position, `kl` (nats a token) over all of them, the texts they were measured on and their `length`,
        and `recall` by layer (see recall.py).

    Raises:
        NsaError: a length beyond the model's, texts that are too short, or logits that are not finite.
    """
    subject.check_lengths([settings.length], "a shorter --length")
    texts = held_out_documents(settings.text, settings.documents)
    windows = held_out_windows(texts, subject.tokenizer, settings.length)
    model = subject.model
    (rows,) = compare([(Way(model, dense=True), Way(model))], windows, progress="Perplexity")
    recall = recall_by_layer(model, windows)
    return {
        "length": settings.length,
        "texts": provenance(texts),
        "rows": rows,
        "kl": mean_kl(rows),
        "recall": recall,
    }


def render_perplexity(result: Row, name: str) -> Iterator[Table]:
    """The suite's tables: by position, and by layer where that was measured.

    Args:
        result: of `perplexity`.
        name: the model's.
    """
    yield render_rows(result["rows"], f"{name}: the same weights dense and sparse")
    if result["recall"]:
        title = "the blocks with the most of dense attention: which share is selected, and how much lies in them"
        table = Table("layer", "recall", "captured", "by the best blocks", title=title)
        for row in result["recall"]:
            table.add_row(str(row["layer"]), *(show(row[key], ".1%") for key in ("recall", "captured", "oracle")))
        yield table


def render_rows(rows: Sequence[Row], title: str) -> Table:
    """One comparison as a table."""
    table = Table("tokens", "perplexity dense", "sparse", "rise", "KL", "same top-1", title=title)
    for row in rows:
        dense, sparse, kl, same = (show(row[key], form) for key, form in COLUMNS)
        table.add_row(span(row), dense, sparse, show_rise(row), kl, same)
    return table


COLUMNS = (("ppl_reference", ".3f"), ("ppl", ".3f"), ("kl", ".5f"), ("same_top1", ".2%"))


def show_rise(row: Row) -> str:
    """By how much a row's perplexity is above dense's, with its standard error over the texts where there is one."""
    error = row.get("rise_error")
    return show(row.get("rise"), "+.2%") + (f" ± {error:.2%}" if error is not None else "")


def render_before_after(held_out: Row) -> Table:
    """A run's held-out figures: the dense teacher, the sparse model before and after, and its new weights run dense.

    Without a teacher what stands first is the model before training, run dense.
    """
    names = held_out["names"]
    first = "before, run dense" if held_out.get("teacher") == "none" else "teacher"
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    table = Table(title=f"held-out text by position ({', '.join(names[:3])}{more})")
    headings = ("tokens", first, "before", "after", "after, run dense", "rise before", "rise after")
    for heading in (*headings, "KL before", "KL after"):
        table.add_column(heading, justify="right")
    for before, after, dense in zip(held_out["before"], held_out["after"], held_out["after_own_dense"], strict=True):
        ppl = [before["ppl_reference"], before["ppl"], after["ppl"], dense["ppl_reference"]]
        kl = [before["kl"], after["kl"]]
        cells = [*(show(p, ".3f") for p in ppl), show_rise(before), show_rise(after), *(show(x, ".5f") for x in kl)]
        table.add_row(span(before), *cells)
    return table


def span(row: Row) -> str:
    """A row's positions, to be read."""
    return f"{row['from']:,}-{row['to']:,}"


def show(value: float | None, form: str) -> str:
    """A figure, or "-" where nothing was measured; `form` as `format` takes it."""
    return "-" if value is None else figure(value, form)
