"""A folder that is there completely or not at all.

with staged_folder(out) as stage:
    ...write into stage...
# now `out` exists; had the block raised, nothing would be left
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nsa_hf.errors import NsaError


class OutputError(NsaError):
    """A folder that cannot be written, or must not be."""


def check_output(out: Path, overwrite: bool = False, keep: tuple[Path, ...] = ()) -> None:
    """Refuses an output folder before any work is done.

    Args:
        out: the folder to be.
        overwrite: replace an earlier model folder.
        keep: folders that must survive (the source).

    Raises:
        OutputError: `out` is a file, or must not be written, or lies on or above a folder to keep, or is not empty
            without `overwrite`, or is not empty and, with it, no model folder.
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


@contextmanager
def staged_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new hidden folder beside `out`, renamed to `out` when the block ends and removed when it raises.

    With `overwrite`, what stood in `out` is removed only after the new folder has taken its place.

    Raises:
        OutputError: something cannot be written (no permission, no space, ...).
    """
    check_output(out, overwrite)
    parent = out.absolute().parent
    # so that a failure can also take back the parents it made
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    name = f".{out.absolute().name}.{secrets.token_hex(4)}.unfinished"
    stage: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        (parent / name).mkdir()
        stage = parent / name
        yield stage
        _replace(stage, out)
    except BaseException as error:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OutputError(f"cannot write {out}: {reason}; nothing was left behind") from error
        raise


def write_json(path: Path, data: Any) -> None:
    """Writes JSON whole or not at all (a file beside it, renamed).

    Raises:
        OutputError: it cannot be written.
        ValueError: `data` holds NaN or infinity, which JSON lacks.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _replace(stage: Path, out: Path) -> None:
    if not out.exists():
        stage.rename(out)
        return
    before = stage.with_suffix(".replaced")
    out.rename(before)
    try:
        stage.rename(out)
    except OSError:
        before.rename(out)
        raise
    shutil.rmtree(before, ignore_errors=True)
