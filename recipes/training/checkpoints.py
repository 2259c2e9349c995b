"""Checkpoints of a run: each is there completely or not at all, and the last few are kept.

    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(accelerator, step=10, state={"curve": [...]})
    latest = checkpoints.latest()                       # None at the first start
    state = checkpoints.restore(accelerator, latest)

Accelerate saves model, optimizer, gradient scaler and every process's random numbers. What it lacks is here: a
checkpoint that a kill or a full disk cannot leave half-written, the hash of every file in it, the run's own state
beside it, and the pruning.
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

from nsa_hf.conversion.files.hashes import hash_file
from nsa_hf.conversion.files.plain_json import read_json
from nsa_hf.conversion.files.staging import OutputError, write_json
from nsa_hf.errors import NsaError

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE, FILES = "state.json", "files.json"
NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints `step-00000010`, ... in `folder`; a hidden name marks one that was not finished."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, accelerator: Accelerator, step: int, state: dict[str, Any]) -> Path:
        """Saves everything after `step` finished steps, `state` (JSON) with it. Call it on all processes."""
        path = self.folder / f"step-{step:08d}"
        staged = hidden(path)
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
                write_json(staged / FILES, {"files": {file.name: hash_file(file) for file in staged.iterdir()}})
                flush(staged)
                shutil.rmtree(path, ignore_errors=True)
                staged.rename(path)
                flush(self.folder)
                self.prune(path)
        except (OSError, RuntimeError, SafetensorError, OutputError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            # of a full disk, PyTorch raises a RuntimeError about places in its own source
            reason = "PyTorch could not write a file to its end" if "inline_container" in str(error) else str(error)
            raise NsaError(
                f"cannot write the checkpoint {path} ({' '.join(reason.split())}; {free_space(self.folder)}): "
                "once there is room, the same command goes on from the checkpoint before"
            ) from error
        accelerator.wait_for_everyone()
        return path

    def finished(self) -> list[Path]:
        """All checkpoints that were written to their end, oldest first."""
        if not self.folder.is_dir():
            return []
        named = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(named, key=step_of)

    def latest(self) -> Path | None:
        """The last checkpoint that is whole, None when there is none at all; which were passed over is said.

        Raises:
            NsaError: there are some, and each is damaged.
        """
        found = self.finished()
        damaged: dict[Path, str] = {}
        for path in reversed(found):
            damage = damage_of(path)
            if damage is None:
                for passed_over, what in damaged.items():
                    print(f"{passed_over} is damaged ({what}): going on from {path}", file=sys.stderr)
                return path
            damaged[path] = damage
        if damaged:
            told = "; ".join(f"{path.name}: {what}" for path, what in damaged.items())
            raise NsaError(
                f"every checkpoint in {self.folder} is damaged ({told}): remove that folder to start from the beginning"
            )
        return None

    def prune(self, newest: Path) -> None:
        """Removes all but `newest` and the `keep - 1` before it, and what a kill left unfinished.

        What is later than `newest` goes too: it was damaged, and passed over when the run went on.
        """
        found = self.finished()
        kept = found[: found.index(newest) + 1][-self.keep :]
        for path in found:
            if path not in kept:
                # a kill in the middle leaves nothing that looks like a checkpoint
                path.rename(hidden(path))
        for path in self.folder.glob(".step-*.unfinished"):
            shutil.rmtree(path, ignore_errors=True)

    def restore(self, accelerator: Accelerator, path: Path) -> dict[str, Any]:
        """Loads checkpoint `path` into what `accelerator` prepared; returns what `save` was given, and "step"."""
        before = random.getstate()
        random.seed(str(path))
        unlikely = random.getstate()
        try:
            accelerator.load_state(str(path))
            state: dict[str, Any] = read_json(path / STATE)
        except Exception as error:  # each file format has its own
            random.setstate(before)
            raise NsaError(f"{path} cannot be read, remove it to start from the one before: {error}") from error
        # Accelerate only logs when it cannot restore random numbers
        if random.getstate() == unlikely:
            raise NsaError(f"{path} does not hold this process's random numbers: was it saved by fewer processes?")
        return state


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def hidden(path: Path) -> Path:
    """The name of a checkpoint that is not finished, or is being removed."""
    return path.with_name(f".{path.name}.unfinished")


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when every file in it is as it was written."""
    try:
        said: dict[str, str] = read_json(path / FILES)["files"]
        changed = [name for name, digest in said.items() if hash_file(path / name) != digest]
        if changed:
            return f"{', '.join(sorted(changed))} not as written"
        step = read_json(path / STATE)["step"]
        return None if step == step_of(path) else f"{STATE} is of step {step}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def free_space(folder: Path) -> str:
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    return f"{shutil.disk_usage(place).free / 1e6:,.0f} MB are free there"


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
