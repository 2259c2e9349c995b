"""Runs of several stages, and what settings leave to the machine, the model and a stage's length."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import converted, result_of, stop_at, tiny_run, weights_of

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.config import load_run_config, make_run_config, read_run_file
from nsa_hf.recipes.training.loop import train
from nsa_hf.recipes.training.stages import (
    blend_at,
    decisive_settings,
    settle_machine,
    settle_stages,
    stage_at,
    stages_of,
    topk_at,
)

RUNS = Path(__file__).parents[2] / "recipes" / "runs"
TWO = [{"steps": 3, "trains": "nsa"}, {"steps": 4, "lr_backbone": 5e-4, "schedule": "wsd", "accumulate": 2}]


def model_config(**fields):
    """As much of a converted model's config as settings are settled by."""
    usual = {"nsa_gate": "residual", "nsa_exact_tokens": 1024, "nsa_topk": 16, "nsa_selector": "channels"}
    usual |= {"nsa_compression": "none", "nsa_sizes": SimpleNamespace(exact_tokens=1024)}
    return SimpleNamespace(**{**usual, **fields})


def settled(model=None, processes=1, **settings):
    config = make_run_config({"model": "a", "out": "b", **settings})
    return settle_stages(settle_machine(config), model or model_config(), processes)


def test_tokens_become_the_steps_that_read_them():
    assert settled(tokens=1000, length=64, batch_size=2, accumulate=2).steps == 4
    assert settled(tokens=1024, length=64, batch_size=2, accumulate=2, processes=4).steps == 1
    assert settled(steps=5).steps == 5
    mixed = settled(tokens=1000, batch_size=1, length=[{"length": 50, "weight": 1}, {"length": 100, "weight": 3}])
    assert (mixed.steps, mixed.held_out_length) == (10, 100)


def test_a_settled_config_is_settled_already():
    for config in (settled(tokens=10_000), settled(stages=[{"tokens": 10_000}, {"length": 64}])):
        assert settle_stages(settle_machine(config), model_config(), 1) == config
        assert "auto" not in config.as_dict().values()


def test_the_adapting_run_file_needs_model_and_out_alone(monkeypatch):
    config = load_run_config(RUNS / "adapt.yaml", ["model=a", "out=b"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    on_gpu = settle_stages(settle_machine(config), model_config(), 1)
    assert (on_gpu.batch_size, on_gpu.length, on_gpu.steps) == (4, 8192, 306)
    assert (on_gpu.mixed_precision, on_gpu.teacher_dtype, on_gpu.compile) == ("bf16", "bfloat16", "yes")
    assert (on_gpu.ce_weight, on_gpu.kl_weight, on_gpu.lr_nsa, on_gpu.lr_backbone) == (0.0, 1.0, 0.0, 2e-5)


def test_the_default_recipe_moves_the_backbone_alone(tiny_dense_dir, tiny_sizes, texts, tmp_path):
    """Of a model as conversions recommend it; on a CPU, in as many steps as its tokens need."""
    sizes = {**tiny_sizes, "nsa_selector": "channels", "nsa_compression": "none"}
    del sizes["nsa_kernel_size"], sizes["nsa_kernel_stride"]
    model = converted(tiny_dense_dir, tmp_path / "nsa", sizes)
    changes = [f"model={model}", f"out={tmp_path / 'out'}", f"data={texts}", f"held_out={texts}", "length=128"]
    out = train(load_run_config(RUNS / "adapt.yaml", [*changes, "tokens=500"]))
    result, before, after = result_of(out), weights_of(model), weights_of(out)
    assert len(result["curve"]) == 4
    assert {name for name in before if torch.equal(before[name], after[name])} == {n for n in before if ".nsa." in n}


@pytest.mark.parametrize(
    ("model", "settings", "rate"),
    [
        ({}, {}, 0.0),
        ({}, {"lr_nsa": 3e-4}, 3e-4),
        ({}, {"trains": "nsa"}, 1e-3),
        ({}, {"lr_backbone": 0.0}, 1e-3),
        ({"nsa_exact_tokens": 0}, {}, 1e-3),
        ({"nsa_gate": "blend"}, {"gate_blend_steps": 5}, 1e-3),
        ({"nsa_selector": "compressed", "nsa_compression": "mlp"}, {"selector_weight": 0.1}, 1e-3),
        ({"nsa_exact_tokens": 0}, {"attention": "dense", "ce_weight": 1.0, "lr_nsa": 1.0}, 0.0),
    ],
)
def test_parameters_that_are_not_in_use_are_left_alone(model, settings, rate):
    assert settled(model_config(**model), **settings).lr_nsa == rate


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_blend_steps": 2}, "gate_blend_steps needs nsa_gate 'blend', the model has 'residual'"),
        ({"topk_start": 16, "topk_steps": 2}, "topk_start must be above the model's nsa_topk, 16, got 16"),
        ({"topk_start": "all", "topk_steps": 100}, "topk_steps must be below the 100 steps of the stage"),
        ({"selector_weight": 1.0}, "selector_weight needs a selector with parameters"),
        ({"selector_weight": 1.0, "length": 1024}, "up to 1024 every block is selected"),
        ({"layer_weight": 1.0, "compile": "yes"}, "compile 'yes' does not go with layer_weight"),
        ({"attention": "dense", "ce_weight": 1.0, "trains": "nsa"}, "attention 'dense' trains the backbone alone"),
        ({"attention": "dense", "ce_weight": 1.0, "lr_backbone": 0.0, "lr_nsa": 1e-3}, "trains the backbone alone"),
        ({"stages": [{}, {"gate_blend_steps": 2}]}, "stage 2: gate_blend_steps needs"),
    ],
)
def test_what_does_not_fit_the_model_is_named(settings, message):
    with pytest.raises(NsaError, match=message):
        settled(**settings)


