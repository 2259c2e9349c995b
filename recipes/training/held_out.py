"""The held-out text of a run: the student beside its teacher on it, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from nsa_hf.conversion.compare.texts import provenance

from .data import Window
from .evaluate import Row, compare_models, final_states, mean_kl, render_before_after


class HeldOut:
    """The held-out windows and the teacher's hidden states on them, which are computed once."""

    def __init__(self, windows: Sequence[Window], teacher: Any, autocast: Callable[[], AbstractContextManager]):
        """Runs the teacher, dense, over the windows.

        Args:
            windows: name and token ids of each text.
            teacher: the converted model.
            autocast: makes the context in which both models run.
        """
        self.windows, self.teacher, self.autocast = windows, teacher, autocast
        with teacher.dense_attention():
            self.teacher_states = final_states(teacher, windows, autocast)

    def compare(self, student: Any) -> list[Row]:
        """The sparse student beside the teacher by position, rows as of `compare_models`."""
        states = final_states(student, self.windows, self.autocast)
        return compare_models(self.teacher, self.teacher_states, student, states, self.windows)

    def compare_trained(self, student: Any) -> tuple[list[Row], list[Row]]:
        """The sparse student beside the teacher, and beside its own new weights run dense."""
        states = final_states(student, self.windows, self.autocast)
        with student.dense_attention():
            dense_states = final_states(student, self.windows, self.autocast)
        return (
            compare_models(self.teacher, self.teacher_states, student, states, self.windows),
            compare_models(student, dense_states, student, states, self.windows),
        )


def held_out_figures(
    student: Any,
    texts: Sequence[tuple[str, str]],
    length: int,
    before: list[Row],
    after: list[Row],
    after_own_dense: list[Row],
) -> dict[str, Any]:
    """What training.json records under "held_out".

    Args:
        student: the trained model.
        texts: name and text of each held-out document.
        length: tokens of each that were read.
        before, after: the student beside the teacher, before training and after it.
        after_own_dense: the trained student beside its own weights run dense.
    """
    exact_tokens = student.config.nsa_sizes.exact_tokens
    return {
        "names": [name for name, _ in texts],
        "texts": provenance(texts),
        "length": length,
        "exact_range": exact_tokens,
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
    Console().print(render_before_after(figures))
    print(f"held-out KL to the teacher: {figures['kl_before']:.6f} before, {figures['kl_after']:.6f} after")
    print(f"trained model: {out}")
