"""Lay out the package as it is imported, in links: nsa_hf/kernels -> kernels/nsa, nsa_hf/recipes -> recipes, ...

    python .ci/linktree.py build/tree

The folders at the repository's root are parts of `nsa_hf` by [tool.setuptools.package-dir] in pyproject.toml, which pip
follows. A program that does not go through pip finds the same package in this tree: the type checker, an editor, or a
machine where nothing can be installed (PYTHONSAFEPATH=1 PYTHONPATH=build/tree python -m pytest).
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_dir() -> dict[str, Path]:
    """Package name to its folder, relative to the repository's root, parents before children."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapping = settings["tool"]["setuptools"]["package-dir"]
    return {name: Path(mapping[name]) for name in sorted(mapping)}


def make_tree(tree: Path) -> None:
    """Make `tree` anew: one link for each file and folder of each package."""
    shutil.rmtree(tree, ignore_errors=True)
    for name, folder in package_dir().items():
        target = tree.joinpath(*name.split("."))
        target.mkdir(parents=True)
        for entry in sorted((ROOT / folder).iterdir()):
            if entry.name != "__pycache__":
                (target / entry.name).symlink_to(os.path.relpath(entry, target))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/linktree.py TREE")
    make_tree(Path(sys.argv[1]).absolute())
