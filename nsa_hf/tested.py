"""The newest Transformers that this nsa_hf was tested with, and a warning at import if a newer one is installed."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

# The newest (constraints.txt); pyproject.toml has the oldest.
NEWEST = "5.24"


def warn_if_newer() -> None:
    """Warns of a newer Transformers, without importing it."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return  # it may be importable without being installed
    if numbers(installed) > numbers(NEWEST):
        warnings.warn(
            f"nsa_hf was tested with Transformers up to {NEWEST}, and this is {installed}: if something goes wrong, "
            f"`pip install 'transformers=={NEWEST}.*'`, or a newer nsa-hf",
            stacklevel=3,
        )


def numbers(release: str) -> list[int]:
    """Major and minor version of a release: `5.24.1` gives `[5, 24]`."""
    return [int(number) for number in re.findall(r"\d+", release)[:2]]
