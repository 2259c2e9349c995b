"""conversion/files/staging.py: a folder that is there completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_hf.conversion.files.staging import (
    OutputError,
    Stage,
    check_output,
    resumable_folder,
    staged_folder,
    write_json,
)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and its text."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


CONFIG = '{"model_type": "llama"}'


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(CONFIG)
    (folder / "model.safetensors").write_text("old")
    return folder


@pytest.mark.parametrize("exists", [False, True])
def test_folder_appears_when_the_block_ends(tmp_path, exists):
    out = tmp_path / "new" / "out"
    if exists:
        out.mkdir(parents=True)
    with staged_folder(out) as stage:
        assert stage.parent.parent == out.parent
        (stage / "a").write_text("1")
        assert not (out / "a").exists()
    assert tree(out) == {"a": "1"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing_not_even_the_parents_it_made(tmp_path, error):
    with pytest.raises(type(error)), staged_folder(tmp_path / "new" / "deeper" / "out") as stage:
        (stage / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_holds_something_by_then_stays(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "new" / "out"):
        (tmp_path / "new" / "another's").write_text("x")
        raise RuntimeError
    assert tree(tmp_path) == {"new/another's": "x"}


def test_overwrite_replaces_the_whole_folder_at_the_end(tmp_path):
    out = model_folder(tmp_path / "out")
    with staged_folder(out, overwrite=True) as stage:
        (stage / "a").write_text("1")
        assert tree(out) == {"config.json": CONFIG, "model.safetensors": "old"}
    assert tree(tmp_path) == {"out/a": "1"}


def test_overwrite_that_fails_keeps_the_old(tmp_path, monkeypatch):
    out = model_folder(tmp_path / "out")
    with pytest.raises(RuntimeError), staged_folder(out, overwrite=True):
        raise RuntimeError
    assert tree(tmp_path) == {"out/config.json": CONFIG, "out/model.safetensors": "old"}

    # the last step itself fails: the new folder cannot be renamed
    rename = Path.rename

    def refuse(self, target):
        if self.name == "model":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(OutputError, match="Permission denied; nothing was left behind"),
        staged_folder(out, overwrite=True),
    ):
        pass
    assert tree(tmp_path) == {"out/config.json": CONFIG, "out/model.safetensors": "old"}


def test_a_full_disk_is_a_clear_error(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*out: No space left"), staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


JOB = {"made of": ["a", 1]}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("job", [JOB, {"made of": ["b", 1]}])
def test_what_was_interrupted_goes_on_if_it_is_the_same_job(tmp_path, stop, job):
    with pytest.raises(type(stop)), resumable_folder(tmp_path / "out", JOB) as stage:
        assert stage.progress() == {}
        (stage.folder / "a").write_text("1")
        stage.save_progress({"done": ["a"]})
        raise stop
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    with resumable_folder(tmp_path / "out", job) as stage:
        assert stage.progress() == ({"done": ["a"]} if job == JOB else {})
        assert tree(stage.folder) == ({"a": "1"} if job == JOB else {})
        (stage.folder / "b").write_text("2")
    assert tree(tmp_path) == ({"out/a": "1", "out/b": "2"} if job == JOB else {"out/b": "2"})


def test_without_noted_progress_nothing_is_taken_up(tmp_path):
    with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "out", JOB) as stage:
        (stage.folder / "a").write_text("half")
        raise KeyboardInterrupt
    with resumable_folder(tmp_path / "out", JOB) as stage:
        assert tree(stage.folder) == {}


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_leaves_nothing_of_a_job_either(tmp_path, error):
    with pytest.raises((RuntimeError, OutputError)), resumable_folder(tmp_path / "new" / "out", JOB) as stage:
        (stage.folder / "a").write_text("1")
        stage.save_progress({"done": ["a"]})
        raise error
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_one_too_many(tmp_path):
    with staged_folder(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
        with (
            pytest.raises(OutputError, match=r"another process is writing .*out: wait until it is done"),
            resumable_folder(tmp_path / "out", JOB),
        ):
            pass
        with staged_folder(tmp_path / "other") as other:
            (other / "b").write_text("2")
    assert tree(tmp_path) == {"out/a": "1", "other/b": "2"}


HOLD = """
import sys, time
from pathlib import Path
from nsa_hf.conversion.files.staging import staged_folder
with staged_folder(Path(sys.argv[1])) as stage:
    (stage / "half").write_text("x")
    print("holding", flush=True)
    time.sleep(600)
