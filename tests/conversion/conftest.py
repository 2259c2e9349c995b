"""A tiny model that was converted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nsa_hf.conversion import convert


@pytest.fixture(scope="module")
def converted(tiny_dense_dir, tiny_sizes, tmp_path_factory) -> Path:
    """Once a file of tests, which change nothing in it."""
    return convert(tiny_dense_dir, tmp_path_factory.mktemp("converted") / "out", **tiny_sizes)


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))
