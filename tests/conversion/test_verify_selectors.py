"""`verify --compare-selectors`: the same weights with the other way to choose blocks."""

from __future__ import annotations

import importlib
import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_families import tiny_dense

from nsa_hf.conversion import convert, render_verify, verify
from nsa_hf.errors import NsaError

LENGTH = 150
CHANNELS = {"nsa_selector": "channels", "nsa_compression": "none"}


@pytest.mark.parametrize(
    ("own", "others", "names"),
    [
        ({}, {"nsa_selector": "channels"}, ("compressed (mlp)", "channels (4)")),
        (CHANNELS, {"nsa_compression": "mean"}, ("channels (4)", "compressed (mean)")),
        ({**CHANNELS, "nsa_selector_dim": 2, "nsa_compression": "linear"}, {"nsa_compression": "linear"}, None),
        ({"nsa_branch_kv": "independent", "nsa_dense_layers": [1]}, {"nsa_selector": "channels"}, None),
    ],
)
def test_the_other_selector_is_measured_as_the_model_converted_with_it(
    own, others, names, tiny_dense_dir, tiny_sizes, tmp_path
):
    """Also of weights that were trained: they are the same in both, and the model's own figures stay as they are."""
    out = convert(tiny_dense_dir, tmp_path / "own", **{**tiny_sizes, **own})
    kept = {name: value for name, value in own.items() if name in ("nsa_branch_kv", "nsa_dense_layers")}
    other = convert(tiny_dense_dir, tmp_path / "other", **{**tiny_sizes, **kept, **others})
    trained = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in (name for name in trained if ".nsa.compress" in name):
        trained[name] += 0.3 * torch.randn(trained[name].shape, generator=generator)
    for folder in (out, other):
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})
    alone, of_other = (verify(tiny_dense_dir, folder, length=LENGTH, documents=1) for folder in (out, other))
    both = verify(tiny_dense_dir, out, length=LENGTH, documents=1, compare_selectors=True)
    compared = both["other_selector"]
    assert compared["by_position"] == of_other["by_position"]
    assert compared["by_position"][1]["kl"] != both["by_position"][1]["kl"]
    assert alone["other_selector"] is None
    same = {**alone, "seconds": both["seconds"], "other_selector": compared}
    assert both == same
    if names:
        assert (compared["instead_of"], compared["name"]) == names
    console = Console(file=io.StringIO(), width=80)
    console.print(render_verify(both))
    text = console.file.getvalue()
    assert "…" not in text, "something was cut off"
    assert f"{compared['by_position'][1]['kl']:.5f}" in text and "blocks chosen otherwise" in text


def test_a_comparison_with_channels_is_refused_where_there_are_none(tiny_sizes, tmp_path, monkeypatch):
    tiny_dense("ctrl").save_pretrained(tmp_path / "dense")
    out = convert(tmp_path / "dense", tmp_path / "out", **tiny_sizes)
    module = importlib.import_module("nsa_hf.conversion.verify")
    monkeypatch.setattr(module, "compare_tensors", lambda *_: pytest.fail("went on"))
    with pytest.raises(NsaError, match=r"selectors cannot be compared: .* together with one other channel"):
        verify(tmp_path / "dense", out, length=100, documents=1, compare_selectors=True)
