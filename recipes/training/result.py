"""What a run has come to: the figures of training.json, and a word of warning where it did harm."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from nsa_hf.fields import FOUND_FIELDS, NSA_FIELDS

from .config import RunConfig
from .held_out import HeldOut, held_out_figures
from .sharding import call_whole
from .stages import Stage, tokens_per_step
from .texts import Texts


def as_result(student: Any, stages: Sequence[Stage]) -> AbstractContextManager[None]:
    """Runs the student as the last stage trains it: sparse, or dense as a control."""
    return student.dense_attention() if stages[-1].config.attention == "dense" else nullcontext()


def measure_result(
    student: Any, config: RunConfig, stages: Sequence[Stage], texts: Texts, held_out: HeldOut, state: dict[str, Any]
) -> dict[str, Any]:
    """What training.json records of a run beside its settings and the machine; runs the trained student once more.

    Args:
        config: the run's settings, settled.
        state: of the finished run.

    Raises:
        NsaError: its logits are not finite.
    """
    with as_result(student, stages):
        after, after_own_dense = call_whole(student, lambda: held_out.compare_trained(student))
    length = config.held_out_length
    before = state["before"]
    figures = held_out_figures(
        student, texts.held_out_documents, length, before, after, after_own_dense, config.teacher
    )
    parameters = {
        "nsa": sum(p.numel() for name, p in student.named_parameters() if ".nsa." in name),
        "all": sum(p.numel() for p in student.parameters()),
    }
    return {
        "warning": harm_done(figures, stages),
        "nsa": changed_fields(student.config),
        "parameters": parameters,
        "curve": state["curve"],
        "held_out": figures,
    }


def stage_records(stages: Sequence[Stage], texts: Texts, processes: int) -> list[dict[str, Any]]:
    """What training.json records of each stage: its settings, and what it read."""
    return [
        {
            **stage.config.own_settings(),
            "tokens_per_step": tokens_per_step(stage.config, processes),
            "parts_of_text": [parts.count for parts, _ in text.sources],
        }
        for stage, text in zip(stages, texts.stages, strict=True)
    ]


def changed_fields(config: Any) -> dict[str, Any]:
    """The `nsa_*` fields of a model's config that are not as by default, but for what a conversion finds out itself."""
    values = {name: getattr(config, name) for name in NSA_FIELDS if name not in FOUND_FIELDS}
    return {name: value for name, value in values.items() if (value or None) != (NSA_FIELDS[name].default or None)}


def harm_done(figures: dict[str, Any], stages: Sequence[Stage]) -> str | None:
    """A sentence where the held-out KL to the teacher has risen, with the likely reason; else None.

    Args:
        figures: the run's held-out figures.
        stages: of the run.
    """
    before, after = figures["kl_before"], figures["kl_after"]
    last = stages[-1].config
    # a control begins at the teacher, and what it measures is how far it goes from there
    if last.teacher == "none" or last.attention == "dense" or after <= before:
        return None
    said = f"worse than before: the held-out KL to the teacher rose from {before:.6f} to {after:.6f}"
    settings = [stage.config for stage in stages]
    if not any(stage.kl_weight or stage.layer_weight for stage in settings):
        return f"{said}; no stage had the teacher in its loss (kl_weight)"
    nsa, backbone = max(stage.lr_nsa or 0.0 for stage in settings), max(stage.lr_backbone for stage in settings)
    rates = f"the rates are too high (lr_nsa {nsa:g}, lr_backbone {backbone:g})"
    ce = max(stage.ce_weight for stage in settings)
    if not ce:
        return f"{said}; most likely {rates}: lower them"
    return f"{said}; most likely {rates}, or the next-token loss (ce_weight {ce:g}) outweighs the teacher: lower them"
