"""conversion/timing.py: what is timed is what a conversion would compute, and what is said of it is right."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from tiny_models import SELECTORS

from nsa_hf.conversion import Timing, plan, render_plan, timing
from nsa_hf.errors import NsaError
from nsa_hf.recipes.cli import run

PARTS = ("forward", "training")


@pytest.mark.parametrize("selector", SELECTORS)
def test_both_ways_are_timed(selector, tiny_dense_dir, tiny_sizes, monkeypatch):
    given, attention = [], timing.nsa_attention

    def seen(**inputs):
        given.append(inputs)
        return attention(**inputs)

    monkeypatch.setattr(timing, "nsa_attention", seen)
    monkeypatch.setattr(timing, "ENOUGH", 0)
    described = plan(tiny_dense_dir, **(tiny_sizes | SELECTORS[selector]), timing=Timing((96, 40, 96), "cpu"))
    timed = described["timed"]
    assert [row["tokens"] for row in timed["rows"]] == [40, 96]
    for row in timed["rows"]:
        assert all(row[part][way] > 0 for part in PARTS for way in ("dense", "nsa"))
        assert all(row[part]["kernel"] in (*timing.DENSE_KERNELS, "default") for part in PARTS)
    options = described["options"]
    for inputs in given:
        assert inputs["block_size"] == options["nsa_block_size"] and inputs["topk"] == options["nsa_topk"]
        assert (inputs["k_cmp"] is None) == (options["nsa_compression"] == "none")
        assert ("q_index" in inputs) == (options["nsa_selector"] == "channels")
    assert {inputs["q"].requires_grad for inputs in given} == {True, False}
    console = Console(file=io.StringIO(), width=120)
    console.print(render_plan(described))
    assert "Faster on CPU from" in console.file.getvalue() and "Attention of one layer" in console.file.getvalue()


def test_nothing_is_timed_unasked(tiny_dense_dir):
    assert plan(tiny_dense_dir)["timed"] is None


def test_from_which_length():
    def row(tokens, nsa, dense):
        return {"tokens": tokens, "forward": {"nsa": nsa, "dense": dense}}

    slower, faster = row(10, 2, 1), row(30, 1, 2)
    assert timing._faster_from([slower, row(20, 1, 1), faster], "forward") == 30
    assert timing._faster_from([row(10, 1, 2), slower, row(20, 1, 2), faster], "forward") == 20
    assert timing._faster_from([faster, slower], "forward") is None
    assert timing._faster_from([], "forward") is None


def test_longer_texts_are_left_out(tiny_dense_dir, monkeypatch):
    timed = plan(tiny_dense_dir, timing=Timing((32, 64), "cpu", patience=0.0))["timed"]
    assert len(timed["rows"]) == 1 and timed["left_out"].startswith("at 32 tokens one call took")

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "_row", full)
    timed = plan(tiny_dense_dir, timing=Timing((32, 64), "cpu"))["timed"]
    assert timed["left_out"] == "no memory for 32 tokens" and timed["faster_from"] == {
        "forward": None,
        "training": None,
    }


def test_what_cannot_be_timed(tiny_dense_dir, capsys):
    for lengths, said in (((), "at least one length"), ((1,), "must be an int of at least 2"), ((4.5,), "got 4.5")):
        with pytest.raises(NsaError, match=said):
            Timing(lengths)
    assert run(["plan", str(tiny_dense_dir), "--time", "32", "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err
    assert run(["plan", str(tiny_dense_dir), "--time", "4k"]) == 2
    assert "lengths in tokens, separated by commas" in capsys.readouterr().err
