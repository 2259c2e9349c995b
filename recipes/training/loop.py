"""Continued pretraining of a converted model, against its own dense self.

    nsa-hf train recipes/runs/demo.yaml model=build/nsa out=build/trained
    accelerate launch -m nsa_hf.recipes.train recipes/runs/demo.yaml model=build/nsa out=build/trained
    (a toy size: steps=2 length=1088 held_out_documents=1)

loss = ce_weight * CE(next token) + kl_weight * KL(teacher || student), the teacher being the converted model's own
weights, frozen, run with dense attention: the dense source. The run lives in `OUT.unfinished` until it is done; then
OUT appears whole. Killed and started again with the same settings it goes on from its last checkpoint and ends with the
same weights.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nsa_hf.conversion.compare.texts import provenance
from nsa_hf.conversion.files.loading import read_config
from nsa_hf.conversion.plan import training_hindrance
from nsa_hf.conversion.sources import open_source
from nsa_hf.errors import NsaError
from nsa_hf.releases import checkpoint_activations

from ..load import check_token_ids, load_nsa_model, load_tokenizer
from .checkpoints import Checkpoints
from .config import RunConfig
from .data import (
    hash_texts,
    hash_windows,
    held_out_documents,
    held_out_windows,
    load_documents,
    training_windows,
)
from .evaluate import compare_models, final_states, mean_kl, render_before_after
from .folder import check_out, fingerprint, open_run_folder, save_trained
from .losses import LossModel
from .optimizer import make_optimizer, set_rates

# by the variable with which Accelerate is told of it
OTHER_WAYS = {
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}


def train(config: RunConfig) -> Path:
    """Runs, or goes on with, the run of `config`; returns its folder.

    Raises:
        NsaError: what is in the way (folders, settings, text too short, a loss that is not finite).
    """
    try:
        return run(config)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        raise


def run(config: RunConfig) -> Path:
    out = Path(config.out)
    check_out(config)
    check_model(config)
    accelerator = make_accelerator(config)
    with deterministic(config.deterministic), ExitStack() as stack:
        # text
        depends = fingerprint(config)
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        texts = held_out_documents(config.held_out, config.held_out_documents)
        held_out = held_out_windows(texts, tokenizer, config.length)
        documents = load_documents(config.data)
        count = config.steps * config.accumulate * config.batch_size * accelerator.num_processes
        windows = training_windows(documents, tokenizer, length=config.length, count=count, seed=config.seed)
        rows = windows.select_columns("input_ids").with_format("torch")

        # the run's folder: this run's, and no other process's
        depends |= {
            "training_text": hash_texts(zip(documents["name"], documents["text"], strict=True)),
            "held_out_text": hash_texts(texts),
            "tokens": hash_windows(chain(windows["input_ids"], (ids for _, ids in held_out))),
            "processes": accelerator.num_processes,
        }
        folder = on_main_process(accelerator, lambda: stack.enter_context(open_run_folder(config, depends)))
        if folder is None:
            accelerator.print(f"{out} holds this run already, finished: nothing to do")
            return out
        checkpoints = Checkpoints(folder / "checkpoints", config.keep)

        # models
        teacher = load_nsa_model(config.model, accelerator.device).requires_grad_(False)
        for ids in windows["input_ids"]:
            check_token_ids(teacher, ids)
        student = load_student(config, accelerator.device)
        model, optimizer, loader = accelerator.prepare(
            LossModel(student, teacher if config.kl_weight else None, config.loss_chunk),
            make_optimizer(student, config),
            torch.utils.data.DataLoader(rows, config.batch_size),
        )

        # where it begins: at the start, or behind the last checkpoint
        latest = on_main_process(accelerator, checkpoints.latest)
        with teacher.dense_attention():
            teacher_states = final_states(teacher, held_out, accelerator.autocast)
        if latest is None:
            states = final_states(student, held_out, accelerator.autocast)
            before = compare_models(teacher, teacher_states, student, states, held_out)
            state: dict[str, Any] = {"step": 0, "curve": [], "before": before}
            accelerator.print(f"held-out KL to the teacher before: {mean_kl(before):.6f}")
        else:
            state = checkpoints.restore(accelerator, latest)
            if not 0 < state["step"] < config.steps:
                raise NsaError(f"{latest} says that {state['step']} of {config.steps} steps are done: remove it")
            accelerator.print(f"going on from {latest}")

        run_steps(accelerator, model, optimizer, loader, student, config, state, checkpoints)

        # the same held-out batch again: sparse, and the new weights run dense beside it
        states = final_states(student, held_out, accelerator.autocast)
        with student.dense_attention():
            own_dense = final_states(student, held_out, accelerator.autocast)
        after = compare_models(teacher, teacher_states, student, states, held_out)
        own = compare_models(student, own_dense, student, states, held_out)
        exact = student.config.nsa_sizes.exact_tokens
        figures = {
            "names": [name for name, _ in texts],
            "texts": provenance(texts),
            "length": config.length,
            "exact_range": exact,
            "before": state["before"],
            "after": after,
            "after_own_dense": own,
            "kl_before": mean_kl(state["before"]),
            "kl_after": mean_kl(after),
            "kl_before_beyond": mean_kl(state["before"], exact),
            "kl_after_beyond": mean_kl(after, exact),
        }
        parameters = {
            "nsa": sum(p.numel() for name, p in student.named_parameters() if ".nsa." in name),
            "all": sum(p.numel() for p in student.parameters()),
        }
        if accelerator.is_main_process:
            result = {
                "data": {"source": config.data, "documents": len(documents), "windows": len(windows)},
                "parameters": parameters,
                "curve": state["curve"],
                "held_out": figures,
                "processes": accelerator.num_processes,
            }
            save_trained(student, config, depends, result)
            report(figures, out)
        accelerator.wait_for_everyone()
    return out


def run_steps(
    accelerator: Any,
    model: Any,
    optimizer: Any,
    loader: Any,
    student: Any,
    config: RunConfig,
    state: dict[str, Any],
    checkpoints: Checkpoints,
) -> None:
    """The steps that are left of the run; adds a row per step to `state["curve"]` and saves checkpoints."""
    batches = iter(accelerator.skip_first_batches(loader, state["step"] * config.accumulate))
    tokens = config.batch_size * config.length * config.accumulate * accelerator.num_processes
    first_blend = student.config.nsa_gate_blend
    began = time.perf_counter()
    model.train()
    for step in range(state["step"], config.steps):
        start = time.perf_counter()
        rates = set_rates(optimizer, step, config)
        if config.gate_blend_steps:
            share = min(1.0, (step + 1) / config.gate_blend_steps)
            student.set_gate_blend(first_blend + share * (1 - first_blend))
        sums = torch.zeros(2, device=accelerator.device)
        for _ in range(config.accumulate):
            with accelerator.accumulate(model):
                ce, kl = model(next(batches)["input_ids"])
                accelerator.backward(config.ce_weight * ce + config.kl_weight * kl)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            sums += torch.stack((ce, kl)).detach() / config.accumulate
        ce, kl = accelerator.reduce(sums, "mean").tolist()
        if not math.isfinite(ce + kl + float(norm)):
            raise NsaError(f"the loss is not finite at step {step + 1} (ce {ce}, kl {kl}): lower the rates")
        seconds = time.perf_counter() - start
        row = {"step": step + 1, "loss": config.ce_weight * ce + config.kl_weight * kl, "ce": ce, "kl": kl}
        row |= {"grad_norm": float(norm), **rates, "seconds": seconds, "tokens_per_second": tokens / seconds}
        state["curve"].append(row)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            done = step + 1 - state["step"]
            left = (time.perf_counter() - began) / done * (config.steps - step - 1)
            accelerator.print(progress_line(row, config.steps, left), flush=True)
        if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
            checkpoints.save(accelerator, step + 1, {"curve": state["curve"], "before": state["before"]})


def progress_line(row: dict[str, Any], steps: int, left: float) -> str:
    minutes, seconds = divmod(round(left), 60)
    return (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  ce {row['ce']:.4f}  kl {row['kl']:.5f}  "
        f"|grad| {row['grad_norm']:.2f}  {row['tokens_per_second']:.0f} tokens/s  {minutes}:{seconds:02d} left"
    )


def on_main_process(accelerator: Any, do: Callable[[], Any]) -> Any:
    """What `do` returns, or raises of our kind, in the main process: in all of them."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = do()
        except NsaError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_launch(config: RunConfig) -> None:
    """Refuses what the environment, and with it `accelerate launch`, would set against the run file or in its place."""
    for variable, setting, ours in (
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision", config.mixed_precision),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "accumulate", str(config.accumulate)),
    ):
        theirs = os.environ.get(variable, "").lower()
        # "no" is also what the launcher sets when it was told nothing
        if theirs not in ("", ours, "no" if setting == "mixed_precision" else ours):
            raise NsaError(
                f"{setting} is {ours} in the run file, and {theirs} by `accelerate launch` or the environment "
                f"({variable}): take that back, or write {setting}={theirs}"
            )
    for variable, what in OTHER_WAYS.items():
        if os.environ.get(variable, "").lower() not in ("", "no", "false", "0"):
            raise NsaError(
                f"`accelerate launch` or the environment asks for {what} ({variable}={os.environ[variable]}), which "
                "this training does not have: it runs one process per GPU, each with the whole model"
            )