def test_every_step_is_in_one_stage():
    stages = stages_of(settled(stages=[{"steps": 3}, {"steps": 1}, {"steps": 4}]))
    assert [stage_at(stages, step).number for step in range(8)] == [1, 1, 1, 2, 3, 3, 3, 3]
    assert stage_at(stages, 8) is None
    assert [(stage.first, stage.end) for stage in stages] == [(0, 3), (3, 4), (4, 8)]


def test_settings_that_decide_are_named_by_their_stage():
    one, two = decisive_settings(settled(steps=3)), decisive_settings(settled(stages=[{"steps": 3}, {"steps": 4}]))
    assert (one["steps"], one["seed"], two["seed"]) == (3, 0, 0)
    assert (two["stage 1: steps"], two["stage 2: steps"]) == (3, 4)
    assert "steps" not in two and "tokens" not in one


def test_blocks_fall_in_halvings():
    stage = settled(topk_start="all", topk_steps=6, steps=9, length=6400, batch_size=1)
    assert [topk_at(step, stage, 16, 64) for step in range(9)] == [100, 100, 64, 64, 32, 32, 16, 16, 16]
    stage = settled(topk_start=24, topk_steps=2, steps=9, length=6400, batch_size=1)
    assert [topk_at(step, stage, 16, 64) for step in range(4)] == [24, 24, 16, 16]


def test_a_blend_goes_on_where_the_stage_before_has_left_it():
    blend = model_config(nsa_gate="blend")
    stages = stages_of(settled(blend, stages=[{"steps": 4, "gate_blend_steps": 4}, {"steps": 2}]))
    found = [blend_at(step, stages, number, 0.0) for number, steps in ((1, 4), (2, 2)) for step in range(steps)]
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_gates_that_would_end_half_open_are_refused():
    """As with more processes, where the same tokens are fewer steps."""
    blend = model_config(nsa_gate="blend")
    opening = {"tokens": 1600, "length": 100, "batch_size": 1, "gate_blend_steps": 10}
    assert settled(blend, **opening).steps == 16
    with pytest.raises(NsaError, match="gate_blend_steps must be at most the 8 steps of the stage"):
        settled(blend, **opening, processes=2)


