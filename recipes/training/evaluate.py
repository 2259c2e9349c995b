"""Perplexity and KL by position: `nsa-hf eval OUT`, and what a training run prints before and after.

    states = final_states(teacher, windows)                     # [1, T, hidden] for each window
    rows = compare_models(teacher, states, student, final_states(student, windows), windows)

How two models are compared stands in `nsa_hf.conversion.compare.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from nsa_hf.conversion.compare import models
from nsa_hf.conversion.compare.metrics import position_edges
from nsa_hf.conversion.compare.texts import provenance
from nsa_hf.conversion.files.staging import write_json
from nsa_hf.errors import NsaError

from ..load import check_token_ids, load_nsa_model, load_tokenizer
from .data import Window, held_out_documents, held_out_windows

NAME = "eval.json"
Row = dict[str, Any]


def final_states(
    model: Any, windows: Sequence[Window], autocast: Callable[[], AbstractContextManager] = nullcontext
) -> list[Tensor]:
    """Runs a model over held-out windows, see `models.final_states`.

    Args:
        model: a causal language model.
        windows: name and token ids of each text.
        autocast: makes the context that each forward pass runs in.

    Returns:
        The final hidden states [1, T, hidden] of each window, on the CPU.

    Raises:
        NsaError: a token that the model has no embedding for.
    """
    for _, ids in windows:
        check_token_ids(model, ids)
    return models.final_states(model, as_tensors(windows), autocast)


def compare_models(
    reference: Any,
    reference_states: Sequence[Tensor],
    model: Any,
    states: Sequence[Tensor],
    windows: Sequence[Window],
    chunk: int = 256,
) -> list[Row]:
    """Both models' perplexity, KL(reference || model) and same top-1 by position.

    Args:
        reference: the model compared with.
        reference_states: what `final_states` gave of it for `windows`.
        model: the sparse model.
        states: what `final_states` gave of it for `windows`.
        windows: name and token ids of each text.
        chunk: positions whose logits exist at a time.

    Returns:
        Rows as `Accumulator.as_dict` has them; one ends where an untrained conversion ceases to be exact.

    Raises:
        NsaError: logits are not finite.
    """
    longest = max(len(ids) for _, ids in windows)
    edges = position_edges(longest, [model.config.nsa_sizes.exact_tokens])
    comparison = models.compare_models(
        reference, reference_states, model, states, as_tensors(windows), edges, chunk=chunk
    )
    rows = comparison.as_dict()
    if wrong := [span(row) for row in rows if row["kl"] is None]:
        raise NsaError(
            f"logits are not finite (positions {', '.join(wrong)}): the weights are damaged, or were trained at rates "
            "that are too high"
        )
    return rows


def as_tensors(windows: Sequence[Window]) -> list[tuple[str, Tensor]]:
    """The windows with their token ids as int64 [1, T]."""
    return [(name, torch.tensor([ids])) for name, ids in windows]


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
    """Compares a sparse model with the same weights run dense, and writes `out`/eval.json.

    Args:
        out: the model's folder.
        text: where held-out documents come from, see `held_out_documents`.
        documents: how many of them.
        length: tokens of each.
        device: where the model runs.
        trust_remote_code: run the code that the tokenizer brings.

    Returns:
        What was written: `rows` by position, `kl` (nats a token) over all of them, and what they were measured on.

    Raises:
        NsaError: no model or no tokenizer, texts that are too short, or logits that are not finite.
    """
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
    for before, after, dense in zip(held_out["before"], held_out["after"], held_out["after_own_dense"], strict=True):
        ppl = [before["ppl_reference"], before["ppl"], after["ppl"], dense["ppl_reference"]]
        table.add_row(span(before), *(show(p, ".3f") for p in ppl), show(before["kl"], ".5f"), show(after["kl"], ".5f"))
    return table


def span(row: Row) -> str:
    """A row's positions, to be read."""
    return f"{row['from']:,}-{row['to']:,}"


def show(value: float | None, form: str) -> str:
    """A figure, or "-" where nothing was measured; `form` as `format` takes it."""
    return "-" if value is None else format(value, form)
