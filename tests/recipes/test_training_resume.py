"""Runs that are started again: finished, stopped, killed, with other settings or text, damaged, twice at once."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from functools import cache
from pathlib import Path

import pytest
from processes import Run, started_run
from safetensors.torch import load_file, save_file
from tiny_families import SIZES, tiny_dense
from tiny_models import byte_tokenizer
from tiny_runs import converted, folder_hashes, result_of, tiny_run, write_texts

from nsa_hf.conversion.files.hashes import hash_file
from nsa_hf.errors import NsaError
from nsa_hf.recipes.training import sources
from nsa_hf.recipes.training.checkpoints import Checkpoints, damage_of
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


STEPS = {None: 12, "ddp": 8, "fsdp2": 8}  # by file of recipes/accelerate
LINE = re.compile(r"^step \d+/", re.MULTILINE)


def killed_run(model: Path, texts: Path, out: Path, way: str | None):
    """Two stages, with a checkpoint after each step."""
    trains = "lora" if way == "fsdp2" else "nsa"
    stages = [{"steps": 3, "accumulate": 2, "trains": trains}, {"steps": STEPS[way] - 3, "schedule": "wsd"}]
    return tiny_run(model, texts, out, stages=stages, save_every=1)


@pytest.fixture(scope="module")
def undisturbed(nsa_dir, texts, tmp_path_factory):
    """The folder of a run that nobody killed, by way; each is made when it is first asked for."""

    @cache
    def of(way: str | None) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        config = killed_run(nsa_dir, texts, folder / "out", way)
        with started_run(config, folder, way) as run:
            run.finish()
        return Path(config.out)

    return of


def steps_taken(count: int):
    """Whether a started run has printed so many steps."""
    return lambda said: len(LINE.findall(said)) >= count


def kill_within_a_step(run: Run, work: Path, chance: random.Random) -> str:
    run.wait_until(steps_taken(chance.randint(1, 2)))
    time.sleep(chance.random() / 10)
    run.kill()
    return going_on_from(work)


def kill_while_a_checkpoint_is_written(run: Run, work: Path, chance: random.Random) -> str:
    run.wait_until(steps_taken(chance.randint(1, 2)))
    run.wait_until(lambda said: any(work.glob("checkpoints/.step-*.unfinished/*")))
    run.kill()
    return going_on_from(work)


def kill_and_damage(run: Run, work: Path, chance: random.Random) -> str:
    """The newest checkpoint loses half of its largest file, as on a disk that had not written all."""
    run.wait_until(steps_taken(3))
    run.kill()
    newest = max(work.glob("checkpoints/step-*"))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    return f"{newest} is damaged ({largest.relative_to(newest)} not as written): {going_on_from(work)}"


def going_on_from(work: Path) -> str:
    """What the next start says."""
    whole = [path for path in work.glob("checkpoints/step-*") if damage_of(path) is None]
    return f"going on from {max(whole)}" if whole else ""


@pytest.mark.parametrize(
    ("way", "seed", "kills"),
    [
        (None, 0, [kill_within_a_step, kill_while_a_checkpoint_is_written]),
        (None, 1, [kill_while_a_checkpoint_is_written, kill_and_damage]),
        (None, 2, [kill_and_damage, kill_within_a_step]),
        ("ddp", 3, [kill_while_a_checkpoint_is_written]),
        ("fsdp2", 4, [kill_and_damage]),
    ],
)
def test_killed_at_random_it_ends_with_the_same_bits(nsa_dir, texts, tmp_path, undisturbed, way, seed, kills):
    chance = random.Random(seed)
    config = killed_run(nsa_dir, texts, tmp_path / "out", way)
    out, work, says = Path(config.out), Path(config.out + ".unfinished"), ""
    for kill in kills:
        with started_run(config, tmp_path, way) as run:
            says, said_before = kill(run, work, chance), says
        assert said_before in run.log.read_text()
        assert not out.exists() and work.exists(), f"{kill.__name__} came too late: {run.log.read_text()}"
    with started_run(config, tmp_path, way) as run:
        assert says in run.finish()
    same = undisturbed(way)
    assert (out / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    figures = ("step", "loss", "ce", "kl", "grad_norm", "lr_nsa", "lr_backbone", "gates")
    curves = [[{key: row[key] for key in figures} for row in result_of(folder)["curve"]] for folder in (out, same)]
    assert curves[0] == curves[1]
    assert result_of(out)["held_out"] == result_of(same)["held_out"]
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result_of(out)["curve"]
    assert not work.exists()


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


def test_a_run_goes_on_in_the_middle_of_mixed_texts_and_lengths(nsa_dir, texts, tmp_path, stopped):
    short = write_texts(tmp_path / "short", count=9, words=12, seed=3)
    settings = {
        "data": [{"source": str(texts), "weight": 2}, {"source": str(short)}],
        "length": [{"length": 128, "weight": 1}, {"length": 64, "weight": 1}],
        "steps": 6,
        "accumulate": 2,
        "save_every": 1,
    }
    whole = train(tiny_run(nsa_dir, texts, tmp_path / "whole", **settings))
    config = tiny_run(nsa_dir, texts, tmp_path / "out", **settings)
    for at in (1, 4):
        stopped(config, at)
    assert (train(config) / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


class Uploads:
    """A data set of the Hub whose rows change with each upload, as `datasets` streams it."""

    commit = 1

    def load_dataset(self, name, config, *, revision, **options):
        letter = chr(96 + int(revision))
        self.rows = [{"text": f"{letter}{number} " * 100} for number in range(6)]
        return self

    def shuffle(self, seed, buffer_size):
        return self.rows

    def take(self, count):
        return self.rows[:count]


def test_an_upload_to_the_hub_does_not_lose_a_run(nsa_dir, tmp_path, stopped, monkeypatch, capsys):
    """It goes on with the commits that it began with; another run reads the new ones."""
    hub = Uploads()
    monkeypatch.setattr(sources, "import_datasets", lambda: hub)
    monkeypatch.setattr(sources, "hub_revision", lambda name, revision: str(hub.commit))
    data, held_out = "hub:owner/texts", "hub:owner/texts:test"
    settings = {"held_out": held_out, "steps": 2, "save_every": 1}
    whole, config = (tiny_run(nsa_dir, data, tmp_path / name, **settings) for name in ("whole", "out"))
    train(whole)
    work = stopped(config, at=1)
    hub.commit = 2
    assert json.loads((work / "run.json").read_text())["revisions"] == {data: "1", held_out: "1"}
    out = train(config)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert result_of(out)["revisions"] == {data: "1", held_out: "1"}
    capsys.readouterr()
    train(config)
    assert "finished: nothing to do" in capsys.readouterr().out
    with pytest.raises(NsaError, match="the training text, data=hub:owner/texts, has changed"):
        (out / "training.json").write_text((out / "training.json").read_text().replace('"revisions"', '"others"'))
        train(config)


def test_how_often_it_is_saved_changes_no_weight_of_a_model_with_dropout(tmp_path, texts):
    dense = tmp_path / "dense"
    tiny_dense("phi3", vocab_size=256, resid_pdrop=0.1).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    model = converted(dense, tmp_path / "nsa", SIZES)
    often, seldom, other = (
        train(tiny_run(model, texts, tmp_path / f"out{number}", steps=2, save_every=every, seed=seed))
        for number, (every, seed) in enumerate([(1, 0), (2, 0), (1, 1)])
    )
    assert (often / "model.safetensors").read_bytes() == (seldom / "model.safetensors").read_bytes()
    assert (often / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


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
