"""Versions named in several places are the same there, and the oldest and newest sets are what pip wants."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from nsa_hf import tested

ROOT = Path(__file__).resolve().parents[2]


def load_versions():
    spec = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


versions = load_versions()


@pytest.fixture(scope="module")
def pinned() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    found = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    assert len(found) == len(lines)
    return found


def test_every_requirement_is_pinned_to_a_version_that_it_allows(pinned):
    wanted = versions.requirements()
    assert {"torch", "transformers", "tokenizers", "huggingface-hub", "accelerate", "numpy", "triton"} <= wanted.keys()
    assert pinned.keys() == wanted.keys()
    assert [name for name in wanted if not wanted[name].specifier.contains(pinned[name])] == []


def test_the_newest_tested_transformers_is_the_pinned_one(pinned):
    assert Version(tested.NEWEST).release == pinned["transformers"].release[:2]
    text = (ROOT / "README.md").read_text()
    assert re.search(rf"Transformers 5\.17 to {re.escape(tested.NEWEST)}\b", text)


def test_a_newer_transformers_is_warned_of_and_an_older_is_not(monkeypatch):
    monkeypatch.setattr(tested, "version", lambda name: "5.99.1")
    with pytest.warns(UserWarning, match=r"tested with Transformers up to 5\.\d+, and this is 5.99.1: .*pip install"):
        tested.warn_if_newer()
    for installed in (f"{tested.NEWEST}.7", f"{tested.NEWEST}.0.dev0", "5.17.0", "5.9.0"):
        monkeypatch.setattr(tested, "version", lambda name, installed=installed: installed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tested.warn_if_newer()


def test_it_is_said_once_and_at_import():
    code = (
        "import importlib.metadata as metadata, warnings; real = metadata.version\n"
        "metadata.version = lambda name: '5.99.1' if name == 'transformers' else real(name)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always'); import nsa_hf; import nsa_hf.config\n"
        "print([str(one.message)[:55] for one in said if 'nsa_hf' in str(one.message)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['nsa_hf was tested with Transformers up to 5.24, and thi']"


def test_the_oldest_are_the_lower_bounds():
    oldest = versions.lines("oldest", ["torch"])
    assert {"transformers[serving]==5.17", "numpy==2.0"} <= set(oldest)
    assert not any(line.startswith("torch=") for line in oldest)
    assert any(line == "torch==2.11" for line in versions.lines("oldest", []))


def test_the_newest_keep_to_the_upper_bounds():
    assert {"torch>=2.11", "transformers[serving]>=5.17", "ruff<0.18,>=0.17"} <= set(versions.lines("newest", []))


def test_no_other_module_asks_for_a_release():
    """What differs between releases has one home."""
    asks = re.compile(r"Version\(|is_transformers_version|transformers\.__version__ *[<>=]")
    folders = ("nsa_hf", "kernels", "conversion", "recipes", "model_cards")
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if asks.search(path.read_text())
    }
    assert found == {"nsa_hf/releases.py"}
