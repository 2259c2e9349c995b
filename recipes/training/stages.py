"""What settings leave to the machine, the model and the length of a stage; and where each stage of a run begins.

    config = settle_machine(config)                        # before Accelerate starts
    config = settle_stages(config, model_config, processes)
    stages = stages_of(config)

In a settled config nothing is "auto", and `steps` says how long each stage is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from nsa_hf.errors import NsaError

from .config import WHOLE_RUN, RunConfig

TOKENS_ON_A_GPU = 32_768  # of a forward pass, where batch_size is left open
RATE_IN_USE = 1e-3  # of NSA parameters, where lr_nsa is left open


class Stage(NamedTuple):
    """A stage of a run.

    Attributes:
        number: counted from 1.
        config: the stage's settings, settled.
        first: steps of the run before its first.
    """

    number: int
    config: RunConfig
    first: int

    @property
    def end(self) -> int:
        """Steps of the run up to its last, that one counted."""
        return self.first + self.config.steps


def settle_machine(config: RunConfig) -> RunConfig:
    """The settings with what depends on the machine: the precision and whether layers are compiled.

    Raises:
        NsaError: layers are to be compiled, and looked into.
    """
    gpu, stages = torch.cuda.is_available(), config.of_stages()
    precision, teacher, compiled = config.mixed_precision, config.teacher_dtype, config.compile
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "no"
    if teacher == "auto":
        teacher = "bfloat16" if precision == "bf16" else "float32"
    if compiled == "auto":
        compiled = "yes" if gpu and any(map(runs_compiled, stages)) else "no"
    elif compiled == "yes" and not any(map(runs_compiled, stages)):
        raise NsaError(
            "compile 'yes' does not go with layer_weight or selector_weight, which look into the layers, nor with "
            "gate_blend_steps, with which they change at every step"
        )
    return replace(config, mixed_precision=precision, teacher_dtype=teacher, compile=compiled)


def looks_inside(stage: RunConfig) -> bool:
    """Whether a stage's losses take something out of the layers' middle, which compiled layers keep to themselves."""
    return bool(stage.layer_weight or stage.selector_weight)


def runs_compiled(stage: RunConfig) -> bool:
    """Whether compiled layers run so in a stage, as far as its settings decide.

    With another share of the gates at every step they would be compiled at every step.
    """
    return not looks_inside(stage) and not stage.gate_blend_steps


def settle_stages(config: RunConfig, model: Any, processes: int) -> RunConfig:
    """The settings with what depends on the model, and with each stage's length in steps.

    Args:
        config: of `settle_machine`.
        model: the converted model's config.
        processes: that train together.

    Returns:
        A config with one stage, or one in whose `stages` every setting of every stage stands.

    Raises:
        NsaError: a setting does not fit the model, or the stage's length.
    """
    settled: list[RunConfig] = []
    for number, stage in enumerate(config.of_stages(), 1):
        opened = model.nsa_exact_tokens == 0 or any(before.gate_blend_steps for before in settled)
        try:
            settled.append(settle_stage(stage, model, processes, opened))
        except NsaError as error:
            raise NsaError(f"stage {number}: {error}" if config.stages else str(error)) from None
    first = replace(settled[0], held_out_length=config.held_out_length or max(stage.longest for stage in settled))
    return replace(first, stages=[stage.own_settings() for stage in settled]) if config.stages else first


def settle_stage(stage: RunConfig, model: Any, processes: int, opened: bool) -> RunConfig:
    """`settle_stages` of one stage; `opened`: before it all branches are in use."""
    batch = stage.batch_size
    if batch == 0:
        batch = max(1, TOKENS_ON_A_GPU // stage.longest) if torch.cuda.is_available() else 1
    stage = replace(stage, batch_size=batch, held_out_length=0, lr_nsa=rate_of_nsa(stage, opened))
    if stage.tokens:
        stage = replace(stage, tokens=0, steps=math.ceil(stage.tokens / tokens_per_step(stage, processes)))
    check_model_fits(stage, model)
    return stage


def rate_of_nsa(stage: RunConfig, opened: bool) -> float:
    """The rate of the NSA parameters; those that are not in use are left as they are.

    Gates that start dense (0, 1, 0) hold the other branches shut, and the model is nearest to dense with that.
    """
    if stage.attention == "dense":
        return 0.0
    if stage.lr_nsa is not None:
        return stage.lr_nsa
    in_use = opened or stage.gate_blend_steps or stage.selector_weight
    only_they = stage.trains == "nsa" or stage.lr_backbone == 0
    return RATE_IN_USE if in_use or only_they else 0.0


def tokens_per_step(stage: RunConfig, processes: int) -> int:
    """Tokens that all processes together read in an optimizer step of a stage (see `settle_stage`)."""
    return stage.batch_size * stage.longest * stage.accumulate * processes


def check_model_fits(stage: RunConfig, model: Any) -> None:
    """NsaError where a stage asks for what the model has not, or for more steps than there are."""
    if stage.gate_blend_steps and model.nsa_gate != "blend":
        raise NsaError(f"gate_blend_steps needs nsa_gate 'blend', the model has {model.nsa_gate!r}")
    if stage.gate_blend_steps > stage.steps:
        raise NsaError(
            f"gate_blend_steps must be at most the {stage.steps} steps of the stage, or the gates end half open, got "
            f"{stage.gate_blend_steps} (with more processes a stage has fewer steps)"
        )
    if stage.attention == "dense" and (stage.trains == "nsa" or stage.lr_backbone == 0):
        raise NsaError("attention 'dense' trains the backbone alone: take trains 'all' and a lr_backbone above 0")
    if isinstance(stage.topk_start, int) and 0 < stage.topk_start <= model.nsa_topk:
        raise NsaError(f"topk_start must be above the model's nsa_topk, {model.nsa_topk}, got {stage.topk_start}")
    if stage.topk_steps >= stage.steps > 0 and stage.topk_steps:
        raise NsaError(
            f"topk_steps must be below the {stage.steps} steps of the stage, so that some are taken with the model's "
            f"own nsa_topk, got {stage.topk_steps}"
        )
    if stage.selector_weight and stage.longest <= model.nsa_sizes.exact_tokens:
        raise NsaError(
            f"selector_weight with windows of {stage.longest} tokens: up to {model.nsa_sizes.exact_tokens} every block "
            "is selected, and there is nothing to learn; raise length"
        )
    if stage.selector_weight and (model.nsa_selector != "compressed" or model.nsa_compression == "mean"):
        raise NsaError(
            "selector_weight needs a selector with parameters: compressed keys that are linear or mlp; the model has "
            f"nsa_selector={model.nsa_selector!r}, nsa_compression={model.nsa_compression!r}"
        )


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of settled settings, in order."""
    stages, first = [], 0
    for number, stage in enumerate(config.of_stages(), 1):
        stages.append(Stage(number, stage, first))
        first += stage.steps
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage | None:
    """The stage in which a run goes on after so many steps; None when it has not so many, or is at its end."""
    return next((stage for stage in stages if stage.first <= step < stage.end), None)


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """The settings by name, of several stages those that may differ as "stage 2: lr_nsa"."""
    whole = {name: value for name, value in config.as_dict().items() if name in WHOLE_RUN and name != "stages"}
    own = [stage.own_settings() for stage in config.of_stages()]
    if len(own) == 1:
        return {**whole, **own[0]}
    named = [{f"stage {number}: {name}": value for name, value in stage.items()} for number, stage in enumerate(own, 1)]
    return {**whole, **{name: value for stage in named for name, value in stage.items()}}


def topk_at(step: int, stage: RunConfig, topk: int, block_size: int) -> int:
    """The blocks that each query selects at a step: in halvings from `topk_start` to the model's.

    Few different numbers, as a GPU's kernels are compiled for each.

    Args:
        step: of the stage, from 0.
        topk, block_size: the model's.
    """
    if not stage.topk_steps:
        return topk
    everything = -(-stage.longest // block_size)
    start = everything if stage.topk_start == "all" else min(int(stage.topk_start), everything)
    halvings = max(0, math.ceil(math.log2(start / topk)))
    left = halvings - halvings * step // stage.topk_steps
    return min(start, topk << max(0, left)) if left > 0 else topk


def blend_at(step: int, stages: Sequence[Stage], number: int, first_blend: float) -> float:
    """The share of the paper's gates at a step, as the stages before have left it.

    Args:
        step: of stage `number`, from 0.
        stages: of the run.
        number: of the stage, from 1.
        first_blend: the converted model's share.
    """
    blend = first_blend
    for stage in stages[:number]:
        steps = stage.config.gate_blend_steps
        taken = step + 1 if stage.number == number else stage.config.steps
        if steps:
            blend += min(1.0, taken / steps) * (1 - blend)
    return blend
