"""Fixtures that the tests of training share."""

from __future__ import annotations

import sys

import pytest
from tiny_runs import converted, folder_hashes, tiny_run, write_texts


@pytest.fixture(scope="session")
def nsa_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    """A tiny converted model, which no test changes. (A module that writes into its model has one of its own.)"""
    return converted(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of texts, which no test changes."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one precision per process, and the next test may have another."""
    yield
    forget_precision()


def forget_precision() -> None:
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def finished(nsa_dir, texts, tmp_path_factory):
    """The folder of a finished run, its settings, and the converted folder's hashes before it."""
    # imported here, since most tests of this folder do not need it
    from nsa_hf.recipes.training.loop import train

    before = folder_hashes(nsa_dir)
    config = tiny_run(nsa_dir, texts, tmp_path_factory.mktemp("runs") / "trained")
    folder = train(config)
    forget_precision()
    return folder, config, before
