import csv
import json

import card_results
import pytest

from nsa_hf.recipes.benchmarks.answers import main

RAN = {"rope_scaling": "yarn:4", "dtype": "bfloat16", "device": "cuda"}
MACHINE = {"hardware": {"gpus": ["A GPU"], "cpu": "a CPU"}, "versions": {"torch": "2.11.0", "transformers": "5.17.0"}}


def test_every_answer_is_a_row(tmp_path):
    evaluation = card_results.evaluation()
    for result in evaluation["suites"].values():
        result.update(RAN, **MACHINE)
    folder = tmp_path / "adapt-10m"
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(evaluation))
    main(["--csv", str(tmp_path / "a.csv"), "--commit", "abc", str(folder)])
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["suite"] for row in rows] == ["needle"] * 12 + ["ruler", "lm-eval"]
    lost = next(row for row in rows if row["sparse"] == "0")
    assert (lost["model"], lost["task"], lost["tokens"], lost["depth"], lost["dense"], lost["sparse_nll"]) == (
        ("adapt-10m", "single", "8192", "1", "1", "0.02")
    )
    assert (rows[-2]["task"], rows[-2]["prompts"], rows[-2]["dense"], rows[-2]["depth"]) == ("vt", "20", "0.85", "")
    assert (rows[-1]["figure"], rows[-1]["sparse"]) == ("acc", "0.6")
    assert {(row["device"], row["rope_scaling"], row["commit"]) for row in rows} == {("A GPU", "yarn:4", "abc")}


def test_a_folder_without_answers_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--csv", str(tmp_path / "a.csv"), str(tmp_path)])
    assert "has none of the suites needle, ruler, lm-eval" in capsys.readouterr().err
