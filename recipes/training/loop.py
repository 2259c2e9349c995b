"""Continued pretraining of a converted model, against its own dense self.

    nsa-hf train recipes/runs/demo.yaml model=build/nsa out=build/trained
    accelerate launch -m nsa_hf.recipes.train recipes/runs/demo.yaml model=build/nsa out=build/trained
    (a toy size: steps=2 length=1088 held_out_documents=1)

loss = ce_weight * CE(next token) + kl_weight * KL(teacher || student). The teacher has the converted model's own
weights, frozen, and runs with dense attention, so it is the dense source. The run lives in `OUT.unfinished` until it is
done; then OUT appears whole. A run that was killed goes on from its last checkpoint when it is started again with the
same settings, and ends with the same weights.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nsa_hf.conversion.files.loading import read_config
from nsa_hf.conversion.plan import training_hindrance
from nsa_hf.conversion.sources import open_source
from nsa_hf.errors import NsaError
from nsa_hf.releases import checkpoint_activations

from ..load import check_token_ids, load_nsa_model, load_tokenizer
from .checkpoints import Checkpoints
from .config import RunConfig
from .data import (
    Window,
    hash_texts,
    hash_windows,
    held_out_documents,
    held_out_windows,
    load_documents,
    training_windows,
)
from .evaluate import mean_kl
from .folder import check_out, open_run_folder, save_trained, settings_fingerprint
from .held_out import HeldOut, held_out_figures, print_figures
from .launch import deterministic, make_accelerator, on_main_process
from .losses import LossModel
from .optimizer import make_optimizer, set_rates

if TYPE_CHECKING:
    from datasets import Dataset


class Texts(NamedTuple):
    """The text of a run.

    Attributes:
        documents: the training text, columns `name` and `text`.
        windows: what the steps read of it, in order, columns `input_ids` and `name`.
        held_out_documents: name and text of each held-out document.
        held_out_windows: name and token ids of what is read of each.
    """

    documents: Dataset
    windows: Dataset
    held_out_documents: list[tuple[str, str]]
    held_out_windows: list[Window]

    def fingerprint(self) -> dict[str, str]:
        """The part of the run's fingerprint (see folder.py) that follows from its text: hashes of it and its tokens."""
        named_texts = zip(self.documents["name"], self.documents["text"], strict=True)
        tokens = chain(self.windows["input_ids"], (ids for _, ids in self.held_out_windows))
        return {
            "training_text": hash_texts(named_texts),
            "held_out_text": hash_texts(self.held_out_documents),
            "tokens": hash_windows(tokens),
        }


class Prepared(NamedTuple):
    """What a run trains and trains with.

    Attributes:
        accelerator: Accelerate's, of this process.
        teacher: the converted model, frozen.
        student: the model to train.
        model: the student with its losses, as Accelerate prepared it.
        optimizer, loader: as Accelerate prepared them.
    """

    accelerator: Any
    teacher: Any
    student: Any
    model: Any
    optimizer: Any
    loader: Any


def train(config: RunConfig) -> Path:
    """Runs, or goes on with, the run of `config`.

    Returns:
        The folder of the trained model.

    Raises:
        NsaError: what is in the way (folders, settings, text too short, a loss that is not finite).
    """
    try:
        return run(config)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        raise


def run(config: RunConfig) -> Path:
    """`train`, without a word to somebody who stops it."""
    out = Path(config.out)
    check_out(config)
    check_model(config)
    accelerator = make_accelerator(config)
    with deterministic(config.deterministic), ExitStack() as stack:
        fingerprint = settings_fingerprint(config)
        texts = read_texts(config, accelerator.num_processes)
        fingerprint |= {**texts.fingerprint(), "processes": accelerator.num_processes}
        # locked by the main process until the run ends
        folder = on_main_process(accelerator, lambda: stack.enter_context(open_run_folder(config, fingerprint)))
        if folder is None:
            accelerator.print(f"{out} holds this run already, finished: nothing to do")
            return out
        prepared = prepare(config, accelerator, texts)
        checkpoints = Checkpoints(folder / "checkpoints", config.keep)
        latest = on_main_process(accelerator, checkpoints.latest)
        held_out = HeldOut(texts.held_out_windows, prepared.teacher, accelerator.autocast)
        if latest is None:
            state = first_state(accelerator, held_out, prepared.student)
        else:
            state = restore_state(accelerator, checkpoints, latest, config.steps)
        run_steps(prepared, config, state, checkpoints)
        result = measure_result(prepared, config, texts, held_out, state)
        if accelerator.is_main_process:
            save_trained(prepared.student, config, fingerprint, result)
            print_figures(result["held_out"], out)
        accelerator.wait_for_everyone()
    return out


