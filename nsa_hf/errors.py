"""Errors caused by a user's input: their messages say what was expected, what came and what to do.

Nothing but the standard library is imported here, so that commands can fail without waiting for PyTorch.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class NsaError(ValueError):
    """Wrong input. The command line prints the message without a traceback and exits with 2."""


class NotPlain(NsaError):
    """A family, or a model of it, has a feature that sparse attention does not have; the message names it."""


def check_path(path: str | os.PathLike) -> Path:
    """A path that a user gave, its "~" as the user's folder; whether something is there is another matter.

    Raises:
        NsaError: it is none, or one that no file can have.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise NsaError(f"expected a path as a str or Path, got {type(path).__name__}: {path!r:.60}")
    shown = f"{os.fspath(path)!r:.100}"
    found = Path(path)
    try:
        os.fspath(path).encode()
        found = found.expanduser()
        found.lstat()
    except UnicodeEncodeError as error:
        raise NsaError(f"a path in UTF-8 is expected, got {shown}") from error
    except (RuntimeError, ValueError) as error:
        raise NsaError(f"{shown} cannot be a path ({error}): expected a folder's or a file's") from error
    except OSError as error:  # not there, or not to be looked at: told by whoever opens it
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise NsaError(f"{shown} cannot be a path ({error.strerror}): expected a folder's or a file's") from error
    return found


def check_name(path: Path) -> Path:
    """A file that was found in a user's folder, whose name is to be written down.

    Raises:
        NsaError: it has bytes that are no text.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        name = str(path).encode(errors="backslashreplace").decode()
        raise NsaError(f"{name} has a name that is not UTF-8: rename it") from error
    return path


def check_folder(folder: str | Path) -> Path:
    """The folder of a converted model, as a path.

    Raises:
        NsaError: it does not exist, or is a file.
    """
    path = check_path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise NsaError(f"{path} {what}: expected a folder that `nsa-hf convert` or `nsa-hf train` wrote")
    return path
