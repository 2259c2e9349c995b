"""recipes/benchmarks/scratch.py and curves.py, by the run file they are for, at a toy size."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tiny_models import byte_tokenizer
from tiny_runs import result_of, weights_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nsa_hf.errors import NsaError
from nsa_hf.recipes.benchmarks import adaptation, curves, scratch
from nsa_hf.recipes.training.config import load_run_config
from nsa_hf.recipes.training.loop import train

RUN = Path(__file__).parents[2] / "recipes" / "runs" / "scratch.yaml"
SIZES = {"block_size": 16, "topk": 4, "local_blocks": 1, "window_size": 24, "kernel_size": 16, "kernel_stride": 8}


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The three models, with blocks of 16 tokens."""
    out = tmp_path_factory.mktemp("models")
    config = scratch.dense_config(byte_tokenizer(), layers=2, hidden=128, tokens=8192)
    scratch.CONVERSIONS["index"]["compression"] = "none"  # sizes of entries would mean there are some
    try:
        scratch.write_models(out, byte_tokenizer(), config, **SIZES)
    finally:
        del scratch.CONVERSIONS["index"]["compression"]
    return out


def test_what_the_models_have_in_common_is_the_same(models):
    dense, index, paper = (weights_of(models / name) for name in ("dense", "index", "paper"))
    assert {name for name in paper if ".nsa." not in name} == {n for n in index if ".nsa." not in n} == dense.keys()
    assert all(torch.equal(dense[name], made[name]) for name in dense for made in (index, paper))
    found = {name: AutoConfig.from_pretrained(models / name) for name in ("index", "paper")}
    assert (found["index"].nsa_selector, found["paper"].nsa_selector) == ("channels", "compressed")
    assert (found["paper"].nsa_gate, found["paper"].nsa_compression) == ("sigmoid", "mlp")
    assert any(".nsa.compress_k." in name for name in paper)
    assert not any(".nsa.compress_k." in name for name in index)


def test_the_usual_size_is_about_twenty_million(models):
    config = scratch.dense_config(AutoTokenizer.from_pretrained(models / "dense"), 10, 256, 8192)
    config.vocab_size = 49152  # SmolLM2's
    with torch.device("meta"):
        assert 18e6 < AutoModelForCausalLM.from_config(config).num_parameters() < 22e6


def test_one_run_file_trains_all_three_and_they_stand_in_one_picture(models, texts, tmp_path):
    toy = [f"data={texts}", f"held_out={texts}", "length=128", "steps=3", "held_out_documents=2", "warmup_steps=1"]
    runs = {"index": "index", "paper": "paper", "dense": "index"}
    for name, model in runs.items():
        settings = [f"model={models / model}", f"out={tmp_path / name}", *toy, "batch_size=2"]
        train(load_run_config(RUN, [*settings, *(["attention=dense"] if name == "dense" else [])]))
    results = {name: result_of(tmp_path / name) for name in runs}
    # the same tokens: the first step's loss of two models that are dense in the exact range and the same there
    first = {name: result["curve"][0]["ce"] for name, result in results.items()}
    assert first["index"] == pytest.approx(first["dense"], abs=1e-2)
    assert results["paper"]["nsa"]["nsa_gate"] == "sigmoid" and "nsa_gate" not in results["index"]["nsa"]
    folders = [str(tmp_path / name) for name in runs]
    tables = [tmp_path / name for name in ("curves.csv", "gates.csv", "adaptation.csv")]
    pictured = ["--picture", str(tmp_path / "curves.png")]
    curves.main([*folders, "--csv", str(tables[0]), "--gates", str(tables[1]), *pictured])
    adaptation.main([*folders, "--csv", str(tables[2])])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    losses = [row for row in rows(tables[0]) if row["run"] == "paper"]
    assert [row["tokens"] for row in losses] == ["256", "512", "768"]
    assert [float(row["ce"]) for row in losses] == pytest.approx(
        [row["ce"] for row in results["paper"]["curve"]], abs=1e-5
    )
    gates = [row for row in rows(tables[1]) if row["run"] == "paper"]
    assert [row["layer"] for row in gates] == ["0", "1"]
    assert float(gates[0]["window"]) == pytest.approx(results["paper"]["curve"][-1]["gates"]["0"]["window"], abs=1e-4)
    assert {row["run"] for row in rows(tables[1])} == {"index", "paper"}
    told = {row["run"]: row["settings"] for row in rows(tables[2])}
    assert "teacher=none" in told["paper"] and "nsa_gate=sigmoid" in told["paper"]
    assert "attention=dense" in told["dense"]


def test_a_long_curve_is_drawn_in_means():
    curve = [{"tokens": step, "loss": step, "ce": step, "kl": 0.0, "grad_norm": 1.0} for step in range(1, 501)]
    made = curves.curve_rows("a", {"curve": curve})
    assert len(made) == 167
    assert (made[0]["tokens"], made[0]["steps"], made[0]["ce"]) == (3, 3, "2.00000")
    assert (made[-1]["tokens"], made[-1]["steps"], made[-1]["ce"]) == (500, 2, "499.50000")
    assert sum(row["steps"] for row in made) == 500


def test_what_cannot_be_made_is_said(models, tmp_path, capsys):
    with pytest.raises(NsaError, match="--hidden must be a multiple of 128, got 100"):
        scratch.dense_config(byte_tokenizer(), 2, 100, 8192)
    with pytest.raises(SystemExit):
        scratch.main([str(models), "--tokenizer", str(models / "dense")])
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        curves.main([str(tmp_path / "nothing"), "--csv", str(tmp_path / "a.csv")])
    assert "no record of a finished run" in capsys.readouterr().err