def test_gates_that_a_stage_has_opened_are_trained_in_those_after_it():
    blend = model_config(nsa_gate="blend")
    stages = [{"steps": 5}, {"steps": 5, "gate_blend_steps": 5}, {"steps": 5}]
    rates = [stage.config.lr_nsa for stage in stages_of(settled(blend, stages=stages))]
    assert rates == [0.0, 1e-3, 1e-3]


@pytest.fixture(scope="module")
def two_stages(nsa_dir, texts, tmp_path_factory):
    """An undisturbed run of TWO stages."""
    return train(tiny_run(nsa_dir, texts, tmp_path_factory.mktemp("two") / "out", stages=TWO))


def test_each_stage_trains_what_it_says(two_stages, nsa_dir, texts, tmp_path):
    result = result_of(two_stages)
    assert [(row["step"], row["stage"]) for row in result["curve"]] == [(s, 1 if s < 4 else 2) for s in range(1, 8)]
    # rates of its own, from its own first step on
    assert result["curve"][3]["lr_backbone"] == pytest.approx(2.5e-4)
    assert [stage["tokens_per_step"] for stage in result["stages"]] == [128, 256]
    first = weights_of(train(tiny_run(nsa_dir, texts, tmp_path / "first", steps=3, trains="nsa")))
    before = weights_of(nsa_dir)
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    assert changed and all(".nsa." in name for name in changed)
    # the first stage's end is where the second begins
    assert result_of(tmp_path / "first")["curve"][2]["ce"] == result["curve"][2]["ce"]
    after = weights_of(two_stages)
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize("stops", [(3,), (5,), (2, 3, 5)], ids=["between", "inside", "everywhere"])
def test_killed_between_stages_or_within_one_it_ends_the_same(two_stages, nsa_dir, texts, tmp_path, stops):
    config = tiny_run(nsa_dir, texts, tmp_path / "out", stages=TWO, save_every=1)
    for step in stops:
        stop_at(config, step)
    out = train(config)
    assert (out / "model.safetensors").read_bytes() == (two_stages / "model.safetensors").read_bytes()
    curves = [[row["loss"] for row in result_of(folder)["curve"]] for folder in (out, two_stages)]
    assert curves[0] == curves[1]
    assert result_of(out)["held_out"] == result_of(two_stages)["held_out"]


def test_another_stage_is_another_run(two_stages, nsa_dir, texts):
    other = [TWO[0], {**TWO[1], "lr_backbone": 6e-4}]
    with pytest.raises(NsaError, match=r"stage 2: lr_backbone: 0.0005 -> 0.0006"):
        train(tiny_run(nsa_dir, texts, two_stages, stages=other))


def test_a_control_is_dense_from_beginning_to_end(nsa_dir, texts, tmp_path):
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", attention="dense"))
    result, before, after = result_of(out), weights_of(nsa_dir), weights_of(out)
    held_out = result["held_out"]
    assert held_out["kl_before"] < 1e-7 < 1e-4 < held_out["kl_after"]
    for row, own in zip(held_out["after"], held_out["after_own_dense"], strict=True):
        assert row["ppl"] == own["ppl_reference"]
    # what a dense model's loss has no use for has not moved
    for name in before:
        assert torch.equal(before[name], after[name]) == (".nsa." in name), name
    assert result["warning"] is None