"""


def test_the_lock_dies_with_its_process_and_what_it_left_is_cleared(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "holding\n"
        with pytest.raises(OutputError, match="another process is writing"), staged_folder(out):
            pass
        assert (tmp_path / ".out.unfinished" / "model" / "half").is_file()
    finally:
        process.kill()
        process.wait()
    with staged_folder(out) as stage:
        (stage / "whole").write_text("x")
    assert tree(tmp_path) == {"out/whole": "x"}


def test_killed_between_the_two_renames_the_old_model_comes_back(tmp_path, monkeypatch):
    out = model_folder(tmp_path / "out")
    rename = Path.rename

    def killed(self, target):
        if self.name == "model":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt), resumable_folder(out, JOB, overwrite=True) as stage:
        (stage.folder / "a").write_text("1")
        stage.save_progress({"done": ["a"]})
    monkeypatch.undo()
    assert tree(tmp_path).keys() > {".out.unfinished/replaced/model.safetensors"}
    with pytest.raises(OutputError, match="--overwrite"), resumable_folder(out, JOB):
        pass
    assert tree(out) == {"config.json": CONFIG, "model.safetensors": "old"}


def test_stopped_between_the_two_renames_the_old_model_is_put_back(tmp_path, monkeypatch):
    out = model_folder(tmp_path / "out")
    rename = Path.rename

    def stopped(self, target):
        if self.name == "model":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), staged_folder(out, overwrite=True) as stage:
        (stage / "a").write_text("1")
    assert tree(tmp_path) == {"out/config.json": CONFIG, "out/model.safetensors": "old"}


def test_killed_after_the_renames_what_was_replaced_is_cleared(tmp_path):
    out = model_folder(tmp_path / "out")
    (tmp_path / ".out.unfinished" / "replaced").mkdir(parents=True)
    with staged_folder(out, overwrite=True) as stage:
        (stage / "a").write_text("1")
    assert tree(tmp_path) == {"out/a": "1"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with staged_folder(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "1"


def test_what_was_put_into_the_output_meanwhile_stays(tmp_path):
    with pytest.raises(OutputError, match="exists and is not empty"), staged_folder(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "diary").write_text("x")
    assert tree(tmp_path) == {"out/diary": "x"}


LINKS = {
    "the hidden folder": lambda place, other: place.symlink_to(other),
    "the model in it": lambda place, other: (place.mkdir(), (place / "model").symlink_to(other / "model")),
    "what was replaced": lambda place, other: (place.mkdir(), (place / "replaced").symlink_to(other / "model")),
    "its notes": lambda place, other: (
        place.mkdir(),
        (place / "progress.json").symlink_to(other / "progress.json"),
    ),
    "a file of the model": lambda place, other: (
        (place / "model").mkdir(parents=True),
        (place / "model" / "a").symlink_to(other / "model" / "a"),
    ),
    "a folder of the model": lambda place, other: (
        (place / "model").mkdir(parents=True),
        (place / "model" / "sub").symlink_to(other / "model"),
    ),
}


@pytest.mark.parametrize("job", [None, JOB])
@pytest.mark.parametrize("link", LINKS)
def test_links_in_the_hidden_folder_are_not_followed(tmp_path, link, job):
    """Neither deleted nor replaced is what they lead to; with the notes of the same job there is something to go on."""
    other, out = tmp_path / "other", tmp_path / "new" / "out"
    (other / "model").mkdir(parents=True)
    (other / "model" / "a").write_text("precious")
    out.parent.mkdir()
    Stage(other, JOB).save_progress({"done": []})
    before = tree(other)
    place = out.parent / ".out.unfinished"
    LINKS[link](place, other)
    if place.is_dir() and not (place / "progress.json").exists() and job:
        Stage(place, JOB).save_progress({"done": []})
    with (
        pytest.raises(OutputError, match=r"is a link and in the way of writing"),
        staged_folder(out) if job is None else resumable_folder(out, JOB),
    ):
        pytest.fail("entered")
    assert tree(other) == before
    assert not out.exists()


def test_somebody_elses_hidden_folder_is_left_alone(tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "diary").write_text("x")
    with pytest.raises(OutputError, match="diary is not of nsa-hf"), staged_folder(tmp_path / "out"):
        pytest.fail("entered")
    assert tree(tmp_path) == {".out.unfinished/diary": "x"}


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(OutputError, match=r"is a mount point.*give a folder inside it"):
        check_output(tmp_path)


def test_an_unwritable_parent_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file is a file"):
        check_output(tmp_path / "file" / "deeper" / "out")
    # root may write everywhere, so that a mode alone would test nothing
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(OutputError, match="no permission to write in"):
            check_output(out)
    (tmp_path / "sub").mkdir()
    check_output(tmp_path / "sub" / "out")


def test_what_only_shows_on_writing_is_a_clear_error_too(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(OutputError, match=r"cannot write .*out: Read-only file system"),
        staged_folder(tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_refusals_before_any_work(tmp_path):
    full = model_folder(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary").write_text("x")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(tmp_path / "new")
    check_output(full, overwrite=True)
    with pytest.raises(OutputError, match=r"not empty.*--overwrite"):
        check_output(full)
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="no model folder: remove it by hand"):
        check_output(tmp_path / "other", overwrite=True)
    (full / "diary").write_text("x")
    with pytest.raises(OutputError, match=r"holds files that belong to no model \(diary\)"):
        check_output(full, overwrite=True)
    (full / "diary").unlink()
    for out in (full, tmp_path, full / ".." / "model"):
        with pytest.raises(OutputError, match="is, or holds, the source"):
            check_output(out, overwrite=True, keep=(full,))
    check_output(tmp_path / "model-nsa", keep=(full,))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"π": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"π": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"π": [1, None]}
    assert list(tmp_path.iterdir()) == [path]
    # not through a link, also not under the name that it has while it is written
    (tmp_path / "other").write_text("precious")
    path.unlink()
    for link in (path, tmp_path / f".a.json.{os.getpid()}.unfinished"):
        link.symlink_to(tmp_path / "other")
    write_json(path, [1])
    assert (json.loads(path.read_text()), path.is_symlink()) == ([1], False)
    assert (tmp_path / "other").read_text() == "precious"
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "nowhere" / "a.json", {})
