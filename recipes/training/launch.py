"""How a run's processes start: Accelerate, what its launcher may ask for, and what all processes have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from nsa_hf.errors import NsaError

from .config import RunConfig
from .sharding import prepare_sharded, shard_on_cpu, sharding_plugin

# Ways of training that this one does not have, by the variable with which Accelerate's launcher asks for each.
UNSUPPORTED = {
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
# What FSDP2 could do beyond this training, by the variable with which the launcher asks for it, and what to do instead.
# (Of the first, Accelerate's launcher asks for it where nothing is said.)
UNSUPPORTED_FSDP = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "each process reads the model: set fsdp_cpu_ram_efficient_loading to false",
    "FSDP_OFFLOAD_PARAMS": "weights stay on the GPU: set fsdp_offload_params to false",
    "FSDP_ACTIVATION_CHECKPOINTING": "the run file says it: write gradient_checkpointing=1 there",
}
# Of what the other processes wait for: hashing, reading and writing in the main one may take longer than PyTorch waits.
PATIENCE = timedelta(hours=2)


def make_accelerator(config: RunConfig) -> Any:
    """Accelerate's `Accelerator` for a run, with every random number seeded.

    Raises:
        NsaError: Accelerate is missing, the launcher contradicts the run file, or the machine lacks the precision.
    """
    check_launch(config)
    try:
        from accelerate import Accelerator
        from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
    except ImportError as error:
        raise NsaError("training needs the package `accelerate`: pip install 'nsa-hf[train]'") from error
    plugin = sharding_plugin() if asked_for("ACCELERATE_USE_FSDP") else None
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulate,
            fsdp_plugin=plugin,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of the gradients
                InitProcessGroupKwargs(timeout=PATIENCE),
                AutocastKwargs(cache_enabled=plugin is None),  # a cache would hold all layers' weights
            ],
        )
    except ValueError as error:
        raise NsaError(f"mixed_precision={config.mixed_precision} does not work here: {error}") from error
    if plugin is not None:
        shard_on_cpu(accelerator, plugin)
    set_seed(config.seed)
    return accelerator


def prepare_model(
    accelerator: Any, losses: nn.Module, student: Any, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """Has Accelerate prepare what a stage trains: whole in each process, or in parts (FSDP2).

    Args:
        losses: the module that is called in training; what of it is trained gets a gradient in each step.
        student: the causal language model in it.
        optimizer: over the student's parameters.

    Returns:
        What is called in the place of `losses`, and the optimizer, prepared.
    """
    if accelerator.is_fsdp2:
        return prepare_sharded(accelerator, losses, student, optimizer)
    model, optimizer = accelerator.prepare(losses, optimizer)
    return model, optimizer


def check_launch(config: RunConfig) -> None:
    """Compares what `accelerate launch` set in the environment with the run file.

    Raises:
        NsaError: a setting differs from the run file, or a way of training is asked for that is not supported.
    """
    for variable, setting, in_run_file in (
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision", config.mixed_precision),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "accumulate", str(config.accumulate)),
    ):
        launched = os.environ.get(variable, "").lower()
        # "no" is also what the launcher sets when it was told nothing
        if launched not in ("", in_run_file, "no" if setting == "mixed_precision" else in_run_file):
            raise NsaError(
                f"{setting} is {in_run_file} in the run file, and {launched} by `accelerate launch` or the environment "
                f"({variable}): take that back, or write {setting}={launched}"
            )
    for variable, way in UNSUPPORTED.items():
        if asked_for(variable):
            raise NsaError(
                f"`accelerate launch` or the environment asks for {way} ({variable}={os.environ[variable]}), which "
                "this training does not have: take one of the files in recipes/accelerate/ (DDP, FSDP2)"
            )
    if asked_for("ACCELERATE_USE_FSDP"):
        check_fsdp(config)


def check_fsdp(config: RunConfig) -> None:
    """Whether the launcher asks for FSDP as this training has it; NsaError where not."""
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise NsaError(
            f"`accelerate launch` or the environment asks for FSDP {version} (FSDP_VERSION), this training has FSDP2: "
            "write fsdp_version: 2, or take recipes/accelerate/fsdp2.yaml"
        )
    for variable, instead in UNSUPPORTED_FSDP.items():
        if asked_for(variable):
            raise NsaError(
                f"`accelerate launch` or the environment sets {variable}={os.environ[variable]}, which this training "
                f"does not have: {instead}, or take recipes/accelerate/fsdp2.yaml"
            )
    if config.mixed_precision == "fp16":
        raise NsaError("mixed_precision=fp16 does not work with FSDP2 here: take bf16, or recipes/accelerate/ddp.yaml")


def asked_for(variable: str) -> bool:
    """Whether a variable of the environment is set to something else than no."""
    return os.environ.get(variable, "").lower() not in ("", "no", "false", "0")


def on_main_process(accelerator: Any, call: Callable[[], Any]) -> Any:
    """Calls a function in the main process only.

    Returns:
        What it returned, in every process.

    Raises:
        NsaError: what it raised, in every process.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = call()
        except NsaError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it PyTorch takes operations that give the same bits every time, and warns where it has none.

    Args:
        wanted: False leaves PyTorch free.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # else every tensor is written once before it is written: nothing here reads what was not
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
