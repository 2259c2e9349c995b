"""`nsa-hf eval`: what is written, what is kept, and what is said where a suite fails."""

from __future__ import annotations

import json

import card_results
import pytest
from rich.console import Console
from tiny_runs import converted, write_texts

from nsa_hf.errors import NsaError
from nsa_hf.recipes.evaluation import suites
from nsa_hf.recipes.evaluation.perplexity import perplexity
from nsa_hf.recipes.evaluation.subject import Settings, Subject
from nsa_hf.recipes.evaluation.suites import evaluate, read_suites, render


@pytest.fixture
def out(tiny_dense_dir, tiny_sizes, tmp_path):
    return converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes)


@pytest.fixture
def settings(tmp_path):
    return Settings(text=str(write_texts(tmp_path / "texts")), length=128)


def test_eval_writes_what_it_returns(out, settings):
    result = evaluate(out, ["ppl"], settings)
    assert json.loads((out / "eval.json").read_text()) == result
    measured = result["suites"]["ppl"]
    assert [row["to"] for row in measured["rows"]] == [64, 128]
    assert measured["rows"][0]["kl"] < 1e-7 < measured["rows"][1]["kl"]
    assert [row["layer"] for row in measured["recall"]] == [0, 1, 2]
    console = Console(width=200, record=True)
    console.print(render(result, ["ppl"], out))
    text = console.export_text()
    assert "64-128" in text and "recall" in text
    with pytest.raises(NsaError, match="too short"):
        evaluate(out, ["ppl"], Settings(text=settings.text, documents=1, length=4000))


def test_a_suite_that_fails_leaves_the_others(out, settings, monkeypatch):
    def fails(subject, settings):
        raise RuntimeError("out of memory")

    before = {"format": 1, "length": 9, "texts": {}, "rows": [], "kl": None}
    (out / "eval.json").write_text(json.dumps(before))
    monkeypatch.setattr(suites, "SUITES", {"first": fails, "second": lambda *_: {"a": 1}, "ppl": fails})
    with pytest.raises(NsaError, match=r"2 of 3 suites failed; second can be read in .*\. first: out of memory; ppl"):
        evaluate(out, ["first", "second", "ppl"], settings)
    kept = read_suites(out / "eval.json")
    assert kept["second"]["a"] == 1 and kept["second"]["dtype"] == "float32"
    assert kept["ppl"] == {"length": 9, "texts": {}, "rows": [], "kl": None, "recall": []}, "an older format's"
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(out, ["first"], settings)


def test_needles_are_drawn_beside_the_results(out, settings, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "needle", lambda *_: card_results.needles())
    evaluate(out, ["needle"], settings)
    assert (out / "needle.png").stat().st_size > 10_000


def test_a_damaged_eval_json_is_not_replaced(out, settings):
    (out / "eval.json").write_text('{"format": 2, "suites": {"needle": {')
    with pytest.raises(NsaError, match=r"eval.json is damaged"):
        evaluate(out, ["ppl"], settings)
    assert "needle" in (out / "eval.json").read_text()


@pytest.mark.parametrize("names", [["none"], []])
def test_suites_that_there_are_not(names, out):
    with pytest.raises(NsaError, match="--suite takes ppl"):
        evaluate(out, names)


def test_generation_is_greedy_whatever_the_checkpoint_asks_for(out):
    (out / "generation_config.json").write_text(
        '{"repetition_penalty": 1.3, "do_sample": true, "eos_token_id": [1, 7]}'
    )
    config = Subject.load(out, "cpu", "float32").model.generation_config
    assert config.repetition_penalty in (None, 1.0) and not config.do_sample and config.eos_token_id == [1, 7]


def test_lengths_that_the_model_can_hold(out):
    subject = Subject.load(out, "cpu", "float32")
    assert subject.lengths(Settings()) == [4096]
    assert subject.lengths(Settings(lengths=(100, 4096))) == [100, 4096]
    with pytest.raises(NsaError, match=r"4,096 positions, and lengths of 8,192, 9,000 .*--rope-scaling yarn:3"):
        subject.lengths(Settings(lengths=(100, 8192, 9000)))
    with pytest.raises(NsaError, match=r"4,096 positions, and lengths of 5,000 .* give a shorter --length,"):
        perplexity(subject, Settings(length=5000))
    longer = Subject.load(out, "cpu", "float32", "yarn:2")
    assert longer.lengths(Settings()) == [4096, 8192]
    assert longer.model.config.rope_parameters["rope_type"] == "yarn"
    with pytest.raises(NsaError, match="--samples must be at least 1"):
        Settings(samples=0)