def test_blocks_are_annealed_and_the_model_keeps_its_own(nsa_dir, texts, tmp_path):
    settings = {"steps": 6, "topk_start": "all", "topk_steps": 4, "lr_nsa": 0.0}
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", **settings))
    curve = result_of(out)["curve"]
    topk = converted_topk(nsa_dir)
    assert curve[0]["topk"] > topk == curve[-1]["topk"]
    # with all blocks it is the dense model
    assert curve[0]["kl"] < 1e-6 < curve[-1]["kl"]
    assert converted_topk(out) == topk
    config = tiny_run(nsa_dir, texts, tmp_path / "stopped", save_every=1, **settings)
    stop_at(config, 2)
    assert (train(config) / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_finished_runs_of_before_there_were_stages_are_known(finished, tmp_path, capsys):
    out, config, _ = finished
    old = Path(shutil.copytree(out, tmp_path / "old"))
    record = result_of(old)
    new = ("pack", "trains", "attention", "schedule", "held_out_length", "teacher_dtype", "compile", "topk_start")
    record["fingerprint"] = {name: value for name, value in record["fingerprint"].items() if name not in new}
    del record["stages"], record["warning"]
    (old / "training.json").write_text(json.dumps(record))
    assert train(replace(config, out=str(old))) == old
    assert "finished: nothing to do" in capsys.readouterr().out
    # what was 1 where nothing was written is 0 now
    with pytest.raises(NsaError, match=r"ce_weight: 1.0 -> 0.0\): give another out="):
        train(replace(config, out=str(old), ce_weight=0.0))


def converted_topk(folder):
    from nsa_hf.recipes.load import read_config

    return read_config(folder).nsa_topk


def test_a_run_that_did_harm_says_so_first(nsa_dir, texts, tmp_path, capsys):
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", ce_weight=0.0, lr_backbone=0.3, steps=2))
    warning = result_of(out)["warning"]
    assert warning.startswith("worse than before: the held-out KL to the teacher rose from")
    assert warning.endswith("; most likely the rates are too high (lr_nsa 0.01, lr_backbone 0.3): lower them")
    lines = capsys.readouterr().out.splitlines()
    last_step = max(place for place, line in enumerate(lines) if line.startswith("step "))
    assert lines[last_step + 1] == warning


def test_the_next_token_loss_is_the_reason_where_it_is_one(nsa_dir, texts, tmp_path):
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", lr_backbone=1e-2, steps=6))
    assert "or the next-token loss (ce_weight 1) outweighs the teacher" in result_of(out)["warning"]
    out = train(tiny_run(nsa_dir, texts, tmp_path / "alone", lr_backbone=1e-2, steps=6, kl_weight=0.0))
    assert result_of(out)["warning"].endswith("no stage had the teacher in its loss (kl_weight)")


def test_the_gates_blend_over_two_stages(tiny_dense_dir, tiny_sizes, texts, tmp_path):
    model = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes, gate="blend")
    stages = [{"steps": 2, "gate_blend_steps": 2}, {"steps": 2}]
    whole = train(tiny_run(model, texts, tmp_path / "whole", stages=stages))
    config = tiny_run(model, texts, tmp_path / "stopped", stages=stages, save_every=1)
    stop_at(config, 3)
    stopped = train(config)
    from nsa_hf.recipes.load import read_config

    assert read_config(whole).nsa_gate_blend == read_config(stopped).nsa_gate_blend == 1.0
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_run_of_the_whole_nsa_ends_with_the_papers_gates(tiny_dense_dir, tiny_sizes, texts, tmp_path):
    """Its run file, but for lengths: what scores blocks is trained alone, then beside all, and every branch is used."""
    model = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes, gate="blend")
    settings = read_run_file(RUNS / "paper.yaml")
    stages = [{**stage, "steps": 2} for stage in settings["stages"]]
    for stage in stages:
        del stage["tokens"]
    stages[1]["gate_blend_steps"] = 1
    toy = {"length": 128, "stages": stages, "held_out_documents": 2, "ce_weight": 0.0, "lr_nsa": settings["lr_nsa"]}
    result = result_of(train(tiny_run(model, texts, tmp_path / "out", **toy)))
    curve = result["curve"]
    assert [row["kl"] > 0 for row in curve] == [False, False, True, True, True, True]
    for row, stage in zip(curve[::2], stages, strict=True):
        assert row["selector"] > 0
        assert row["loss"] == pytest.approx(row["kl"] + stage["selector_weight"] * row["selector"], rel=1e-5)
    assert result["nsa"]["nsa_gate_blend"] == 1.0
    gates = curve[5]["gates"]["0"]
    assert all(0.3 < gates[branch] < 0.7 for branch in ("compressed", "selected", "window"))
    first = weights_of(train(tiny_run(model, texts, tmp_path / "first", **{**toy, "stages": stages[:1]})))
    before = weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    assert changed and all(".nsa.compress_k." in name for name in changed)
