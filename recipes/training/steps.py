"""The steps of one stage: losses, rates, what changes from step to step, progress and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

import torch

from nsa_hf.errors import NsaError

from .batches import Batch, Batches
from .checkpoints import Checkpoints
from .compiling import uncompiled
from .config import RunConfig
from .flops import peak_flops, training_flops
from .logs import Log
from .optimizer import set_rates
from .sharding import whole_tensor
from .stages import Stage, blend_at, runs_compiled, tokens_per_step, topk_at
from .texts import StageText


class Prepared(NamedTuple):
    """What a stage trains and trains with.

    Attributes:
        accelerator: Accelerate's, of this process.
        student: the model to train.
        model: the student with its losses, as Accelerate prepared it.
        optimizer: as Accelerate prepared it.
        text: what the stage reads.
    """

    accelerator: Any
    student: Any
    model: Any
    optimizer: Any
    text: StageText


class Schedule:
    """What of the model itself changes from step to step: the gates' blend and the number of blocks."""

    def __init__(self, student: Any, stages: Sequence[Stage]):
        """Notes what the converted model has.

        Args:
            student: the model to train, before its first step.
            stages: of the run.
        """
        self.student, self.stages = student, stages
        self.topk, self.block_size = student.config.nsa_topk, student.config.nsa_block_size
        self.blend = student.config.nsa_gate_blend

    def set(self, stage: Stage, step: int) -> dict[str, Any]:
        """Sets both for a step of a stage (from 0), which depend on nothing else; gives what the curve notes of it."""
        config = self.student.config
        if config.nsa_gate == "blend":
            self.student.set_gate_blend(blend_at(step, self.stages, stage.number, self.blend))
        if not stage.config.topk_steps:
            return {}
        config.nsa_topk = topk_at(step, stage.config, self.topk, self.block_size)
        return {"topk": config.nsa_topk}

    def end(self) -> None:
        """Gives the model its own number of blocks back."""
        self.student.config.nsa_topk = self.topk


def run_steps(
    prepared: Prepared, stage: Stage, schedule: Schedule, state: dict[str, Any], checkpoints: Checkpoints, log: Log
) -> None:
    """Takes the steps that are left of a stage, prints their progress and saves checkpoints.

    Args:
        state: of the run: "step", those that are finished; "curve", to which each step adds its row; and "text", where
            the stage's text stands.

    Raises:
        NsaError: a loss is not finite, or a checkpoint cannot be written.
    """
    accelerator, student, config = prepared.accelerator, prepared.student, stage.config
    steps = schedule.stages[-1].end
    begin = state["step"] - stage.first
    text = prepared.text.batches(
        accelerator.process_index,
        accelerator.num_processes,
        vocabulary=student.get_input_embeddings().weight.shape[0],
        state=state["text"] if begin else None,
    )
    tokens = tokens_per_step(config, accelerator.num_processes)
    peak_share = share_of_peak(student, config, prepared.text.lengths, accelerator)
    began = time.perf_counter()
    prepared.model.train()
    with closing(text) as batches:
        for step in range(begin, config.steps):
            start, waited = time.perf_counter(), batches.waited
            rates, changed = set_rates(prepared.optimizer, step, config), schedule.set(stage, step)
            done = stage.first + step + 1
            # inside it the backward pass is dense too
            with student.dense_attention() if config.attention == "dense" else nullcontext():
                losses, norm = take_step(prepared, config.accumulate, config.max_grad_norm, batches)
            if not math.isfinite(sum(losses.values()) + norm):
                shown = ", ".join(f"{name} {value}" for name, value in losses.items())
                raise NsaError(f"the loss is not finite at step {done} ({shown}): lower the rates")
            seconds = time.perf_counter() - start
            row: dict[str, Any] = {"step": done, "stage": stage.number, **losses}
            row |= {"grad_norm": norm, **rates, **changed, "seconds": seconds, "tokens_per_second": tokens / seconds}
            row |= {"waited": batches.waited - waited}
            row |= on_gpu(accelerator.device, peak_share * tokens / seconds)
            row |= {"tokens": tokens + (state["curve"][-1]["tokens"] if state["curve"] else 0)}
            saves = bool(config.save_every) and done % config.save_every == 0
            if (saves or done == stage.end) and (gates := log.gates(student)):
                row["gates"] = gates
            state["curve"].append(row)
            log.add(row)
            state["step"], state["text"] = done, batches.state
            if done % config.log_every == 0 or done == steps:
                left = (time.perf_counter() - began) / (step + 1 - begin) * (config.steps - step - 1)
                accelerator.print(progress_line(row, losses, stage, steps, left), flush=True)
            # the end of a stage is saved as the beginning of the next
            if saves and done < stage.end:
                save(checkpoints, accelerator, state)
    schedule.end()
    if short := text.short:
        accelerator.print(
            f"{short} texts had fewer than {config.longest} tokens and were dropped; pack=true would have read them"
        )


