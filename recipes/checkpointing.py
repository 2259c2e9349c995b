"""Checkpoints of a run: each is there completely or not at all, and the last few are kept.

    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(accelerator, step=10, state={"curve": [...]})
    latest = checkpoints.latest()                       # None at the first start
    state = checkpoints.restore(accelerator, latest)

Accelerate saves model, optimizer, gradient scaler and every process's random numbers. What it lacks is here: a
checkpoint that a kill cannot leave half-written, the run's own state beside it, and the pruning.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_hf.conversion.staging import write_json
from nsa_hf.errors import NsaError

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE = "state.json"
NAME = re.compile(r"step-(\d{8})")


class CheckpointingError(NsaError):
    """A checkpoint that cannot be written, or read."""


class Checkpoints:
    """The checkpoints `step-00000010`, ... in `folder`; a hidden name marks one that was not finished."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, accelerator: Accelerator, step: int, state: dict[str, Any]) -> Path:
        """Saves everything after `step` finished steps, `state` (JSON) with it. Call it on all processes."""
        path = self.folder / f"step-{step:08d}"
        staged = self.folder / f".{path.name}.unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(staged, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            staged.mkdir(parents=True, exist_ok=True)
            with quiet_accelerate():
                accelerator.save_state(str(staged))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json(staged / STATE, {"step": step, **state})
                flush(staged)
                shutil.rmtree(path, ignore_errors=True)
                staged.rename(path)
                flush(self.folder)
                self.prune()
        except OSError as error:
            raise CheckpointingError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error
        accelerator.wait_for_everyone()
        return path

    def finished(self) -> list[Path]:
        """All whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name) and (path / STATE).is_file())

    def latest(self) -> Path | None:
        found = self.finished()
        return found[-1] if found else None

    def prune(self) -> None:
        """Removes what is older than the last `keep`, and what a kill left unfinished."""
        for path in [*self.finished()[: -self.keep], *self.folder.glob(".step-*.unfinished")]:
            shutil.rmtree(path, ignore_errors=True)

    def restore(self, accelerator: Accelerator, path: Path) -> dict[str, Any]:
        """Loads checkpoint `path` into what `accelerator` prepared; returns what `save` was given, and "step"."""
        before = random.getstate()
        random.seed(str(path))
        unlikely = random.getstate()
        try:
            accelerator.load_state(str(path))
            state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        except Exception as error:  # each file format has its own
            random.setstate(before)
            raise CheckpointingError(
                f"{path} cannot be read, remove it to start from the one before: {error}"
            ) from error
        # Accelerate only logs when it cannot restore random numbers
        if random.getstate() == unlikely:
            raise CheckpointingError(
                f"{path} does not hold this process's random numbers: was it saved by fewer processes?"
            )
        return state


@contextmanager
def quiet_accelerate() -> Iterator[None]:
    """No warning that tied weights are saved once: they are meant to be."""
    logger = logging.getLogger("accelerate.utils.other")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def flush(folder: Path) -> None:
    """Brings a folder's files and its list of names to the disk, so that a rename never precedes what it names."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