def check_model(config: RunConfig) -> None:
    """Whether the model can be trained as `config` says, and its other files can go along with the result.

    Raises:
        NsaError: why not.
    """
    model = read_config(Path(config.model))
    if hindrance := training_hindrance(model):
        raise NsaError(f"{config.model}: {hindrance}")
    if config.gate_blend_steps and model.nsa_gate != "blend":
        raise NsaError(f"gate_blend_steps needs nsa_gate 'blend', the model has {model.nsa_gate!r}")
    open_source(config.model)


def read_texts(config: RunConfig, processes: int) -> Texts:
    """Reads and tokenises all that the run will read.

    Raises:
        NsaError: text is missing or too short.
    """
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    held_out = held_out_documents(config.held_out, config.held_out_documents)
    held_out_ids = held_out_windows(held_out, tokenizer, config.length)
    documents = load_documents(config.data)
    count = config.steps * config.accumulate * config.batch_size * processes
    windows = training_windows(documents, tokenizer, length=config.length, count=count, seed=config.seed)
    return Texts(documents, windows, held_out, held_out_ids)


def prepare(config: RunConfig, accelerator: Any, texts: Texts) -> Prepared:
    """Loads teacher and student, and lets Accelerate prepare them for its device.

    Raises:
        NsaError: the model cannot be loaded, or a window has a token that it has no embedding for.
    """
    teacher = load_nsa_model(config.model, accelerator.device).requires_grad_(False)
    for ids in texts.windows["input_ids"]:
        check_token_ids(teacher, ids)
    student = load_student(config, accelerator.device)
    rows = texts.windows.select_columns("input_ids").with_format("torch")
    model, optimizer, loader = accelerator.prepare(
        LossModel(
            student,
            teacher if config.kl_weight else None,
            ce_weight=config.ce_weight,
            kl_weight=config.kl_weight,
            chunk=config.loss_chunk,
        ),
        make_optimizer(student, config),
        torch.utils.data.DataLoader(rows, config.batch_size),
    )
    return Prepared(accelerator, teacher, student, model, optimizer, loader)


def load_student(config: RunConfig, device: Any) -> Any:
    """The model to train; parameters whose rate is 0 are frozen."""
    student = load_nsa_model(config.model, device)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_((config.lr_nsa if ".nsa." in name else config.lr_backbone) > 0)
    if config.gradient_checkpointing:
        checkpoint_activations(student, config.gradient_checkpointing)
    return student.train()


def first_state(accelerator: Any, held_out: HeldOut, student: Any) -> dict[str, Any]:
    """The state of a run that begins: finished steps, a row for each of them, the held-out rows before training."""
    before = held_out.compare(student)
    accelerator.print(f"held-out KL to the teacher before: {mean_kl(before):.6f}")
    return {"step": 0, "curve": [], "before": before}


def restore_state(accelerator: Any, checkpoints: Checkpoints, latest: Path, steps: int) -> dict[str, Any]:
    """The state of a run that goes on (see `first_state`); what Accelerate prepared becomes what it was then.

    Args:
        latest: the checkpoint.
        steps: of the whole run.

    Raises:
        NsaError: the checkpoint cannot be read, or is none of a run with so many steps.
    """
    state = checkpoints.restore(accelerator, latest)
    if not 0 < state["step"] < steps:
        raise NsaError(f"{latest} says that {state['step']} of {steps} steps are done: remove it")
    accelerator.print(f"going on from {latest}")
    return state


