"""RULER's tasks as they are made here, and its own rows as they are read."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter

import pytest
from tiny_models import byte_tokenizer
from tiny_runs import converted

from nsa_hf.errors import NsaError
from nsa_hf.recipes.evaluation import answers
from nsa_hf.recipes.evaluation.haystack import Haystack
from nsa_hf.recipes.evaluation.ruler import render_ruler, ruler
from nsa_hf.recipes.evaluation.ruler_tasks import TASKS, make_row, read_rows
from nsa_hf.recipes.evaluation.subject import Settings, Subject


def text() -> str:
    chance = random.Random(0)
    return " ".join("".join(chance.choices(string.ascii_lowercase, k=6)) for _ in range(400))


@pytest.fixture
def haystack():
    return Haystack(byte_tokenizer(), [("a", text())])


@pytest.mark.parametrize("task", list(TASKS))
def test_prompts_have_their_length_and_hold_the_answer(task, haystack):
    length = 6000
    row = make_row(task, haystack, length, "0")
    prompt, question = haystack.tokenizer.decode(row.question.prompt), row.question
    used = len(question.prompt) + question.new_tokens
    assert used == length if task != "cwe" else length - 60 < used <= length
    assert all(output in prompt for output in question.outputs)
    assert make_row(task, haystack, length, "0") == row != make_row(task, haystack, length, "1")
    with pytest.raises(NsaError, match="too short for the"):
        make_row(task, haystack, 200, "0")


def test_variables_follow_each_other(haystack):
    row = make_row("vt", haystack, 3000, "0")
    prompt = haystack.tokenizer.decode(row.question.prompt).split("Example")[1]
    value = re.search(r"variables have the value (\d+)", prompt).group(1)
    held = {}
    for name, source in re.findall(r"\nVAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d+)\n", prompt):
        held[name] = held.get(source, source)
    assert [name for name in held if held[name] == value] == row.question.outputs
    assert len(row.question.outputs) == 5


def test_common_words_are_the_most_common(haystack):
    row = make_row("cwe", haystack, 9000, "0")
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", haystack.tokenizer.decode(row.question.prompt)))
    assert {word for word, _ in counts.most_common(10)} == set(row.question.outputs)
    assert sorted(counts.values())[-10:] == [30] * 10 and set(counts.values()) == {30, 3}


def test_several_keys_and_one_is_asked_for(haystack):
    row = make_row("niah_multikey_1", haystack, 3000, "0")
    prompt = haystack.tokenizer.decode(row.question.prompt)
    assert len(re.findall(r"special numbers for \w+ is \d{7}", prompt)) == 4
    assert len(row.question.outputs) == 1
    assert len(make_row("niah_multiquery", haystack, 3000, "0").question.outputs) == 4


def test_official_rows_are_read(tmp_path):
    (tmp_path / "qa_1").mkdir()
    rows = [{"index": 0, "input": "abc", "outputs": ["x", "y"], "length": 4000, "answer_prefix": " d"}] * 3
    (tmp_path / "qa_1" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "vt.jsonl").write_text(json.dumps({"input": "e", "outputs": ["x"], "length": 7}))
    read = list(read_rows(tmp_path, byte_tokenizer(), 2))
    assert [(row.task, row.length, row.question.new_tokens) for row in read] == [("qa_1", 4000, 32)] * 2 + [
        ("vt", 7, 30)
    ]
    assert byte_tokenizer().decode(read[0].question.prompt) == "abc d"
    (tmp_path / "vt.jsonl").write_text('{"input": "e"}')
    with pytest.raises(NsaError, match=r"vt\.jsonl:1: expected a row with input, outputs and length"):
        list(read_rows(tmp_path / "vt.jsonl", byte_tokenizer(), None))
    with pytest.raises(NsaError, match="no RULER data"):
        list(read_rows(tmp_path / "none", byte_tokenizer(), None))


def test_the_suite_scores_what_is_generated(tiny_dense_dir, tiny_sizes, tmp_path, monkeypatch):
    subject = Subject.load(converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes), "cpu", "float32")
    for task in ("qa_2", "vt"):
        row = {"input": "abc", "outputs": ["x", "y"], "length": 100}
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row))
    contexts = list(subject.model.open_contexts())
    monkeypatch.setattr(
        answers, "generate", lambda subject, questions: ["it is X" if contexts[0].dense else "" for _ in questions]
    )
    settings = Settings(ruler_data=tmp_path)
    for file in tmp_path.glob("nsa/*.jsonl"):
        file.unlink()
    result = ruler(subject, settings)
    one, half = {"dense": 1.0, "sparse": 0.0}, {"dense": 0.5, "sparse": 0.0}
    assert result["rows"] == [
        {"task": "qa_2", "length": 128, "questions": 1, **one},
        {"task": "vt", "length": 128, "questions": 1, **half},
    ]
    assert next(render_ruler(result, "name")).row_count == 2
    row = {"input": "a" * 4090, "outputs": ["x"], "length": 4096}
    (tmp_path / "vt.jsonl").write_text(json.dumps(row))
    with pytest.raises(NsaError, match=r"a prompt of vt has 4,120 tokens .* 4,096 positions.*yarn:2"):
        ruler(subject, settings)


def test_the_suite_makes_prompts_and_generates(tiny_dense_dir, tiny_sizes, tmp_path, monkeypatch):
    subject = Subject.load(converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes), "cpu", "float32")
    (tmp_path / "text.txt").write_text(text())
    monkeypatch.setattr("nsa_hf.recipes.evaluation.ruler.TASKS", {"vt": TASKS["vt"]})
    result = ruler(subject, Settings(text=str(tmp_path / "text.txt"), lengths=(700,), samples=1))
    assert result["rows"] == [{"task": "vt", "length": 700, "questions": 1, "dense": 0, "sparse": 0}]