def check_model(config: RunConfig) -> None:
    """Refuses a model that cannot be trained as `config` says, or whose other files cannot go along with the result."""
    model = read_config(Path(config.model))
    if hindrance := training_hindrance(model):
        raise NsaError(f"{config.model}: {hindrance}")
    if config.gate_blend_steps and model.nsa_gate != "blend":
        raise NsaError(f"gate_blend_steps needs nsa_gate 'blend', the model has {model.nsa_gate!r}")
    open_source(config.model)


def make_accelerator(config: RunConfig) -> Any:
    check_launch(config)
    try:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
    except ImportError as error:
        raise NsaError("training needs the package `accelerate`: pip install 'nsa-hf[train]'") from error
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulate)
    except ValueError as error:
        raise NsaError(f"mixed_precision={config.mixed_precision} does not work here: {error}") from error
    set_seed(config.seed)
    return accelerator


def load_student(config: RunConfig, device: Any) -> Any:
    """The model to train, what has rate 0 frozen."""
    student = load_nsa_model(config.model, device)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_((config.lr_nsa if ".nsa." in name else config.lr_backbone) > 0)
    if config.gradient_checkpointing:
        checkpoint_activations(student, config.gradient_checkpointing)
    return student.train()


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Operations that give the same bits every time, where PyTorch has them; a warning where it does not."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def report(figures: dict[str, Any], out: Path) -> None:
    Console().print(render_before_after(figures))
    print(f"held-out KL to the teacher: {figures['kl_before']:.6f} before, {figures['kl_after']:.6f} after")
    print(f"trained model: {out}")
