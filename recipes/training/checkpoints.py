"""Checkpoints of a run: each appears completely or not at all, and the last few stay.

    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(accelerator, step=10, state={"curve": [...]})
    latest = checkpoints.latest()                       # None at the first start
    state = checkpoints.restore(accelerator, latest)

Accelerate saves model, optimizer, gradient scaler and every process's random numbers. This module adds what it lacks:
a kill or a full disk leaves no half-written checkpoint, every file has its hash, the run's own state is saved too, and
old checkpoints are removed.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from nsa_hf.conversion.files.hashes import hash_file
from nsa_hf.conversion.files.plain_json import read_json
from nsa_hf.conversion.files.staging import OutputError, write_json
from nsa_hf.errors import NsaError

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE, FILES = "state.json", "files.json"
NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of a run: folders `step-00000010`, ... A hidden name marks one that is not finished.

    Attributes:
        folder: that holds them.
        keep: how many stay when one is saved.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, accelerator: Accelerator, step: int, state: dict[str, Any]) -> Path:
        """Saves a checkpoint; to be called in all processes.

        Args:
            accelerator: whose prepared objects are saved.
            step: how many steps are finished.
            state: the run's own, as JSON can hold it.

        Returns:
            Its folder.

        Raises:
            NsaError: the disk is full, or the folder cannot be written.
        """
        path = self.folder / f"step-{step:08d}"
        stage = hidden(path)
        if accelerator.is_main_process:
            shutil.rmtree(stage, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            stage.mkdir(parents=True, exist_ok=True)
            with quiet_accelerate():
                accelerator.save_state(str(stage))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json(stage / STATE, {"step": step, **state})
                write_json(stage / FILES, {"files": hash_files(stage)})
                flush(stage)
                shutil.rmtree(path, ignore_errors=True)
                stage.rename(path)
                flush(self.folder)
                self.prune(path)
        except (OSError, RuntimeError, SafetensorError, OutputError, CheckpointException) as error:
            shutil.rmtree(stage, ignore_errors=True)
            # of a full disk, PyTorch raises a RuntimeError about places in its own source
            reason = "PyTorch could not write a file to its end" if "inline_container" in str(error) else str(error)
            raise NsaError(
                f"cannot write the checkpoint {path} ({' '.join(reason.split())}; {free_space(self.folder)}): "
                "once there is room, the same command goes on from the checkpoint before"
            ) from error
        accelerator.wait_for_everyone()
        return path

    def finished(self) -> list[Path]:
        """The checkpoints that were written completely, oldest first."""
        if not self.folder.is_dir():
            return []
        named = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(named, key=step_of)

    def latest(self) -> Path | None:
        """The last checkpoint that is not damaged, None when there is none at all; prints which later ones are.

        Raises:
            NsaError: there are some, and each is damaged.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(self.finished()):
            damage = damage_of(path)
            if damage is None:
                for later, what in damaged.items():
                    print(f"{later} is damaged ({what}): going on from {path}", file=sys.stderr)
                return path
            damaged[path] = damage
        if damaged:
            each = "; ".join(f"{path.name}: {what}" for path, what in damaged.items())
            raise NsaError(
                f"every checkpoint in {self.folder} is damaged ({each}): remove that folder to start from the beginning"
            )
        return None

    def prune(self, newest: Path) -> None:
        """Removes all but `newest` and the `keep - 1` before it, and what a kill left unfinished.

        Later ones are removed too: they were damaged, and the run went on from one before them.
        """
        finished = self.finished()
        remaining = finished[: finished.index(newest) + 1][-self.keep :]
        for path in finished:
            if path not in remaining:
                # renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint
                path.rename(hidden(path))
        for path in self.folder.glob(".step-*.unfinished"):
            shutil.rmtree(path, ignore_errors=True)

    def restore(self, accelerator: Accelerator, path: Path) -> dict[str, Any]:
        """Loads a checkpoint into what `accelerator` prepared.

        Returns:
            The state that `save` was given, and "step".

        Raises:
            NsaError: it cannot be read, or lacks this process's random numbers.
        """
        before = random.getstate()
        random.seed(str(path))
        not_saved = random.getstate()
        try:
            accelerator.load_state(str(path))
            state: dict[str, Any] = read_json(path / STATE)
        except (Exception, CheckpointException) as error:  # each file format has its own
            random.setstate(before)
            raise NsaError(f"{path} cannot be read, remove it to start from the one before: {error}") from error
        # Accelerate only logs when it cannot restore random numbers
        if random.getstate() == not_saved:
            raise NsaError(f"{path} does not hold this process's random numbers: was it saved by fewer processes?")
        return state


def step_of(path: Path) -> int:
    """The finished steps that a checkpoint's name tells."""
    return int(path.name.removeprefix("step-"))


def hidden(path: Path) -> Path:
    """The path of a checkpoint while it is written, or being removed."""
    return path.with_name(f".{path.name}.unfinished")


def hash_files(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder and the folders in it, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when every file in it is as it was written."""
    try:
        hashes: dict[str, str] = read_json(path / FILES)["files"]
        changed = [name for name, digest in hashes.items() if hash_file(path / name) != digest]
        if changed:
            return f"{', '.join(sorted(changed))} not as written"
        step = read_json(path / STATE)["step"]
        return None if step == step_of(path) else f"{STATE} is of step {step}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def free_space(folder: Path) -> str:
    """How much room the disk of a folder has, in words; the folder need not exist."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    return f"{shutil.disk_usage(place).free / 1e6:,.0f} MB are free there"


@contextmanager
def quiet_accelerate() -> Iterator[None]:
    """Keeps Accelerate from warning that tied weights are saved once, as they should be."""
    logger = logging.getLogger("accelerate.utils.other")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def flush(folder: Path) -> None:
    """Writes all in a folder and its list of names to the disk, so that a later rename cannot be there before them."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
