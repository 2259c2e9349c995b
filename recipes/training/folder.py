"""The folder in which a run lives until it is done, and the one that it leaves.

`OUT.unfinished/` holds `run.json` (the run's fingerprint, its id, and the commit of each data set of the Hub that it
reads) and `checkpoints/`; the process that trains has it locked. When the run is done, OUT appears whole and
`OUT.unfinished/` is removed. OUT holds the trained model, its tokenizer, `manifest.json` with "trained": true, and
`training.json`.

A run's fingerprint is all that decides its weights: settings, hashes of the model and of the text, number of processes.
A run goes on only with the fingerprint that it began with.
"""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nsa_hf.conversion import manifest
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.hashes import hash_file
from nsa_hf.conversion.files.plain_json import read_json
from nsa_hf.conversion.files.staging import check_output, lock_folder, staged_folder, write_json
from nsa_hf.conversion.saving import save_changed
from nsa_hf.errors import NsaError

from .config import RunConfig
from .stages import decisive_settings

RUN, RESULT, LOG = "run.json", "training.json", "log.jsonl"
FORMAT = 1
# Settings that may differ when a run goes on: they do not change its weights.
NOT_IN_FINGERPRINT = {"model", "out", "save_every", "keep", "log_every", "trackers", "trust_remote_code"}
# What a fingerprint has hashes of, and what a message says when one has changed.
CONTENTS = {
    "training_text": "the training text, data={data}, has changed",
    "held_out_text": "the held-out text, held_out={held_out}, has changed",
    "tokens": "the tokenizer in {model} has changed",
    "model_config": "config.json in {model} has changed",
    "weights": "the weights in {model} have changed",
}
PACKAGES = ("nsa-hf", "torch", "transformers", "accelerate", "datasets")


def settings_fingerprint(config: RunConfig) -> dict[str, Any]:
    """The part of a run's fingerprint that follows from its settings, settled, and the model's folder.

    Raises:
        NsaError: the folder holds no converted model.
    """
    model = Path(config.model)
    manifest.find(model)
    settings = {name: value for name, value in decisive_settings(config).items() if name not in NOT_IN_FINGERPRINT}
    weights = {file.name: hash_file(file) for file in SafetensorsCheckpoint(model).files}
    return {**settings, "model_config": hash_file(model / "config.json"), "weights": weights}


def check_out(config: RunConfig) -> None:
    """Whether OUT may be written, or holds a finished run; NsaError where it holds something else."""
    if not (Path(config.out) / RESULT).is_file():
        check_output(Path(config.out), keep=(Path(config.model),))


def finished_run(config: RunConfig, fingerprint: dict[str, Any]) -> bool:
    """Whether `config.out` holds this very run, finished.

    Args:
        fingerprint: of the run. Of it, what an older version did not note is not compared.

    Raises:
        NsaError: it holds another run, finished, or has lost files.
    """
    path = Path(config.out) / RESULT
    if not path.is_file():
        return False
    noted = read_record(path)["fingerprint"]
    check_same(config, path, noted, {name: value for name, value in fingerprint.items() if name in noted})
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
    except NsaError as error:
        why = str(error)
    if why:
        raise NsaError(
            f"{folder} held this run, finished, and is not whole ({why}): put that back, or remove the folder to train "
            "again"
        )


@contextmanager
def open_run_folder(
    config: RunConfig, fingerprint: dict[str, Any], revisions: dict[str, str] | None = None
) -> Iterator[Path | None]:
    """Locks the folder of the unfinished run, which is made where it does not exist.

    A run that is refused before its first checkpoint leaves nothing.

    Args:
        fingerprint: of the run.
        revisions: the commit of each data set of the Hub that it reads; noted where the run begins.

    Yields:
        The folder; None when OUT holds the run finished.

    Raises:
        NsaError: another process trains it, or it holds a run with another fingerprint, or something else.
    """
    folder, path = unfinished(config), unfinished(config) / RUN
    if finished_run(config, fingerprint):
        yield None
        return
    check_out(config)
    with locked(folder, config):
        # another process may have ended the run just before this one got the lock
        if finished_run(config, fingerprint):
            yield None
            return
        record: dict[str, Any] = {}
        if path.is_file():
            record = read_record(path)
            check_same(config, path, record["fingerprint"], fingerprint)
        elif foreign := [file.name for file in folder.iterdir() if not file.name.startswith(f".{RUN}.")]:
            raise NsaError(f"{folder} is where the run would live, and holds {foreign[0]}: give another out=")
        fresh = {"format": FORMAT, "id": uuid.uuid4().hex, "revisions": revisions or {}, "fingerprint": fingerprint}
        if not fresh.keys() <= record.keys():  # or of an older version
            write_json(path, {**fresh, **record})
        try:
            yield folder
        except NsaError:
            if not any(folder.glob("checkpoints/step-*")):
                remove_run_folder(folder)
            raise


