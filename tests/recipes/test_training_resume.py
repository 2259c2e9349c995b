"""Runs that are started again: finished, stopped, killed, with other settings or text, damaged, twice at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_runs import folder_hashes, result_of, tiny_run, write_texts

from nsa_hf.conversion.files.hashes import hash_file
from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.checkpoints import Checkpoints
from nsa_hf.recipes.training.loop import run_steps, train


def test_a_finished_run_is_not_run_again(finished, capsys):
    out, config, _ = finished
    before = folder_hashes(out)
    assert train(config) == out
    assert "finished: nothing to do" in capsys.readouterr().out
    assert folder_hashes(out) == before


def test_other_settings_do_not_go_into_a_finished_folder(finished, nsa_dir, texts):
    out = finished[0]
    with pytest.raises(NsaError, match=r"steps: 4 -> 5.*give another out="):
        train(tiny_run(nsa_dir, texts, out, steps=5))


def start(config, folder: Path) -> subprocess.Popen:
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump(config.as_dict()))
    command = [sys.executable, "-m", "nsa_hf.recipes.train", str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def test_killed_and_started_again_it_ends_with_the_same_weights(nsa_dir, texts, tmp_path):
    settings = {"steps": 7, "save_every": 2, "accumulate": 2}
    undisturbed = train(tiny_run(nsa_dir, texts, tmp_path / "undisturbed", **settings))
    config = tiny_run(nsa_dir, texts, tmp_path / "disturbed", **settings)
    out, work = Path(config.out), Path(config.out + ".unfinished")
    first_steps = []
    for kill_at in ("step 3/7", "step 6/7", None):
        process = start(config, tmp_path)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if kill_at and line.startswith(kill_at):
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == (-signal.SIGKILL if kill_at else 0)
        assert out.exists() == (kill_at is None)
        assert work.exists() == (kill_at is not None)
        first_steps.append(next(line.split()[1] for line in lines if line.startswith("step ")))
    # it went on, and did not start over
    assert first_steps == ["1/7", "3/7", "5/7"] or first_steps == ["1/7", "3/7", "7/7"]
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    figures = ("step", "loss", "ce", "kl", "grad_norm", "lr_nsa", "lr_backbone")
    curves = [
        [{key: row[key] for key in figures} for row in result_of(folder)["curve"]] for folder in (out, undisturbed)
    ]
    assert curves[0] == curves[1]
    assert result_of(out)["held_out"] == result_of(undisturbed)["held_out"]


@pytest.fixture
def stopped(monkeypatch):
    """Runs a run until it has saved a checkpoint at step `at`, and stops it there."""

    def run_until(config, at):
        save = Checkpoints.save

        def save_and_stop(self, accelerator, step, state):
            save(self, accelerator, step, state)
            if step == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Checkpoints, "save", save_and_stop)
            train(config)
        return Path(f"{config.out}.unfinished")

    return run_until


def test_an_unfinished_run_is_not_continued_with_other_settings(nsa_dir, texts, tmp_path, stopped, capsys):
    stopped(tiny_run(nsa_dir, texts, tmp_path / "out"), at=2)
    assert "stopped: the same command goes on from the last checkpoint" in capsys.readouterr().err
    with pytest.raises(NsaError, match=r"lr_nsa: 0.01 -> 0.02"):
        train(tiny_run(nsa_dir, texts, tmp_path / "out", lr_nsa=0.02))


def edit_text(model, texts, held_out):
    (texts / "3.txt").write_text((texts / "3.txt").read_text().replace("which", "witch"))


def edit_held_out(model, texts, held_out):
    (held_out / "0.txt").write_text("a" + (held_out / "0.txt").read_text()[1:])


def edit_tokenizer(model, texts, held_out):
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    path.write_text(json.dumps(tokenizer))


def edit_weights(model, texts, held_out):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def edit_config(model, texts, held_out):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "nsa_topk": config["nsa_topk"] + 1}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_text, "the training text, data=.* has changed"),
        (edit_held_out, "the held-out text, held_out=.* has changed"),
        (edit_tokenizer, "the tokenizer in .* has changed"),
        (edit_weights, "the weights in .* have changed"),
        (edit_config, "config.json in .* has changed"),
    ],
)
def test_a_run_goes_on_only_with_what_it_began_with(nsa_dir, tmp_path, stopped, edit, message):
    model = shutil.copytree(nsa_dir, tmp_path / "nsa")
    texts, held_out = write_texts(tmp_path / "texts"), write_texts(tmp_path / "held_out", seed=1)
    config = tiny_run(model, texts, tmp_path / "out", held_out=str(held_out))
    stopped(config, at=2)
    edit(model, texts, held_out)
    with pytest.raises(NsaError, match=message):
        train(config)
    assert not Path(config.out).exists()


def test_a_damaged_checkpoint_is_not_gone_on_from(nsa_dir, texts, tmp_path, stopped, capsys, finished):
    """It ends with the weights of an undisturbed run all the same."""
    config = tiny_run(nsa_dir, texts, tmp_path / "out", save_every=1)
    work = stopped(config, at=3)
    for file in ("model.safetensors", "optimizer.bin"):
        path = work / "checkpoints" / "step-00000003" / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    out = train(config)
    said = capsys.readouterr()
    assert "step-00000003 is damaged (model.safetensors, optimizer.bin not as written)" in said.err
    assert f"going on from {work / 'checkpoints' / 'step-00000002'}" in said.out
    assert (out / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_a_state_of_more_steps_than_the_run_has_ends_nothing(nsa_dir, texts, tmp_path, stopped):
    config = tiny_run(nsa_dir, texts, tmp_path / "out")
    checkpoint = stopped(config, at=2) / "checkpoints" / "step-00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "step": 99}))
    with pytest.raises(NsaError, match=r"damaged \(step-00000002: state.json not as written\)"):
        train(config)
    # and when all that says so agrees
    noted = json.loads((checkpoint / "files.json").read_text())
    noted["files"]["state.json"] = hash_file(checkpoint / "state.json")
    (checkpoint / "files.json").write_text(json.dumps(noted))
    checkpoint.rename(checkpoint.with_name("step-00000099"))
    with pytest.raises(NsaError, match="step-00000099 says that 99 of 4 steps are done"):
        train(config)
    assert not Path(config.out).exists()


def test_two_at_once_on_one_out(nsa_dir, texts, tmp_path, monkeypatch):
    config = tiny_run(nsa_dir, texts, tmp_path / "out")
    steps = run_steps

    def the_other_comes(*args):
        with pytest.raises(NsaError, match=r"another process trains .*out now: wait until it is done"):
            train(config)
        steps(*args)

    monkeypatch.setattr("nsa_hf.recipes.training.loop.run_steps", the_other_comes)
    assert [row["step"] for row in result_of(train(config))["curve"]] == [1, 2, 3, 4]
