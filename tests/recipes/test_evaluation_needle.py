"""Haystacks, what is asked of them, and how answers are scored."""

from __future__ import annotations

import pytest
import torch
from tiny_models import byte_tokenizer
from tiny_runs import converted, write_texts

from nsa_hf.errors import NsaError
from nsa_hf.recipes.evaluation import answers
from nsa_hf.recipes.evaluation.answers import Question, batches, contained, likelihoods
from nsa_hf.recipes.evaluation.haystack import Haystack, multiple, single
from nsa_hf.recipes.evaluation.needle import needle, render_needle
from nsa_hf.recipes.evaluation.subject import Settings, Subject

TEXT = "It rained all day and nobody came to the inn at the old road. "


@pytest.fixture
def haystack():
    return Haystack(byte_tokenizer(), [("a", TEXT * 3)])


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_stands_at_its_depth(haystack, depth):
    question = single(haystack, 700, depth, "seed")
    text = haystack.tokenizer.decode(question.prompt)
    (number,) = question.outputs
    assert len(question.prompt) + question.new_tokens == 700
    assert text.count(number) == 1 and text.endswith("is")
    assert haystack.tokenizer.decode(question.answer) == f" {number}"
    hay = text.split("asked for.\n")[1].split("\nWhat is")[0]
    before, after = hay.split(f"{number}.\n")
    before = before.rsplit("\nThe special", 1)[0]
    assert len(before) == round(depth * (len(before) + len(after)))
    assert before + after in (TEXT * 3 + "\n") * 9, "the text itself, again from its beginning where it ends"
    assert single(haystack, 700, depth, "other seed").outputs != question.outputs


def test_several_needles_stand_from_their_depth_on(haystack):
    question = multiple(haystack, 1200, 0.5, "seed")
    text = haystack.tokenizer.decode(question.prompt)
    places = [text.index(f"{number}.") for number in question.outputs]
    assert len(places) == 4 and places == sorted(places) and places[0] > 500
    assert haystack.tokenizer.decode(question.answer) == " " + ", ".join(question.outputs)
    with pytest.raises(NsaError, match="too short for the question"):
        multiple(haystack, 300, 0.5, "seed")


def test_what_an_answer_contains():
    assert contained(["12", "Abc", "7"], "abc and 127") == 1
    assert contained(["12", "Abc", "8"], "abc and 127") == pytest.approx(2 / 3)


def test_questions_of_one_length_are_read_together_on_a_gpu(monkeypatch):
    questions = [Question([0] * length, ["a"], [], 1) for length in (30, 20, 30, 30)]
    assert batches(questions, "cpu") == [[1], [0], [2], [3]]
    monkeypatch.setattr(answers, "TOKENS_AT_ONCE", 60)
    assert batches(questions, "cuda") == [[1], [0, 2], [3]]
    questions[2] = questions[2]._replace(new_tokens=5)
    assert batches(questions, "cuda") == [[1], [0, 3], [2]]


@torch.no_grad()
def test_likelihoods_are_those_of_whole_logits(tiny_nsa_model):
    model = tiny_nsa_model()
    ids = torch.randint(256, (3, 90), generator=torch.Generator().manual_seed(1)).tolist()
    questions = [Question(row[:80], ["a"], row[80 : 80 + n], 1) for row, n in zip(ids, (10, 3, 0), strict=True)]
    found = likelihoods(model, questions)
    for row, n, nll in zip(ids, (10, 3), found, strict=False):
        log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = -sum(log_p[79 + place, row[80 + place]] for place in range(n)) / n
        assert nll == pytest.approx(float(expected), rel=1e-4)
    assert found[2] is None


def test_the_suite_runs_both_ways(tiny_dense_dir, tiny_sizes, tmp_path, monkeypatch):
    """A sparse model that never finds anything loses every cell that dense finds."""
    out = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes)
    subject = Subject.load(out, "cpu", "float32")
    settings = Settings(text=str(write_texts(tmp_path / "texts", count=1)), lengths=(600,), depths=2, samples=1)
    plain = needle(subject, settings)
    assert [(c["kind"], c["depth"]) for c in plain["cells"]] == [
        (kind, depth) for kind in ("single", "multiple") for depth in (0, 1)
    ]
    assert all(
        cell[way]["found"] == 0 and cell[way]["nll"] > 0 for cell in plain["cells"] for way in ("dense", "sparse")
    )
    assert plain["cells"][0]["dense"]["nll"] != plain["cells"][0]["sparse"]["nll"]
    assert plain["lost"] == []

    contexts = list(subject.model.open_contexts())
    monkeypatch.setattr(
        answers,
        "generate",
        lambda subject, questions: [" ".join(q.outputs) if contexts[0].dense else "" for q in questions],
    )
    found = needle(subject, settings)
    assert len(found["lost"]) == 4
    assert next(render_needle(found, "name")).row_count == 2