@contextmanager
def locked(folder: Path, config: RunConfig) -> Iterator[None]:
    """Keeps `folder` for this process alone, and makes it where it does not exist; the lock ends with the process.

    Raises:
        NsaError: another process has it, or it cannot be made.
    """
    try:
        lock = lock_folder(folder)
    except BlockingIOError as error:
        raise NsaError(
            f"another process trains {config.out} now: wait until it is done, or give another out="
        ) from error
    except OSError as error:
        raise NsaError(f"cannot make {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # an empty folder: nothing began
            folder.rmdir()
        os.close(lock)


def unfinished(config: RunConfig) -> Path:
    """The folder in which a run lives until it is done."""
    out = Path(config.out).resolve()
    return out.with_name(f"{out.name}.unfinished")


def remove_run_folder(folder: Path) -> None:
    """Removes what a run wrote into its folder, and the folder when nothing else is in it."""
    if (folder / RUN).is_file():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / LOG).unlink(missing_ok=True)
        (folder / RUN).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def check_same(config: RunConfig, path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares two fingerprints.

    Args:
        path: the record that has the first.
        before, now: what the run began with, and what it would go on with.

    Raises:
        NsaError: what has changed, or was not noted.
    """
    if unknown := [name for name in now if name not in before]:
        raise NsaError(
            f"{path.parent} holds a run that an older version began, which did not note its {', '.join(unknown)}: give "
            "another out=, or remove that folder to start from the beginning"
        )
    changed = [name for name in now if before[name] != now[name]]
    if changed != ["tokens"]:
        changed = [name for name in changed if name != "tokens"]  # they follow from the others
    if changed:
        changes = "; ".join(
            CONTENTS[name].format(**config.as_dict()) if name in CONTENTS else f"{name}: {before[name]} -> {now[name]}"
            for name in changed
        )
        raise NsaError(
            f"{path.parent} holds a run that is not this one ({changes}): give another out=, take that back, or remove "
            "that folder to start from the beginning"
        )


def read_record(path: Path) -> dict[str, Any]:
    """A run's record, unfinished or finished, with its "fingerprint"; NsaError when it is damaged."""
    try:
        record = dict(read_json(path))
        return {**record, **{name: dict(record[name]) for name in ("fingerprint", *record.keys() & {"revisions"})}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NsaError(f"{path} is damaged ({error!r}): remove its folder and run again") from error


def noted_revisions(config: RunConfig) -> dict[str, str]:
    """The commits that this OUT's run began with, finished or not, by source; none where no run is there.

    Raises:
        NsaError: its record is damaged.
    """
    found = [path for path in (Path(config.out) / RESULT, unfinished(config) / RUN) if path.is_file()]
    return read_record(found[0]).get("revisions", {}) if found else {}


def save_trained(
    student: Any,
    config: RunConfig,
    fingerprint: dict[str, Any],
    result: dict[str, Any],
    beside: Sequence[Callable[[Path], None]] = (),
) -> None:
    """Writes the folder of a finished run, whole or not at all, and removes the unfinished one.

    Args:
        student: the trained model.
        fingerprint: of the run.
        result: what training.json records beside settings and machine.
        beside: each writes more into the folder.

    Raises:
        NsaError: it cannot be written.
    """
    model, out = Path(config.model), Path(config.out)
    record = {"format": FORMAT, "fingerprint": fingerprint, "config": config.as_dict(), **result, **machine()}
    with staged_folder(out) as stage:
        try:
            companions = save_changed(student, model, stage)
        except SafetensorError as error:
            raise NsaError(
                f"cannot write the trained model {out} ({error}): once there is room, the same command goes on from "
                "the last checkpoint"
            ) from error
        for write in beside:
            write(stage)
        write_json(stage / RESULT, record)
        run = {"steps": sum(stage.steps for stage in config.of_stages()), "fingerprint": fingerprint}
        manifest.write(stage, manifest.build_trained(stage, model, manifest.find(model), companions, run))
    remove_run_folder(unfinished(config))


def read_result(out: Path) -> dict[str, Any]:
    """What a finished run recorded in its folder's training.json.

    Raises:
        NsaError: it is not there, or damaged.
    """
    try:
        return dict(read_json(out / RESULT))
    except (OSError, ValueError, TypeError) as error:
        raise NsaError(f"{out / RESULT} is damaged ({error!r}): move {out} away and run again") from error


def machine() -> dict[str, Any]:
    """The hardware and versions of this machine, beside which measured figures are recorded."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "gpus": gpus}
    return {"hardware": hardware, "versions": manifest.versions(PACKAGES)}


def cpu_name() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
