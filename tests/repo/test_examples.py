"""The examples in the docstrings of what users call: each has one, and they run in a folder with a tiny model."""

from __future__ import annotations

import doctest
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import nsa_hf
from nsa_hf import conversion, kernels

MODEL = nsa_hf.NsaLlamaForCausalLM
METHODS = ["from_dense", "dense_attention", "record_selection", "record_attention", "set_gate_blend"]


def public(module: Any) -> dict[str, Any]:
    """The functions that a module offers."""
    return {name: value for name in module.__all__ if inspect.isfunction(value := getattr(module, name))}


DOCUMENTED: dict[str, Any] = {
    "nsa_hf": nsa_hf,
    **public(nsa_hf),
    **public(conversion),
    **public(kernels),
    "Measuring": conversion.Measuring,
    "Sizes": kernels.Sizes,
    **{name: getattr(MODEL, name) for name in METHODS[1:]},
    "method from_dense": MODEL.from_dense,
    MODEL.__name__: MODEL,
    MODEL.config_class.__name__: MODEL.config_class,
}


@pytest.fixture(scope="module")
def folder(tiny_dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny dense models where the examples have them."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(tiny_dense_dir, folder / "path" / "to" / "llama")
    return folder


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for made in ("llama-nsa", "llama-again"):
        shutil.rmtree(made, ignore_errors=True)
    names = {"nsa_hf": nsa_hf, "torch": torch, "AutoConfig": AutoConfig, "AutoModelForCausalLM": AutoModelForCausalLM}
    names |= {name: getattr(kernels, name) for name in kernels.__all__}
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_what_there_is_can_be_seen() -> None:
    """Lazy names and made classes are in `dir`, and all that is in it is there."""
    seen = {name for name in dir(nsa_hf) if not name.startswith("_")}
    assert {"convert", "from_dense", "nsa_config_from_dense", "kernels", "conversion", MODEL.__name__} <= seen
    assert all(hasattr(nsa_hf, name) for name in seen)
    assert not {name for name in seen if name.endswith("Mixin")}


def test_help_says_in_a_screen_what_is_sparse() -> None:
    text = inspect.getdoc(nsa_hf.NsaQwen3ForCausalLM) or ""
    assert len(text.splitlines()) <= 24 and all(len(line) <= 120 for line in text.splitlines())
    assert "`Qwen3ForCausalLM` with Native Sparse Attention" in text and "nsa_topk" in text
    shown = {line.split("(")[0].strip() for line in text.splitlines() if line.startswith("    ") and "(" in line}
    assert set(METHODS) <= shown and all(hasattr(MODEL, name) for name in METHODS)
    fields = inspect.getdoc(nsa_hf.NsaQwen3Config) or ""
    assert set(nsa_hf.NSA_FIELDS) - {"nsa_format", "nsa_selector_channels"} <= set(fields.split())
