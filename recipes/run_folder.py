"""Where a run lives until it is done, and the folder it ends as.

`OUT.unfinished/` holds `run.json` (what runs) and `checkpoints/`. OUT appears whole when the run is done, and the other
goes. OUT holds the trained model, its tokenizer, `manifest.json` with "trained": true, and `training.json`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nsa_hf.conversion import manifest
from nsa_hf.conversion.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.loading import transformers_progress
from nsa_hf.conversion.source import open_source
from nsa_hf.conversion.staging import staged_folder, write_json
from nsa_hf.errors import NsaError

from .run_config import RunConfig

RESULT = "training.json"
FORMAT = 1
# may differ when a run goes on: they do not change its weights
FREE = {"model", "out", "save_every", "keep", "log_every"}
PACKAGES = ("nsa-hf", "torch", "transformers", "accelerate", "datasets")


class RunFolderError(NsaError):
    """A folder that holds another run, or something else."""


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """What decides a run's weights: its settings, and the hashes of the model it starts from."""
    model = Path(config.model)
    manifest.find(model)
    settings = {name: value for name, value in config.as_dict().items() if name not in FREE}
    weights = {file.name: hash_file(file) for file in SafetensorsCheckpoint(model).files}
    return {**settings, "model_config": hash_file(model / "config.json"), "weights": weights}


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished_run(config: RunConfig) -> bool:
    """Whether `config.out` holds this very run, finished. RunFolderError when it holds another one."""
    path = Path(config.out) / RESULT
    if not path.is_file():
        return False
    check_same(path, read_json(path)["fingerprint"], fingerprint(config))
    shutil.rmtree(unfinished(config), ignore_errors=True)
    return True


def open_run_folder(config: RunConfig) -> Path:
    """The folder of the unfinished run, made or found. RunFolderError when it holds a run with other settings."""
    folder = unfinished(config)
    path = folder / "run.json"
    if path.is_file():
        check_same(path, read_json(path)["fingerprint"], fingerprint(config))
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot make {folder}: {error.strerror or error}") from error
        write_json(path, {"format": FORMAT, "fingerprint": fingerprint(config)})
    return folder


def unfinished(config: RunConfig) -> Path:
    out = Path(config.out)
    return out.with_name(f"{out.name}.unfinished")


def check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name)]
    if changed:
        raise RunFolderError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}): give another out=, take them back, "
            "or remove that folder"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["fingerprint"]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged ({error!r}): remove its folder and run again") from error


def save_trained(student: Any, config: RunConfig, result: dict[str, Any]) -> None:
    """Writes the finished run's folder, whole or not at all, and removes the unfinished one."""
    model, out = Path(config.model), Path(config.out)
    record = {"format": FORMAT, "fingerprint": fingerprint(config), "config": config.as_dict(), **result, **machine()}
    with staged_folder(out) as stage:
        with transformers_progress(False):
            student.save_pretrained(stage)
        for weights in stage.glob("*.safetensors"):  # safetensors makes files that only their owner can read
            shutil.copymode(stage / "config.json", weights)
        companions = open_source(model).save_companions(stage)
        write_json(stage / RESULT, record)
        run = {"steps": config.steps, "fingerprint": record["fingerprint"]}
        manifest.write(stage, manifest.build_trained(stage, model, manifest.find(model), companions, run))
    shutil.rmtree(unfinished(config), ignore_errors=True)


def machine() -> dict[str, Any]:
    """Hardware and versions that the figures were measured with."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "gpus": gpus}
    return {"hardware": hardware, "versions": versions}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
