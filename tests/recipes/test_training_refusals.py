"""What a run refuses before its first step or after its last, and how `python -m nsa_hf.recipes.train` says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, tiny_dense_model
from tiny_runs import converted, tiny_run
from transformers import AutoTokenizer

from nsa_hf.errors import NsaError
from nsa_hf.recipes.train import main
from nsa_hf.recipes.training.loop import run_steps, train


def test_a_folder_with_something_else_is_left_alone(nsa_dir, texts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NsaError, match="not empty"):
        train(tiny_run(nsa_dir, texts, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(NsaError):
        train(tiny_run(nsa_dir, texts, nsa_dir))


def test_what_cannot_be_trained_is_named(nsa_dir, texts, tmp_path, tiny_dense_dir):
    for settings, message in [
        ({"gate_blend_steps": 2}, "gate_blend_steps needs nsa_gate 'blend', the model has 'residual'"),
        ({"model": str(tiny_dense_dir)}, r"holds a dense model"),
        ({"model": str(tmp_path / "none")}, "none does not exist"),
        ({"length": 4000}, "tokens"),
        ({"data": str(tmp_path / "nowhere")}, "no text at"),
        ({"lr_nsa": 1e30, "lr_backbone": 1e30}, "the loss is not finite at step"),
    ]:
        with pytest.raises(NsaError, match=message):
            train(tiny_run(**{"model": nsa_dir, "texts": texts, "out": tmp_path / f"o{len(message)}", **settings}))


def test_what_saving_or_a_step_would_stop_at_is_refused_before_the_first(nsa_dir, texts, tmp_path):
    (tmp_path / "secret").write_text("mine")
    linked = Path(shutil.copytree(nsa_dir, tmp_path / "linked"))
    (linked / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(NsaError, match="LICENSE is a link out of its folder"):
        train(tiny_run(linked, tmp_path / "no text", tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(nsa_dir)
    tokenizer.add_tokens(["beyond"])
    other = Path(shutil.copytree(nsa_dir, tmp_path / "other"))
    tokenizer.save_pretrained(other)
    (tmp_path / "data.txt").write_text("and beyond it, " * 100)
    with pytest.raises(NsaError, match="the tokenizer gives token 256, and the model's vocabulary ends at 255"):
        train(tiny_run(other, texts, tmp_path / "out", data=str(tmp_path / "data.txt")))
    assert not list(tmp_path.glob("out*"))


def test_attention_dropout_is_refused_before_anything_is_computed(tmp_path, tiny_sizes, texts, monkeypatch):
    dense = tiny_dense_model(attention_dropout=0.1)
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    model = converted(tmp_path / "dense", tmp_path / "nsa", tiny_sizes)
    monkeypatch.setattr("nsa_hf.recipes.training.held_out.compare", None)
    with pytest.raises(NsaError, match=r"attention_dropout is 0.1, .* has no dropout: set it to 0"):
        train(tiny_run(model, texts, tmp_path / "out"))
    assert not (tmp_path / "out.unfinished").exists()


def test_weights_that_give_nan_are_named(nsa_dir, texts, tmp_path, monkeypatch):
    """Before training, and after it, when the last step was one too far."""
    model = shutil.copytree(nsa_dir, tmp_path / "nsa")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match=r"logits are not finite \(positions 0-64, 64-128\)"):
        train(tiny_run(model, texts, tmp_path / "out"))
    steps = run_steps

    def too_far(prepared, *others):
        steps(prepared, *others)
        prepared.student.get_input_embeddings().weight.data.fill_(float("inf"))

    monkeypatch.setattr("nsa_hf.recipes.training.loop.run_steps", too_far)
    with pytest.raises(NsaError, match="logits are not finite"):
        train(tiny_run(nsa_dir, texts, tmp_path / "out", save_every=0))
    assert [path.name for path in tmp_path.iterdir()] == ["nsa"]


def test_main_prints_errors_without_a_traceback(tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text("model: a\nout: b\n")
    for arguments, message in [
        ([], "give a run file"),
        ([str(tmp_path / "none.yaml")], "no run file"),
        ([str(run), "stpes=1"], "did you mean steps?"),
        ([str(tmp_path)], "cannot read the run file"),
        ([str(run), "steps='"], "cannot read the value of steps"),
    ]:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert message in captured.err
        assert "Traceback" not in captured.err
        assert captured.err.count("\n") == 1


def test_main_ends_quietly_on_ctrl_c(nsa_dir, texts, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(tiny_run(nsa_dir, texts, tmp_path / "out").as_dict()))
    monkeypatch.setattr("nsa_hf.recipes.training.held_out.compare", interrupted)
    assert main([str(run)]) == 130
    assert "stopped: the same command goes on" in capsys.readouterr().err
