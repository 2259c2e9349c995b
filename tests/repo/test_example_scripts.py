"""The examples run, with a tiny model in the place of the demo's, and print what they promise."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny_models import byte_tokenizer, tiny_dense_model

from nsa_hf.errors import NsaError
from nsa_hf.recipes import examples

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all of them, so that a model is converted once."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def run_example(work, tiny_dense_dir, monkeypatch, capsys):
    """Runs a script in this process with a tiny model, and gives what it printed."""

    def run(name: str, *arguments: str, model: Path = tiny_dense_dir) -> str:
        monkeypatch.chdir(work)
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", [name, str(model), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def test_convert_and_generate(run_example) -> None:
    text = run_example("convert_and_generate.py", "--prompt-tokens", "1100", "--new-tokens", "2")
    assert number(r"up to token 1,024: ([\d.e+-]+)", text) < 1e-3
    assert "sparse" in text and "dense: " in text


def test_each_model_has_a_folder_of_its_own(run_example, work, tiny_dense_dir) -> None:
    other = work / "other"
    tiny_dense_model(num_hidden_layers=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    short = ["convert_and_generate.py", "--prompt-tokens", "20", "--new-tokens", "1"]
    run_example(*short)
    run_example(*short, model=other)
    folders = [work / "demo/examples" / f"{name}-nsa" for name in (tiny_dense_dir.name, "other")]
    assert [json.loads((out / "config.json").read_text())["num_hidden_layers"] for out in folders] == [3, 1]
    with pytest.raises(NsaError, match=r"was converted from .*, not from .*other: remove it, or give another folder"):
        run_example(*short, "--out", str(folders[0]), model=other)


def test_the_demos_model_is_the_same_from_every_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "demo/source").mkdir(parents=True)
    (tmp_path / "examples").mkdir()
    monkeypatch.setattr(examples, "fetch_source", lambda work: work / "source")
    for start, work in ((tmp_path, "demo"), (tmp_path / "examples", "../demo")):
        monkeypatch.chdir(start)
        source, out = examples.source_and_folder("", work=Path(work))
        assert (source, out) == (str(tmp_path / "demo/source"), Path(work) / "examples/nsa")
    assert examples.source_and_folder("owner/name")[0] == "owner/name"


def test_long_question(run_example, work) -> None:
    text = run_example("long_question.py", "--tokens", "1200", "--new-tokens", "2")
    block = number(r"the sentence is in block (\d+)", text)
    # "user: " and 40 % of 1,200 bytes stand before it
    assert block == (480 + len("user: ") + 2) // 64
    assert (work / "demo/examples/blocks.png").stat().st_size > 1000


def test_finetune_lora(run_example, work) -> None:
    pytest.importorskip("peft")
    out = work / "lora" / "nsa"
    theirs = [out.with_name(name) / "kept" for name in ("adapter", "merged")]
    for file in theirs:
        file.parent.mkdir(parents=True)
        file.write_text("of the user's")
    arguments = ["finetune_lora.py", "--out", str(out), "--length", "1088", "--steps"]
    text = run_example(*arguments, "2")
    assert number(r"logits differ by ([\d.e+-]+)", text) < 1e-3
    assert number(r"([\d.]+) after", text) < number(r"([\d.]+) before", text)
    with pytest.raises(SystemExit, match="nsa-adapter is there already: give --overwrite"):
        run_example(*arguments, "1")
    assert number(r"logits differ by ([\d.e+-]+)", run_example(*arguments, "1", "--overwrite")) < 1e-3
    assert all(file.read_text() == "of the user's" for file in theirs)


def test_compare_selectors(run_example, work, tiny_dense_dir) -> None:
    text = run_example("compare_selectors.py", "--length", "1088")
    assert all(name in text for name in ("channels, 8 bits", "compressed keys", "KL"))
    made = work / "demo/examples" / f"{tiny_dense_dir.name}-selectors"
    rows = [
        json.loads((made / name / "eval.json").read_text())["suites"]["ppl"]["rows"]
        for name in ("channels-8-bits", "compressed-keys")
    ]
    # up to 1,024 tokens both are dense attention; beyond they choose differently
    assert all(way[0]["kl"] < 1e-6 for way in rows)
    assert rows[0][-1]["kl"] != rows[1][-1]["kl"]


def test_the_tour_runs(work, tiny_dense_dir, monkeypatch, capsys) -> None:
    import matplotlib

    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells[0]["metadata"]["tags"] == ["parameters"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    (work / "examples").mkdir()
    monkeypatch.chdir(work / "examples")  # where Jupyter starts it
    names = {"MODEL": str(tiny_dense_dir), "WORK": "../demo/tour"}
    for cell in cells[1:]:
        exec(compile("".join(cell["source"]), f"{cell['id']} of tour.ipynb", "exec"), names)
    assert "exact: True" in capsys.readouterr().out
    assert (work / f"demo/tour/examples/{tiny_dense_dir.name}-nsa/manifest.json").is_file()
    assert not list((work / "examples").iterdir())
