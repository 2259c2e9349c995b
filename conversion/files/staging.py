"""Writes a folder so that it is there completely or not at all, and by one process at a time.

    with staged_folder(out) as stage:
        ...write into stage...
    # now `out` exists; had the block raised, nothing would be left

    with resumable_folder(out, job) as stage:
        ...write into stage.folder, note what is done with stage.save_progress...
    # the same, but had the process been killed, the same job would go on where it was

What is being made stands in a hidden folder beside `out`, `.NAME.unfinished` (its stage), which the process keeps
locked; the lock ends with the process. One rename at the end makes it `out`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nsa_hf.errors import NsaError

from .model_folder import foreign_files
from .plain_json import read_json

UNFINISHED = ".unfinished"


class OutputError(NsaError):
    """A folder that cannot be written, or must not be."""


def check_output(out: Path, overwrite: bool = False, keep: tuple[Path, ...] = ()) -> None:
    """Refuses a folder that cannot or must not be written, before any work is done.

    Args:
        out: the folder to be.
        overwrite: replace an earlier model folder.
        keep: folders that must survive (the source).

    Raises:
        OutputError: `out` is a file, or must not be written, or lies on or above a folder to keep, or is not empty
            without `overwrite`, or, with it, holds anything but a model.
    """
    target = out.resolve()
    for folder in keep:
        if target == folder.resolve() or target in folder.resolve().parents:
            raise OutputError(f"the output {out} is, or holds, the source {folder}: choose another folder")
    nearest = next(folder for folder in (target, *target.parents) if folder.exists())
    if nearest != target and not nearest.is_dir():
        raise OutputError(f"cannot write {out}: {nearest} is a file")
    if not os.access(nearest if nearest != target else target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {out}: no permission to write in {nearest}")
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError(f"the output {out} is a file: expected a new or empty folder")
    if target.is_mount():
        raise OutputError(f"{out} is a mount point, which cannot be replaced as a whole: give a folder inside it")
    try:
        names = os.listdir(out)
    except OSError as error:
        raise OutputError(f"cannot read {out}: {error.strerror}") from error
    if not names:
        return
    if not overwrite:
        raise OutputError(f"{out} exists and is not empty: choose another folder, or give --overwrite to replace it")
    if "config.json" not in names:
        raise OutputError(f"{out} is not empty and has no config.json, so it is no model folder: remove it by hand")
    if foreign := foreign_files(out):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"{out} holds files that belong to no model ({', '.join(foreign[:3])}{more}), which replacing it would "
            "delete: move them away, or choose another folder"
        )


class Stage:
    """A folder in the making.

    Attributes:
        place: the hidden folder.
        folder: in it, what will be `out`; write into this one.
        replaced: in it, what stood in `out` while it is being replaced.
    """

    def __init__(self, place: Path, job: Mapping[str, Any]):
        """`place` is the hidden folder, `job` what decides the result, JSON-able."""
        self.place, self.folder, self.replaced = place, place / "model", place / "replaced"
        self._job = json.loads(json.dumps(job))

    def progress(self) -> dict[str, Any]:
        """What `save_progress` last noted of this job, in this process or in one that was killed; empty if nothing."""
        try:
            noted = read_json(self.place / "progress.json")
            return noted["progress"] if noted["job"] == self._job else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def save_progress(self, progress: Mapping[str, Any]) -> None:
        """Notes what is done, whole or not at all."""
        write_json(self.place / "progress.json", {"job": self._job, "progress": progress})


@contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new hidden folder, renamed to `out` when the block ends and removed when it raises.

    With `overwrite`, what stood in `out` is removed only after the new folder has taken its place.

    Raises:
        OutputError: something cannot be written (no permission, no space, ...), or another process is writing it.
    """
    with _stage(out, overwrite, None) as stage:
        yield stage.folder


@contextmanager
def resumable_folder(out: Path, job: Mapping[str, Any], overwrite: bool = False) -> Iterator[Stage]:
    """As `staged_folder`, but what a killed or interrupted process left of the same `job` is there again.

    Args:
        out, overwrite: as for `staged_folder`.
        job: what decides the result, JSON-able. What was left of another job is removed.
    """
    with _stage(out, overwrite, job) as stage:
        yield stage


