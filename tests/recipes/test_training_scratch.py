"""Runs without a teacher, a control that follows its own rounded logits, and stages of which some are compiled."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import converted, result_of, stop_at, tiny_run, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.model_cards.card import render_card
from nsa_hf.recipes.training import loop
from nsa_hf.recipes.training.logs import Log
from nsa_hf.recipes.training.loop import train

ALONE = {"teacher": "none", "kl_weight": 0.0}


@pytest.fixture(scope="module")
def alone(nsa_dir, texts, tmp_path_factory):
    """A finished run without a teacher, and what was printed; no second model was loaded for it."""
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        load = loop.load_nsa_model
        patch.setattr(loop, "load_nsa_model", lambda *args: loaded.append(args) or load(*args))
        out = train(tiny_run(nsa_dir, texts, tmp_path_factory.mktemp("alone") / "out", **ALONE))
    assert len(loaded) == 1
    return out


def perplexities(folder, document, dense):
    """Of the first 64 tokens of a document and of the next 64, of whole logits."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(document.read_text()).input_ids[:128]])
    with torch.no_grad():
        if dense:
            with model.dense_attention():
                logits = model(ids).logits
        else:
            logits = model(ids).logits
    nll = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[0, :, 0]
    return [nll[:64].mean().exp().item(), nll[64:].mean().exp().item()]


def test_its_figures_stand_beside_its_own_weights_run_dense(alone, texts, nsa_dir, tmp_path):
    held_out = result_of(alone)["held_out"]
    assert held_out["after"] == held_out["after_own_dense"]
    one = tmp_path / "one"
    one.mkdir()
    (one / "0.txt").write_text((texts / "0.txt").read_text())
    settings = {**ALONE, "held_out": str(one), "held_out_documents": 1}
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", **settings))
    found = result_of(out)["held_out"]
    for folder, rows in ((nsa_dir, found["before"]), (out, found["after"])):
        for dense, key in ((True, "ppl_reference"), (False, "ppl")):
            expected = perplexities(folder, one / "0.txt", dense)
            assert [row[key] for row in rows] == pytest.approx(expected, rel=1e-4)
    assert found["after"][1]["kl"] > 0


def test_without_a_teacher_it_learns_the_same(alone, nsa_dir, texts, tmp_path):
    taught = train(tiny_run(nsa_dir, texts, tmp_path / "out", kl_weight=0.0))
    one, other = weights_of(alone), weights_of(taught)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result_of(alone)["curve"][-1]["kl"] == 0


def test_it_goes_on_where_it_was_stopped(alone, nsa_dir, texts, tmp_path):
    config = tiny_run(nsa_dir, texts, tmp_path / "out", **ALONE)
    stop_at(config, 2)
    assert (train(config) / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_what_is_said_of_it_names_no_teacher(nsa_dir, texts, tmp_path, capsys):
    """And where sparse and dense grow apart, as they do when they learn something, that is no harm."""
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", **ALONE, lr_nsa=0.3, steps=2))
    result, printed = result_of(out), capsys.readouterr().out
    before, after = (math.prod(row["ppl"] for row in result["held_out"][when]) ** 0.5 for when in ("before", "after"))
    assert result["held_out"]["kl_after"] > result["held_out"]["kl_before"] and result["warning"] is None
    assert f"held-out text: perplexity {before:.3f} before training, {after:.3f} after" in printed
    assert "teacher" not in printed and "…" not in printed
    text = render_card(out).read_text()
    assert "The model had no teacher." in text and "| positions | before, run dense |" in text
    assert "dense teacher" not in text


def test_a_dense_run_from_scratch_is_dense_on_both_sides(nsa_dir, texts, tmp_path):
    result = result_of(train(tiny_run(nsa_dir, texts, tmp_path / "out", **ALONE, attention="dense", steps=2)))
    for row in [*result["held_out"]["before"], *result["held_out"]["after"]]:
        assert row["kl"] < 1e-9 and row["ppl"] == row["ppl_reference"]
    assert result["stages"][0]["lr_nsa"] == 0.0


def test_a_control_follows_its_own_rounded_logits(nsa_dir, texts, tmp_path):
    settings = {"attention": "dense", "ce_weight": 0.0, "teacher_dtype": "bfloat16", "lr_backbone": 1e-4}
    result = result_of(train(tiny_run(nsa_dir, texts, tmp_path / "out", **settings)))
    assert all(0 < row["kl"] == row["loss"] < 1e-2 and row["lr_nsa"] == 0 for row in set_rates(result["curve"]))
    assert 0 < result["held_out"]["kl_after"] < 1e-2
    assert result["warning"] is None


def set_rates(curve):
    """The rows of a curve, with the rate of a group that is not there as 0."""
    return [{"lr_nsa": 0, **row} for row in curve]


def test_stages_that_look_into_the_layers_leave_the_others_compiled(
    tiny_dense_dir, tiny_sizes, texts, tmp_path, monkeypatch
):
    ran, by_stage = [], {}

    def counting(graph, inputs):
        return lambda *args: ran.append(graph) or graph(*args)

    def add(self, row):
        by_stage.setdefault(row["stage"], []).append(len(ran))
        ran.clear()

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: compile(call, backend=counting, dynamic=dynamic))
    monkeypatch.setattr(Log, "add", add)
    model = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes, gate="blend")
    stages = [
        {"trains": "nsa", "selector_weight": 1.0, "kl_weight": 0.0},
        {"gate_blend_steps": 1},
        {},
    ]
    config = tiny_run(model, texts, tmp_path / "out", stages=stages, steps=1, ce_weight=0.0, compile="yes")
    train(config)
    assert by_stage.keys() == {1, 2, 3}
    assert (by_stage[1], by_stage[2]) == ([0], [0])
    assert by_stage[3][0] > 0


@pytest.mark.parametrize(
    ("stages", "compiled"),
    [
        ([{"selector_weight": 1.0}, {}], "yes"),
        ([{"selector_weight": 1.0}, {"gate_blend_steps": 2}], "no"),
        ([{"layer_weight": 1.0}], "no"),
    ],
)
def test_layers_are_compiled_where_a_stage_can_use_it(stages, compiled, monkeypatch):
    from nsa_hf.recipes.training.config import make_run_config
    from nsa_hf.recipes.training.stages import settle_machine

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, is_bf16_supported=lambda: True))
    assert settle_machine(make_run_config({"model": "a", "out": "b", "stages": stages})).compile == compiled