def share_of_peak(student: Any, stage: RunConfig, lengths: Sequence[tuple[int, float]], accelerator: Any) -> float:
    """MFU at one token a second, over all processes; 0 where the device's peak is not known.

    Args:
        lengths: of windows, with their shares of the tokens.
    """
    peak = peak_flops(accelerator.device)
    if peak is None:
        return 0.0
    kind = {"teacher": bool(stage.kl_weight or stage.layer_weight), "dense": stage.attention == "dense"}
    flops = sum(weight * training_flops(student, length, **kind) for length, weight in lengths)
    return flops / sum(weight for _, weight in lengths) / peak / accelerator.num_processes


def on_gpu(device: torch.device, mfu: float) -> dict[str, float]:
    """What the curve notes of a step on a GPU: the most memory ever allocated in bytes, and the share of the peak."""
    if device.type != "cuda":
        return {}
    return {"memory": torch.cuda.max_memory_allocated(device), **({"mfu": mfu} if mfu else {})}


def save(checkpoints: Checkpoints, accelerator: Any, state: dict[str, Any]) -> None:
    """Saves a checkpoint of the run's state, see `run_steps`."""
    checkpoints.save(accelerator, state["step"], {name: value for name, value in state.items() if name != "step"})


def take_step(
    prepared: Prepared, accumulate: int, max_grad_norm: float, batches: Batches
) -> tuple[dict[str, float], float]:
    """One step of the optimizer, over `accumulate` batches.

    Returns:
        "loss" and its parts by name, means over batches and processes (next token and KL in nats a token); and the
        gradient's norm before it is clipped.
    """
    accelerator, model, optimizer = prepared.accelerator, prepared.model, prepared.optimizer
    sums: Any = 0
    for _ in range(accumulate):
        with accelerator.accumulate(model):
            batch = {name: tensor.to(accelerator.device) for name, tensor in next(batches).items()}
            with as_stage_runs(prepared.text.config, batch):
                losses = model(**batch)
                accelerator.backward(losses.total)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        sums = sums + torch.stack([part.detach() for part in losses]) / accumulate
    total, *parts = accelerator.reduce(sums, "mean").tolist()
    return {"loss": total, **dict(zip(losses._fields[1:], parts, strict=True))}, float(whole_tensor(norm))


def as_stage_runs(stage: RunConfig, batch: Batch) -> AbstractContextManager[None]:
    """Runs layers that are compiled uncompiled where a stage asks for it, or a batch.

    They would be compiled anew for each way to pack.
    """
    apart = stage.compile == "yes" and not runs_compiled(stage)
    return uncompiled() if apart or "position_ids" in batch else nullcontext()


def progress_line(row: dict[str, Any], losses: dict[str, float], stage: Stage, steps: int, left: float) -> str:
    """A step in one line.

    Args:
        row: the step's, of the curve.
        losses: "loss" and its parts.
        stage: of the step.
        steps: of the whole run.
        left: seconds until the stage's end.
    """
    minutes, seconds = divmod(round(left), 60)
    parts = "  ".join(f"{name} {value:.{5 if name == 'kl' else 4}f}" for name, value in losses.items())
    of_stage = f" of stage {stage.number}" if stage.end < steps or stage.first else ""
    return (
        f"step {row['step']}/{steps}  {parts}  |grad| {row['grad_norm']:.2f}  {row['tokens_per_second']:.0f} tokens/s  "
        f"{minutes}:{seconds:02d} left{of_stage}"
    )
