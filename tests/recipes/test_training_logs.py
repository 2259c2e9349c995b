"""recipes/training/logs.py: log.jsonl, trackers, and the picture of the curve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from accelerate import tracking
from tiny_runs import result_of, stop_at, tiny_run

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training import logs
from nsa_hf.recipes.training.checkpoints import Checkpoints
from nsa_hf.recipes.training.loop import train


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_step_is_a_line(finished):
    out = finished[0]
    rows = lines_of(out)
    assert rows == result_of(out)["curve"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == [128, 256, 384, 512]
    assert {"stage", "loss", "ce", "kl", "lr_nsa", "lr_backbone", "grad_norm", "tokens_per_second"} <= rows[0].keys()
    assert all(0 <= row["waited"] < row["seconds"] for row in rows)
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")


def test_gates_are_looked_at_where_a_checkpoint_is_written(finished, nsa_dir, texts, tmp_path):
    rows = lines_of(finished[0])
    assert ["gates" in row for row in rows] == [False, True, False, True]
    means = rows[-1]["gates"]
    assert means.keys() == {"0", "1", "2"} and means["0"].keys() == {"compressed", "selected", "window"}
    # they began as 0, 1, 0
    assert 0.5 < means["0"]["selected"] != 1.0
    assert 0 != abs(means["0"]["window"]) < 0.5
    closed = train(tiny_run(nsa_dir, texts, tmp_path / "out", lr_nsa=0.0, steps=2))
    assert not any("gates" in row for row in lines_of(closed))


def test_the_log_is_there_while_the_run_goes_on(nsa_dir, texts, tmp_path, monkeypatch):
    """And what was written behind the last checkpoint is written once in the end."""
    config = tiny_run(nsa_dir, texts, tmp_path / "out")
    log, add = Path(f"{config.out}.unfinished") / "log.jsonl", logs.Log.add

    def stop_at_three(self, row):
        add(self, row)
        if row["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logs.Log, "add", stop_at_three)
        train(config)
    assert [row["step"] for row in lines_of(log.parent)] == [1, 2, 3]
    log.write_text(log.read_text() + '{"step": 4, "lo')  # and a line that was not written to its end
    assert [row["step"] for row in lines_of(train(config))] == [1, 2, 3, 4]
    assert not log.parent.exists()


class Tracker(tracking.GeneralTracker):
    """Keeps what it is given."""

    name, requires_logging_directory = "kept", True
    all: list[Tracker] = []  # noqa: RUF012

    def __init__(self, run_name, logging_dir, **options):
        super().__init__()
        self.run_name, self.folder, self.options = run_name, logging_dir, options
        self.config, self.steps, self.finished = None, {}, False
        self.all.append(self)

    tracker = None

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **options):
        self.steps[step] = values

    def finish(self):
        self.finished = True


class WithoutFolder(Tracker):
    """As W&B's is made."""

    requires_logging_directory = False

    def __init__(self, run_name, **options):
        super().__init__(run_name, None, **options)


@pytest.fixture
def trackers(monkeypatch):
    """Both trackers, which only keep what they are given; gives all that are made."""
    for name, kind in {"tensorboard": Tracker, "wandb": WithoutFolder}.items():
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        monkeypatch.setitem(logs.TRACKERS, name, ("json",))
    monkeypatch.setattr(tracking, "_available_trackers", [*map(tracking.LoggerType, ("tensorboard", "wandb"))])
    monkeypatch.setattr(Tracker, "all", [])
    return Tracker.all


def test_wandb_knows_each_run_by_an_id_of_its_own(nsa_dir, texts, tmp_path, trackers):
    """The same for a run that goes on; another for the same settings elsewhere, and for a run begun anew."""
    config = tiny_run(nsa_dir, texts, tmp_path / "out", trackers=["wandb"], steps=2, save_every=1)
    stop_at(config, 1)
    train(config)
    shutil.rmtree(config.out)
    train(config)
    train(tiny_run(nsa_dir, texts, tmp_path / "other", trackers=["wandb"], steps=2, save_every=1))
    first, second, anew, other = (tracker.options for tracker in trackers)
    assert first == second
    assert len({first["id"], anew["id"], other["id"]}) == 3
    assert [options["name"] for options in (first, anew, other)] == ["out", "out", "other"]
    assert {tracker.run_name for tracker in trackers} == {"nsa-hf"}


def test_trackers_get_each_step_and_go_on_where_the_run_does(nsa_dir, texts, tmp_path, monkeypatch, trackers):
    config = tiny_run(nsa_dir, texts, tmp_path / "out", trackers=["tensorboard"])
    save = Checkpoints.save

    def stop(self, *others):
        save(self, *others)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", stop)
        train(config)
    train(config)
    first, second = trackers
    assert first.run_name == second.run_name == "nsa-hf"
    assert first.folder == second.folder == str(tmp_path / "out.trackers")
    assert (first.options, second.options) == ({"purge_step": 1}, {"purge_step": 3})
    assert first.config["lr_backbone"] == 1e-3 and first.config["trackers"] == '["tensorboard"]'
    assert second.config is None
    assert (list(first.steps), list(second.steps)) == ([1, 2], [3, 4])
    assert {"loss", "kl", "gates/0/selected"} <= second.steps[4].keys()
    assert all(isinstance(value, float | int) for value in second.steps[4].values())
    assert second.finished and not (tmp_path / "out" / "out.trackers").exists()


def test_a_tracker_that_is_not_there_is_named(nsa_dir, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(NsaError, match=f"trackers: {name} needs the package `{name}`: pip install {name}"):
            train(tiny_run(nsa_dir, texts, tmp_path / "out", trackers=[name]))
    with pytest.raises(NsaError, match="trackers are tensorboard and wandb, got 'excel'"):
        train(tiny_run(nsa_dir, texts, tmp_path / "out", trackers=["excel"]))
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_is_no_picture_and_it_is_said_last(nsa_dir, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", steps=1))
    assert not (out / "training.png").exists() and len(lines_of(out)) == 1
    *_, figures, last = capsys.readouterr().out.splitlines()
    assert figures == f"trained model: {out}"
    assert last.startswith("no training.png, since matplotlib is not installed")
