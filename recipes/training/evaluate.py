"""Perplexity and KL by position: `nsa-hf eval OUT`, and what a training run prints before and after.

    states = final_states(teacher, windows)                     # [1, T, D] for each window
    rows = compare_models(teacher, states, student, final_states(student, windows), windows)

A model is run once per window and its final hidden states are kept (4.7 MB for 2,048 tokens of SmolLM2); logits exist
for a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from nsa_hf.conversion.compare.metrics import NO_LABEL, Accumulator, position_edges
from nsa_hf.conversion.compare.texts import provenance
from nsa_hf.conversion.files.staging import write_json
from nsa_hf.errors import NsaError

from ..load import check_token_ids, load_nsa_model, load_tokenizer
from .data import Window, held_out_documents, held_out_windows
from .losses import output_logits

NAME = "eval.json"
Row = dict[str, Any]


class EvaluationError(NsaError):
    """Models that cannot be compared."""


@torch.no_grad()
def final_states(
    model: Any, windows: Sequence[Window], autocast: Callable[[], AbstractContextManager] = nullcontext
) -> list[Tensor]:
    """The final hidden states [1, T, D] of each window, on the CPU, in evaluation mode."""
    for _, ids in windows:
        check_token_ids(model, ids)
    training = model.training
    model.eval()
    states = []
    try:
        for _, ids in windows:
            with autocast():
                output = model.base_model(torch.tensor([ids], device=model.device), use_cache=False)
            states.append(output.last_hidden_state.cpu())
    finally:
        model.train(training)
    return states


@torch.no_grad()
def compare_models(
    reference: Any,
    reference_states: Sequence[Tensor],
    model: Any,
    states: Sequence[Tensor],
    windows: Sequence[Window],
    chunk: int = 256,
) -> list[Row]:
    """Both models' perplexity, KL(reference || model) and same top-1 by position, as rows (see `Accumulator.as_dict`).

    `reference_states`, `states`: what `final_states` gave for `windows`. Buckets have a border at the end of the range
    in which an untrained conversion is exact. EvaluationError when logits are not finite.
    """
    longest = max(len(ids) for _, ids in windows)
    total = Accumulator(position_edges(longest, [model.config.nsa_sizes.exact_tokens]), chunk)
    for (_, ids), *hidden in zip(windows, reference_states, states, strict=True):
        labels = torch.tensor([*ids[1:], NO_LABEL])
        for start in range(0, len(ids), chunk):
            part = slice(start, start + chunk)
            total.update(
                logits_of(reference, hidden[0][0, part]),
                logits_of(model, hidden[1][0, part]),
                labels[part],
                start=start,
            )
    rows = total.as_dict()
    if wrong := [span(row) for row in rows if row["kl"] is None]:
        raise EvaluationError(
            f"logits are not finite (positions {', '.join(wrong)}): the weights are damaged, or were trained at rates "
            "that are too high"
        )
    return rows


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    return output_logits(model, hidden.to(model.device, model.dtype)).cpu()


def mean_kl(rows: Sequence[Row], start: int = 0) -> float | None:
    """KL in nats per token over the rows that begin at position `start` or later; None when there are none."""
    counted = [row for row in rows if row["from"] >= start and row["kl"] is not None]
    tokens = sum(row["tokens"] for row in counted)
    return sum(row["kl"] * row["tokens"] for row in counted) / tokens if tokens else None


def evaluate(
    out: Path,
    *,
    text: str = "stdlib",
    documents: int = 2,
    length: int = 2048,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Row:
    """Compares the model in `out` with the same weights run dense; writes `out`/eval.json and returns it."""
    model, tokenizer = load_nsa_model(out, device), load_tokenizer(out, trust_remote_code)
    texts = held_out_documents(text, documents)
    windows = held_out_windows(texts, tokenizer, length)
    states = final_states(model, windows)
    with model.dense_attention():
        dense_states = final_states(model, windows)
    rows = compare_models(model, dense_states, model, states, windows)
    result = {"format": 1, "length": length, "texts": provenance(texts), "rows": rows, "kl": mean_kl(rows)}
    write_json(out / NAME, result)
    return result


def render_rows(rows: Sequence[Row], title: str) -> Table:
    """One comparison as a table."""
    table = Table("tokens", "perplexity dense", "sparse", "KL", "same top-1", title=title)
    for row in rows:
        table.add_row(span(row), *(show(row[key], form) for key, form in COLUMNS))
    return table


COLUMNS = (("ppl_reference", ".3f"), ("ppl", ".3f"), ("kl", ".5f"), ("same_top1", ".2%"))


def render_before_after(held_out: Row) -> Table:
    """A run's held-out figures: the dense teacher, the sparse model before and after, and its new weights run dense."""
    table = Table(title=f"held-out text by position ({', '.join(held_out['names'])})")
    for heading in ("tokens", "teacher", "before", "after", "after, run dense", "KL before", "KL after"):
        table.add_column(heading, justify="right")
    for before, after, own in zip(held_out["before"], held_out["after"], held_out["after_own_dense"], strict=True):
        ppl = [before["ppl_reference"], before["ppl"], after["ppl"], own["ppl_reference"]]
        table.add_row(span(before), *(show(p, ".3f") for p in ppl), show(before["kl"], ".5f"), show(after["kl"], ".5f"))
    return table


def span(row: Row) -> str:
    return f"{row['from']:,}-{row['to']:,}"


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
