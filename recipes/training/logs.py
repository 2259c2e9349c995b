"""The curve of a run while it goes: a line a step in log.jsonl, and the trackers that were asked for.

    log = Log(accelerator, folder, config, text)
    log.go_on(state["curve"])           # the steps that count, of a checkpoint or none
    log.add(row)                        # a step's
    log.finish()
    log.save(out)                       # log.jsonl
    draw(out, result)                   # training.png

A checkpoint holds the rows up to its step. A run that goes on from it writes the file anew with them, so that no step
is missing or there twice after a kill. Trackers write into `OUT.trackers`, which stays beside OUT. Of steps that are
taken again TensorBoard hides the first time, and W&B keeps it, which knows a run by its id in run.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nsa_hf.conversion.compare.models import evaluation_mode
from nsa_hf.errors import NsaError

from ..inspection import BRANCHES, record_gates
from .compiling import uncompiled
from .config import RunConfig
from .folder import LOG, RUN, read_record
from .sharding import call_whole

Row = dict[str, Any]
TRAINING = "training.png"  # as in model_cards/pictures.py, which needs matplotlib
PROJECT = "nsa-hf"  # of all runs, in trackers
# Packages of which one is needed, by tracker.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
GATES_TOKENS = 8192  # of the text on which gates are looked at


def check_trackers(names: Sequence[str]) -> None:
    """NsaError where a tracker is not known, or its package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise NsaError(f"trackers are {' and '.join(TRACKERS)}, got {name!r}")
        if not any(find_spec(package) for package in TRACKERS[name]):
            package = TRACKERS[name][0]
            raise NsaError(f"trackers: {name} needs the package `{package}`: pip install {package}, or leave it out")


class Log:
    """A run's log.jsonl and its trackers. Only the main process writes."""

    def __init__(self, accelerator: Any, folder: Path, config: RunConfig, text: Sequence[int]):
        """Opens nothing yet.

        Args:
            accelerator: Accelerate's, of this process.
            folder: of the unfinished run.
            config: the run's.
            text: tokens on which gates are looked at.
        """
        self.text = text
        self.accelerator, self.config, self.folder, self.path = accelerator, config, folder, folder / LOG
        self.trackers = Path(config.out).resolve().with_name(f"{Path(config.out).resolve().name}.trackers")
        self.file: Any = None

    def go_on(self, rows: Sequence[Row]) -> None:
        """Writes the rows of the steps that are taken already, and starts the trackers behind them."""
        if self.accelerator.is_main_process:
            fresh = self.path.with_name(f".{LOG}.new")
            fresh.write_text("".join(line_of(row) for row in rows), encoding="utf-8")
            os.replace(fresh, self.path)
            self.file = self.path.open("a", encoding="utf-8")
        self.start_trackers(len(rows))

    def start_trackers(self, steps: int) -> None:
        """Starts the trackers of a run that has taken so many steps."""
        if not self.config.trackers:
            return
        from accelerate.tracking import filter_trackers

        wandb = {"name": Path(self.config.out).resolve().name, "resume": "allow", "dir": str(self.trackers)}
        if self.accelerator.is_main_process:  # which alone has W&B's run
            self.trackers.mkdir(parents=True, exist_ok=True)
            wandb["id"] = read_record(self.folder / RUN)["id"]
        self.accelerator.project_configuration.set_directories(str(self.trackers))
        self.accelerator.log_with = filter_trackers(list(self.config.trackers), self.accelerator.logging_dir)
        again = {"tensorboard": {"purge_step": steps + 1}, "wandb": wandb}
        config = None if steps else flat(self.config.as_dict())
        self.accelerator.init_trackers(PROJECT, config=config, init_kwargs=again)

    def add(self, row: Row) -> None:
        """Writes a step's row."""
        if self.file is not None:
            self.file.write(line_of(row))
            self.file.flush()
        if self.config.trackers:
            self.accelerator.log({name: value for name, value in flat(row).items() if name != "step"}, step=row["step"])

    def gates(self, student: Any) -> dict[str, dict[str, float]] | None:
        """The gates' means on the first held-out text, see `gate_means`."""
        return gate_means(student, self.text, self.accelerator.autocast)

    def finish(self) -> None:
        """Closes what is open."""
        if self.file is not None:
            self.file.close()
        if self.accelerator.trackers:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def save(self, folder: Path) -> None:
        """Puts log.jsonl into a folder, from the main process."""
        shutil.copyfile(self.path, folder / LOG)


def draw(out: Path, result: dict[str, Any]) -> None:
    """Draws a finished run's picture, the one of its model card; without matplotlib it says so.

    Args:
        out: the trained model's folder.
        result: as training.json records it.
    """
    if find_spec("matplotlib") is None:
        print(f"no {TRAINING}, since matplotlib is not installed: pip install 'nsa-hf[eval]'")
    else:
        from nsa_hf.model_cards.pictures import draw_training

        draw_training(out, result)


def line_of(row: Row) -> str:
    """A row as a line of log.jsonl."""
    return json.dumps(row) + "\n"


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Values in one dict, as trackers take them: what is in a dict as "gates/0/selected", and a list as its JSON."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}/")
        else:
            found[before + name] = value if isinstance(value, (int, float, str)) else json.dumps(value)
    return found


def gate_means(student: Any, ids: Sequence[int], autocast: Any) -> dict[str, dict[str, float]] | None:
    """The mean gate of each branch in each layer on a text, by layer and branch; None where no gate is trained.

    In evaluation mode, so that it draws no random numbers: how often a run is saved must not change its weights. To be
    called in all processes.

    Args:
        student: the model, sharded or not.
        ids: the text's tokens.
        autocast: makes the context in which it runs.
    """
    if not any(p.requires_grad for name, p in student.named_parameters() if ".nsa.gate." in name):
        return None
    inputs = torch.tensor([list(ids)[:GATES_TOKENS]], device=student.device)

    def run() -> dict[int, list[float]]:
        with torch.no_grad(), evaluation_mode(student), uncompiled(), record_gates(student) as gates, autocast():
            student.base_model(input_ids=inputs, use_cache=False)
        return gates

    gates = call_whole(student, run)
    return {str(layer): dict(zip(BRANCHES, gates[layer], strict=True)) for layer in sorted(gates)}
