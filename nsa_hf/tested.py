"""With which Transformers this nsa_hf was tested; whoever has a newer one is told at import, without importing it."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

# The newest (constraints.txt); pyproject.toml has the oldest.
NEWEST = "5.24"


def warn_if_newer() -> None:
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return  # on the path without having been installed
    if numbers(installed) > numbers(NEWEST):
        warnings.warn(
            f"nsa_hf was tested with Transformers up to {NEWEST}, and this is {installed}: if something goes wrong, "
            f"`pip install 'transformers=={NEWEST}.*'`, or a newer nsa-hf",
            stacklevel=3,
        )


def numbers(release: str) -> list[int]:
    """Major and minor version."""
    return [int(number) for number in re.findall(r"\d+", release)[:2]]
