"""Errors caused by a user's input: their messages say what was expected, what came and what to do.

Nothing but the standard library is imported here, so that commands can fail without waiting for PyTorch.
"""

from __future__ import annotations

from pathlib import Path


class NsaError(ValueError):
    """Wrong input. The command line prints the message without a traceback and exits with 2."""


class NotPlain(NsaError):
    """A family, or a model of it, has a feature that sparse attention does not have; the message names it."""


def check_folder(folder: str | Path) -> Path:
    """The folder of a converted model, as a path.

    Raises:
        NsaError: it does not exist, or is a file.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise NsaError(f"{path} {what}: expected a folder that `nsa-hf convert` or `nsa-hf train` wrote")
    return path
