"""Where a run lives until it is done, and the folder it ends as.

`OUT.unfinished/` holds `run.json` (what the run depends on) and `checkpoints/`; the process that trains has it locked.
OUT appears whole when the run is done, and the other goes. OUT holds the trained model, its tokenizer, `manifest.json`
with "trained": true, and `training.json`.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nsa_hf.conversion import manifest
from nsa_hf.conversion.files.checkpoint import CheckpointError, SafetensorsCheckpoint, hash_file, read_json
from nsa_hf.conversion.files.loading import transformers_progress
from nsa_hf.conversion.files.staging import check_output, lock_folder, staged_folder, write_json
from nsa_hf.conversion.sources import open_source
from nsa_hf.errors import NsaError

from .config import RunConfig

RUN, RESULT = "run.json", "training.json"
FORMAT = 1
# may differ when a run goes on: they do not change its weights
FREE = {"model", "out", "save_every", "keep", "log_every", "trust_remote_code"}
# what a fingerprint has hashes of, and how a change of it is told
CONTENTS = {
    "training_text": "the training text, data={data}, has changed",
    "held_out_text": "the held-out text, held_out={held_out}, has changed",
    "tokens": "the tokenizer in {model} has changed",
    "model_config": "config.json in {model} has changed",
    "weights": "the weights in {model} have changed",
}
PACKAGES = ("nsa-hf", "torch", "transformers", "accelerate", "datasets")


class RunFolderError(NsaError):
    """A folder that holds another run, or something else."""


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """What decides a run's weights, as far as settings and model folder say it: see `train` for text and processes."""
    model = Path(config.model)
    manifest.find(model)
    settings = {name: value for name, value in config.as_dict().items() if name not in FREE}
    weights = {file.name: hash_file(file) for file in SafetensorsCheckpoint(model).files}
    return {**settings, "model_config": hash_file(model / "config.json"), "weights": weights}


def check_out(config: RunConfig) -> None:
    """Refuses an OUT that holds something else than this run, before any work is done."""
    if not (Path(config.out) / RESULT).is_file():
        check_output(Path(config.out), keep=(Path(config.model),))


def finished_run(config: RunConfig, depends: dict[str, Any]) -> bool:
    """Whether `config.out` holds this very run, finished. RunFolderError when it holds another one, or has
    lost files.

    `depends`: the run's whole fingerprint. What an older version did not note is not compared.
    """
    path = Path(config.out) / RESULT
    if not path.is_file():
        return False
    noted = noted_fingerprint(path)
    check_same(config, path, noted, {name: value for name, value in depends.items() if name in noted})
    check_whole(path.parent)
    remove_run_folder(unfinished(config))
    return True


def check_whole(folder: Path) -> None:
    """Makes sure that a finished run's folder still has what its manifest names."""
    try:
        noted, tensors = manifest.read(folder), SafetensorsCheckpoint(folder).table
        lost = [name for name in noted.get("files", {}) if not (folder / name).is_file()]
        lost += [name for name in noted["tensors"] if name not in tensors]
        why = f"it lacks {', '.join(lost[:3])}" if lost else ""
    except CheckpointError as error:
        why = str(error)
    if why:
        raise RunFolderError(
            f"{folder} held this run, finished, and is not whole ({why}): put that back, or remove the folder to train "
            "again"
        )


@contextmanager
def open_run_folder(config: RunConfig, depends: dict[str, Any]) -> Iterator[Path | None]:
    """The folder of the unfinished run, made or found, and this process's alone; None when OUT holds it finished.

    A run that is refused before its first checkpoint leaves nothing.

    Raises:
        RunFolderError: another process trains it, or it is of a run with another fingerprint, or of something else.
    """
    folder, path = unfinished(config), unfinished(config) / RUN
    if finished_run(config, depends):
        yield None
        return
    check_out(config)
    with locked(folder, config):
        # while this one waited for the lock, the one that had it may have come to its end
        if finished_run(config, depends):
            yield None
            return
        if path.is_file():
            check_same(config, path, noted_fingerprint(path), depends)
        elif foreign := [file.name for file in folder.iterdir() if not file.name.startswith(f".{RUN}.")]:
            raise RunFolderError(f"{folder} is where the run would live, and holds {foreign[0]}: give another out=")
        else:
            write_json(path, {"format": FORMAT, "fingerprint": depends})
        try:
            yield folder
        except NsaError:
            if not any(folder.glob("checkpoints/step-*")):
                remove_run_folder(folder)
            raise


@contextmanager
def locked(folder: Path, config: RunConfig) -> Iterator[None]:
    """Holds `folder`, made if it is not there, for this process alone; the lock ends with the process."""
    try:
        lock = lock_folder(folder)
    except BlockingIOError as error:
        raise RunFolderError(
            f"another process trains {config.out} now: wait until it is done, or give another out="
        ) from error
    except OSError as error:
        raise RunFolderError(f"cannot make {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # empty: nothing began
            folder.rmdir()
        os.close(lock)


def unfinished(config: RunConfig) -> Path:
    out = Path(config.out).resolve()
    return out.with_name(f"{out.name}.unfinished")


def remove_run_folder(folder: Path) -> None:
    """Removes what a run keeps in its folder, and the folder when nothing else is in it."""
    if (folder / RUN).is_file():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / RUN).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def check_same(config: RunConfig, path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if unknown := [name for name in now if name not in before]:
        raise RunFolderError(
            f"{path.parent} holds a run that an older version began, which did not note its {', '.join(unknown)}: give "
            "another out=, or remove that folder to start from the beginning"
        )
    changed = [name for name in now if before[name] != now[name]]
    if changed != ["tokens"]:
        changed = [name for name in changed if name != "tokens"]  # they follow from the others
    if changed:
        told = "; ".join(
            CONTENTS[name].format(**config.as_dict()) if name in CONTENTS else f"{name}: {before[name]} -> {now[name]}"
            for name in changed
        )
        raise RunFolderError(
            f"{path.parent} holds a run that is not this one ({told}): give another out=, take that back, or remove "
            "that folder to start from the beginning"
        )


def noted_fingerprint(path: Path) -> dict[str, Any]:
    """The fingerprint in a run's record, unfinished or finished; RunFolderError when it is damaged."""
    try:
        return dict(read_json(path)["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged ({error!r}): remove its folder and run again") from error


def save_trained(student: Any, config: RunConfig, depends: dict[str, Any], result: dict[str, Any]) -> None:
    """Writes the finished run's folder, whole or not at all, and removes the unfinished one."""
    model, out = Path(config.model), Path(config.out)
    record = {"format": FORMAT, "fingerprint": depends, "config": config.as_dict(), **result, **machine()}
    with staged_folder(out) as stage:
        try:
            with transformers_progress(False):
                student.save_pretrained(stage)
        except SafetensorError as error:
            raise RunFolderError(
                f"cannot write the trained model {out} ({error}): once there is room, the same command goes on from "
                "the last checkpoint"
            ) from error
        for weights in stage.glob("*.safetensors"):  # safetensors makes files that only their owner can read
            shutil.copymode(stage / "config.json", weights)
        companions = open_source(model).save_companions(stage)
        write_json(stage / RESULT, record)
        run = {"steps": config.steps, "fingerprint": record["fingerprint"]}
        manifest.write(stage, manifest.build_trained(stage, model, manifest.find(model), companions, run))
    remove_run_folder(unfinished(config))


def machine() -> dict[str, Any]:
    """Hardware and versions that the figures were measured with."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "gpus": gpus}
    return {"hardware": hardware, "versions": manifest.versions(PACKAGES)}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