@contextmanager
def _stage(out: Path, overwrite: bool, job: Mapping[str, Any] | None) -> Iterator[Stage]:
    check_output(out, overwrite)
    target = out.resolve()
    # a failure removes these too
    new_parents = [folder for folder in target.parents if not folder.exists()]
    stage = Stage(target.with_name(f".{target.name}{UNFINISHED}"), job or {})
    lock: int | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(stage.place, out)
        _recover(stage, target)
        check_output(out, overwrite)
        if job is None or not stage.progress():
            shutil.rmtree(stage.folder, ignore_errors=True)
        stage.folder.mkdir(exist_ok=True)
        yield stage
        # somebody may have put something there meanwhile
        check_output(out, overwrite)
        _finish(stage, target)
    except BaseException as error:
        can_go_on = job is not None and isinstance(error, KeyboardInterrupt | SystemExit)
        if lock is not None and not can_go_on:
            if os.path.lexists(stage.replaced) and not os.path.lexists(target):
                stage.replaced.rename(target)
            shutil.rmtree(stage.place, ignore_errors=True)
        for folder in new_parents:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OutputError(f"cannot write {out}: {reason}; nothing was left behind") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(place: Path, out: Path) -> int:
    """Locks the hidden folder, see `lock_folder`, and makes sure that there is nothing else in it.

    Raises:
        OutputError: another process holds it, or something else is in the way.
    """
    try:
        lock = lock_folder(place)
    except BlockingIOError as error:
        raise OutputError(
            f"another process is writing {out}: wait until it is done, or choose another folder"
        ) from error
    except OSError as error:
        if place.is_symlink() or place.is_file():
            raise _in_the_way(place, out) from error
        raise
    try:
        _check_place(place, out)
    except BaseException:
        os.close(lock)
        raise
    return lock


def lock_folder(folder: Path) -> int:
    """Makes a folder, where it is not there yet, and locks it for this process.

    Returns:
        The file descriptor that holds the lock, until it is closed or the process ends.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made, is a file, or is a link.
        OutputError: this system has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OutputError("writing a model folder needs a system with file locks of POSIX (Linux, macOS)") from error
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # the process that had it is done
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # it may have been removed, and made again, since it was opened
            if os.path.samestat(os.fstat(lock), os.stat(folder)):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _check_place(place: Path, out: Path) -> None:
    """Makes sure that a hidden folder holds nothing but what we put there, since all of it is deleted in the end.

    Raises:
        OutputError: there is something else, or a link.
    """
    for path in place.iterdir():
        is_ours = path.name in ("model", "replaced", "progress.json") or path.name.endswith(UNFINISHED)
        if path.is_symlink() or not is_ours:
            raise _in_the_way(path, out)
    for path in (place / "model").rglob("*"):
        if path.is_symlink():
            raise _in_the_way(path, out)


def _in_the_way(path: Path, out: Path) -> OutputError:
    what = "a link" if path.is_symlink() else "not of nsa-hf"
    return OutputError(f"{path} is {what} and in the way of writing {out}: move it away by hand")


def _recover(stage: Stage, out: Path) -> None:
    """Ends the replacement of `out` in the midst of which a process was killed.

    If the new folder had not taken its place yet, the old one goes back there; else the old one is removed.
    """
    if os.path.lexists(stage.replaced):
        if os.path.lexists(out):
            shutil.rmtree(stage.replaced)
        else:
            stage.replaced.rename(out)


def _finish(stage: Stage, out: Path) -> None:
    """Makes the stage's folder `out`, in place of what stands there."""
    if out.is_dir() and any(out.iterdir()):
        out.rename(stage.replaced)
    try:
        stage.folder.rename(out)
    except OSError:
        if stage.replaced.exists():
            stage.replaced.rename(out)
        raise
    shutil.rmtree(stage.place, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file whole or not at all: a file beside it is written and renamed.

    Args:
        path: of the file.
        data: what it will hold.

    Raises:
        OutputError: it cannot be written.
        ValueError: `data` holds NaN or infinity, which JSON lacks.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        temporary.unlink(missing_ok=True)  # a link there would be written through
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
