"""Which versions of the packages in pyproject.toml to install, one line for each, as pip reads them.

    python .ci/versions.py oldest       every lower bound: `torch==2.11`, `transformers[serving]==5.17`, ...
    python .ci/versions.py newest       the requirements as they are, for `pip install --upgrade`

Packages named behind them are left out, as in `newest torch`, whose builds for CUDA are gigabytes.
"""

from __future__ import annotations

import sys
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements() -> dict[str, Requirement]:
    """Each package that pyproject.toml asks for: the extras of all its lists, the bounds of the first with any."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    found: dict[str, Requirement] = {}
    for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            first = found.setdefault(name, requirement)
            first.extras |= requirement.extras
            first.specifier = first.specifier or requirement.specifier
    return found


def lower_bound(requirement: Requirement) -> str | None:
    """What stands behind `>=`."""
    return next((one.version for one in requirement.specifier if one.operator == ">="), None)


def lines(which: str, without: list[str]) -> list[str]:
    """What pip is to install: the `oldest` or the `newest` of everything."""
    made = []
    for name, requirement in requirements().items():
        bound = lower_bound(requirement)
        if which == "oldest" and bound is not None:
            requirement.specifier = SpecifierSet(f"=={bound}")
        if name not in without:
            made.append(str(requirement))
    return made


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("oldest", "newest"):
        sys.exit("usage: python .ci/versions.py oldest|newest [PACKAGE ...]")
    print("\n".join(lines(sys.argv[1], sys.argv[2:])))
