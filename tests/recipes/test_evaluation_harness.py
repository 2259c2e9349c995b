"""lm-eval on a tiny model, with a task of this test's own: nothing is downloaded."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_runs import converted

from nsa_hf.errors import NsaError
from nsa_hf.recipes.evaluation.harness import figures_of, render_harness, task_manager
from nsa_hf.recipes.evaluation.subject import Settings
from nsa_hf.recipes.evaluation.suites import evaluate

TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: "DATA"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": "word " * 30 + str(n), "choices": [" a", " b"], "label": n % 2} for n in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tiny.yaml").write_text(TASK.replace("DATA", str(folder / "rows.jsonl")))
    return folder


def test_a_local_task_runs_both_ways(tiny_dense_dir, tiny_sizes, tmp_path, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes)
    settings = Settings(tasks=("tiny_choices",), include_path=tasks, limit=3)
    measured = evaluate(out, ["lm-eval"], settings)["suites"]["lm-eval"]
    assert [(row["task"], row["metric"]) for row in measured["rows"]] == [("tiny_choices", "acc")]
    (row,) = measured["rows"]
    assert 3 * row["dense"] == pytest.approx(round(3 * row["dense"])), "three questions"
    assert 0 <= row["sparse"] <= 1 and row["sparse_error"] is not None
    assert next(render_harness(measured, "name")).row_count == 1


def test_a_task_that_there_is_not(tasks, monkeypatch):
    """lm-eval's own, thousands, are left out here."""
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    asked = []

    def manager(include_path, include_defaults):
        asked.append(include_defaults)
        return real(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    with pytest.raises(NsaError, match="lm-eval has no task no_such_task"):
        task_manager(Settings(tasks=("tiny_choices", "no_such_task"), include_path=tasks))
    assert asked == [False, True]
    assert task_manager(Settings(tasks=("tiny_choices",), include_path=tasks)) is not None
    assert asked == [False, True, False]


def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(NsaError, match="needs --tasks"):
        evaluate(tmp_path, ["ppl", "lm-eval"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("nsa_hf.recipes.evaluation.suites.find_spec", lambda name: None)
    with pytest.raises(NsaError, match=r"pip install 'nsa-hf\[lm-eval\]'"):
        evaluate(tmp_path, ["lm-eval"], Settings(tasks=("a",)))


def test_figures_have_their_errors():
    results = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A"}}
    assert figures_of(results) == {("a", "acc"): (0.5, 0.1), ("a", "em, strict"): (1.0, None)}
