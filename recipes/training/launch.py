"""How a run's processes start: Accelerate, what its launcher may ask for, and what all processes have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsa_hf.errors import NsaError

from .config import RunConfig

# Ways of training that this one does not have, by the variable with which Accelerate's launcher asks for each.
UNSUPPORTED = {
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}


def make_accelerator(config: RunConfig) -> Any:
    """Accelerate's `Accelerator` for a run, with every random number seeded.

    Raises:
        NsaError: Accelerate is missing, the launcher contradicts the run file, or the machine lacks the precision.
    """
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
        if os.environ.get(variable, "").lower() not in ("", "no", "false", "0"):
            raise NsaError(
                f"`accelerate launch` or the environment asks for {way} ({variable}={os.environ[variable]}), which "
                "this training does not have: it runs one process per GPU, each with the whole model"
            )


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
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # else every tensor is written once before it is written: nothing here reads what was not
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