def run_steps(prepared: Prepared, config: RunConfig, state: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Takes the steps that are left of the run, prints their progress and saves checkpoints.

    Args:
        state: see `first_state`; each step adds its row to `state["curve"]`.

    Raises:
        NsaError: a loss is not finite, or a checkpoint cannot be written.
    """
    accelerator, student = prepared.accelerator, prepared.student
    batches = iter(accelerator.skip_first_batches(prepared.loader, state["step"] * config.accumulate))
    tokens = config.batch_size * config.length * config.accumulate * accelerator.num_processes
    first_blend = student.config.nsa_gate_blend
    began = time.perf_counter()
    prepared.model.train()
    for step in range(state["step"], config.steps):
        start = time.perf_counter()
        rates = set_rates(prepared.optimizer, step, config)
        if config.gate_blend_steps:
            share = min(1.0, (step + 1) / config.gate_blend_steps)
            student.set_gate_blend(first_blend + share * (1 - first_blend))
        ce, kl, norm = take_step(prepared, config, batches)
        if not math.isfinite(ce + kl + norm):
            raise NsaError(f"the loss is not finite at step {step + 1} (ce {ce}, kl {kl}): lower the rates")
        seconds = time.perf_counter() - start
        row = {"step": step + 1, "loss": config.ce_weight * ce + config.kl_weight * kl, "ce": ce, "kl": kl}
        row |= {"grad_norm": norm, **rates, "seconds": seconds, "tokens_per_second": tokens / seconds}
        state["curve"].append(row)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            done = step + 1 - state["step"]
            left = (time.perf_counter() - began) / done * (config.steps - step - 1)
            accelerator.print(progress_line(row, config.steps, left), flush=True)
        if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            checkpoints.save(accelerator, step + 1, {"curve": state["curve"], "before": state["before"]})


def take_step(
    prepared: Prepared, config: RunConfig, batches: Iterator[dict[str, torch.Tensor]]
) -> tuple[float, float, float]:
    """One step of the optimizer, over `config.accumulate` batches.

    Returns:
        Next-token loss and KL to the teacher, means over batches and processes in nats a token; the gradient's norm
        before it is clipped.
    """
    accelerator, model, optimizer = prepared.accelerator, prepared.model, prepared.optimizer
    sums = torch.zeros(2, device=accelerator.device)
    for _ in range(config.accumulate):
        with accelerator.accumulate(model):
            losses = model(next(batches)["input_ids"])
            accelerator.backward(losses.total)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        sums += torch.stack((losses.ce, losses.kl)) / config.accumulate
    ce, kl = accelerator.reduce(sums, "mean").tolist()
    return ce, kl, float(norm)


def progress_line(row: dict[str, Any], steps: int, left: float) -> str:
    """A step in one line.

    Args:
        row: the step's, of the curve.
        steps: of the whole run.
        left: seconds until its end.
    """
    minutes, seconds = divmod(round(left), 60)
    return (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  ce {row['ce']:.4f}  kl {row['kl']:.5f}  "
        f"|grad| {row['grad_norm']:.2f}  {row['tokens_per_second']:.0f} tokens/s  {minutes}:{seconds:02d} left"
    )


def measure_result(
    prepared: Prepared, config: RunConfig, texts: Texts, held_out: HeldOut, state: dict[str, Any]
) -> dict[str, Any]:
    """What training.json records of a run beside its settings and the machine; runs the trained student once more.

    Raises:
        NsaError: its logits are not finite.
    """
    student = prepared.student
    after, after_own_dense = held_out.compare_trained(student)
    figures = held_out_figures(
        student, texts.held_out_documents, config.length, state["before"], after, after_own_dense
    )
    parameters = {
        "nsa": sum(p.numel() for name, p in student.named_parameters() if ".nsa." in name),
        "all": sum(p.numel() for p in student.parameters()),
    }
    return {
        "data": {"source": config.data, "documents": len(texts.documents), "windows": len(texts.windows)},
        "parameters": parameters,
        "curve": state["curve"],
        "held_out": figures,
        "processes": prepared.accelerator.num_processes,
    }
