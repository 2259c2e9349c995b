"""lm-eval on a tiny model, with tasks of this test's own: nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_runs import converted, converted_and_opened
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.errors import NsaError
from nsa_hf.recipes.evaluation.harness import figures_of, render_harness, task_manager
from nsa_hf.recipes.evaluation.subject import Settings
from nsa_hf.recipes.evaluation.suites import evaluate

CHOICES = """
task: tiny_choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
ANSWERS = """
task: tiny_answers
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
generation_kwargs: {until: ["never"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TEXTS = """
task: tiny_texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: "ROWS"}}
test_split: test
"""
# lm-eval's program, but for its thousands of own tasks, which it takes seconds to list.
PROGRAM = """
import functools, sys
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

assert "nsa_hf" not in sys.modules
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
cli_evaluate()
"""


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    # 76 to 151 tokens, of which a batch pads all but one; 64 are exact
    rows = [{"question": "word " * (15 + 5 * n) + str(n), "choices": [" a", " b"], "label": n % 2} for n in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in {"choices": CHOICES, "answers": ANSWERS, "texts": TEXTS}.items():
        (folder / f"{name}.yaml").write_text(task + DATA.replace("ROWS", str(folder / "rows.jsonl")))
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


def test_its_own_command_line_gives_what_the_forward_pass_gives(tiny_dense_dir, tiny_sizes, tmp_path, tasks):
    """The three kinds of requests, in padded batches; the folder's own code makes lm-eval know the sparse classes."""
    folder = converted_and_opened(tiny_dense_dir, tmp_path / "nsa", tiny_sizes)
    arguments = {
        "--model": "hf",
        "--model_args": f"pretrained={folder},trust_remote_code=True",
        "--tasks": "tiny_choices,tiny_answers,tiny_texts",
        "--include_path": str(tasks),
        "--batch_size": "3",
        "--device": "cpu",
        "--output_path": str(tmp_path / "results"),
    }
    command = [sys.executable, "-c", PROGRAM, "run", *(part for pair in arguments.items() for part in pair)]
    caches = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([*command, "--log_samples"], env=os.environ | caches, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def log_likelihood(before: list[int], text: str) -> float:
        """That of `text` after the tokens `before`."""
        ids = torch.tensor([before + tokenizer(text).input_ids])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        return float(log_p.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum())

    def continued(text: str) -> str:
        """The six tokens that are likeliest one after another, or those before the end token."""
        ids = torch.tensor([tokenizer(text).input_ids])
        start = ids.shape[1]
        while ids.shape[1] < start + 6 and ids[0, -1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        return tokenizer.decode(ids[0, start:], skip_special_tokens=True)

    def samples(task: str) -> list[tuple[list[dict], list]]:
        """By document, what was asked and what was answered."""
        (file,) = (tmp_path / "results").glob(f"*/samples_{task}_*.jsonl")
        return [
            (list(row["arguments"].values()), [answer for (answer,) in row["resps"]])
            for row in map(json.loads, file.read_text().splitlines())
        ]

    for asked, answered in samples("tiny_choices"):
        wanted = [log_likelihood(tokenizer(one["arg_0"]).input_ids, one["arg_1"]) for one in asked]
        assert [float(value) for value, _ in answered] == pytest.approx(wanted, abs=1e-3)
    for (asked,), answered in samples("tiny_texts"):
        wanted = log_likelihood([tokenizer.bos_token_id], asked["arg_0"])
        assert [float(value) for value in answered] == pytest.approx([wanted], rel=1e-5)
    for (asked,), answered in samples("tiny_answers"):
        assert answered == [continued(asked["arg_0"])]
    assert sum(len(samples(task)) for task in ("tiny_choices", "tiny_answers", "tiny_texts")) == 12


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
