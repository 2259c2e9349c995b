"""The held-out text of a run: the student beside its teacher on it, before and after training.

A model that is trained from scratch has no teacher, and stands beside its own weights run dense, as they are then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from nsa_hf.conversion.compare.texts import provenance

from ..evaluation.perplexity import Row, Way, compare, mean_kl, mean_perplexity, render_before_after
from ..evaluation.share import Share
from .compiling import uncompiled
from .data import Window

WIDTH = 120  # columns of the figures where they are written to a file


class HeldOut:
    """The held-out windows, and the teacher that a student is compared with on them, if there is one."""

    def __init__(
        self,
        windows: Sequence[Window],
        teacher: Any | None,
        autocast: Callable[[], AbstractContextManager],
        share: Share = Share(),  # noqa: B008, it is frozen
    ):
        """Keeps what it is given.

        Args:
            windows: name and token ids of each text.
            teacher: the converted model, which runs dense; None: the student's own weights run dense.
            autocast: makes the context in which both models run.
            share: of the texts, that this process reads.
        """
        self.windows, self.teacher, self.autocast, self.share = windows, teacher, autocast, share

    def compare(self, student: Any) -> list[Row]:
        """The sparse student beside the teacher by position, rows as of `perplexity.compare`."""
        (rows,) = self._compare([(self._reference(student), Way(student))])
        return rows

    def compare_trained(self, student: Any) -> tuple[list[Row], list[Row]]:
        """The sparse student beside the teacher, and beside its own new weights run dense."""
        sparse = Way(student)
        rows, own = self._compare([(self._reference(student), sparse), (Way(student, dense=True), sparse)])
        return rows, own

    def told(self, rows: list[Row]) -> str:
        """What rows of `compare` say of a student, in a few words."""
        if self.teacher is None:
            return f"perplexity {mean_perplexity(rows):.3f}"
        return f"KL to the teacher {mean_kl(rows):.6f}"

    def _reference(self, student: Any) -> Way:
        return Way(student if self.teacher is None else self.teacher, dense=True)

    def _compare(self, pairs: list[tuple[Way, Way]]) -> list[list[Row]]:
        with uncompiled():  # layers compiled for training: these texts have other shapes
            words = "Held-out text" if self.share.first == 0 else None
            return compare(pairs, self.windows, self.autocast, progress=words, share=self.share)


def held_out_figures(
    student: Any,
    texts: Sequence[tuple[str, str]],
    length: int,
    before: list[Row],
    after: list[Row],
    after_own_dense: list[Row],
    teacher: str,
) -> dict[str, Any]:
    """What training.json records under "held_out".

    Args:
        student: the trained model.
        texts: name and text of each held-out document.
        length: tokens of each that were read.
        before, after: the student beside the teacher, before training and after it.
        after_own_dense: the trained student beside its own weights run dense.
        teacher: the setting; with 'none' all rows are beside the student's own weights run dense.
    """
    exact_tokens = student.config.nsa_sizes.exact_tokens
    return {
        "names": [name for name, _ in texts],
        "texts": provenance(texts),
        "length": length,
        "exact_range": exact_tokens,
        "teacher": teacher,
        "before": before,
        "after": after,
        "after_own_dense": after_own_dense,
        "kl_before": mean_kl(before),
        "kl_after": mean_kl(after),
        "kl_before_beyond": mean_kl(before, exact_tokens),
        "kl_after_beyond": mean_kl(after, exact_tokens),
    }


def print_figures(figures: dict[str, Any], out: Path) -> None:
    """Prints a finished run's held-out figures and its folder."""
    console = Console()
    if not console.is_terminal:  # in a file rich has 80 columns, which cut the figures
        console = Console(width=WIDTH)
    console.print(render_before_after(figures))
    if figures["teacher"] == "none":
        before, after = (mean_perplexity(figures[when]) for when in ("before", "after"))
        print(f"held-out text: perplexity {before:.3f} before training, {after:.3f} after")
    else:
        before, after = figures["kl_before"], figures["kl_after"]
        print(f"held-out text: KL to the teacher {before:.6f} before training, {after:.6f} after")
    print(f"trained model: {out}")
