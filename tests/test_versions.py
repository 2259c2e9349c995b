"""Versions named in several places are the same there, and the oldest and newest sets are what pip wants."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from nsa_hf import releases

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import versions  # noqa: E402


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
    assert Version(releases.NEWEST_TESTED).release == pinned["transformers"].release[:2]
    text = (ROOT / "README.md").read_text()
    assert re.search(rf"Transformers 5\.17 to {re.escape(releases.NEWEST_TESTED)}\b", text)


def test_a_newer_transformers_is_warned_of_once_and_an_older_is_not(monkeypatch):
    monkeypatch.setattr(releases, "INSTALLED", Version("5.99.1"))
    with pytest.warns(UserWarning, match=r"tested with Transformers up to 5\.\d+, and this is 5.99.1: .*pip install"):
        releases.warn_if_newer()
    for tested in (f"{releases.NEWEST_TESTED}.7", "5.17.0"):
        monkeypatch.setattr(releases, "INSTALLED", Version(tested))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            releases.warn_if_newer()


def test_the_oldest_are_the_lower_bounds():
    oldest = versions.lines("oldest", ["torch"])
    assert {"transformers[serving]==5.17", "numpy==2.0"} <= set(oldest)
    assert not any(line.startswith("torch") for line in oldest)
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
