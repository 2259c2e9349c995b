import io
import json
import time
from pathlib import Path

import pytest

from nsa_hf.errors import NsaError
from nsa_hf.recipes.terminal import numbers, read_text, report, result_alone, show, split, track


def test_results_as_json_or_as_what_is_rendered(capsys):
    show({"a": [1, None]}, lambda result: f"rendered {result['a']}", True)
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}
    show({"a": 1}, lambda result: f"rendered {result['a']}", False)
    assert capsys.readouterr().out == "rendered 1\n"


def test_what_is_said_beside_a_result_is_not_in_it(capsys):
    for as_json, expected in ((True, ("", "said\n")), (False, ("said\n", ""))):
        with result_alone(as_json):
            print("said")
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == expected


def test_texts(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("grün", encoding="utf-8")
    assert read_text(path) == "grün"
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert read_text(Path("-")) == "from a pipe"
    path.write_bytes(b"\xff\xfe")
    for wrong in (path, tmp_path / "none.txt", tmp_path):
        with pytest.raises(NsaError, match=r"cannot read .* as UTF-8 text"):
            read_text(wrong)


def test_only_what_a_user_can_act_upon_is_reported(capsys):
    assert report(NsaError("expected 1, got 2"))
    assert capsys.readouterr().err == "error: expected 1, got 2\n"
    assert report(PermissionError(13, "Permission denied", "x"))
    assert capsys.readouterr().err.endswith(
        "Permission denied: 'x': name a file or folder that you may use, or change its permissions\n"
    )
    assert report(OSError("of another kind")) and capsys.readouterr().err == "error: of another kind\n"
    assert not report(RuntimeError("a bug"))
    assert capsys.readouterr().err == ""


def test_progress_in_a_file_is_lines(capsys, monkeypatch):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(track(["a", "b", "c", "d"], "Texts")) == ["a", "b", "c", "d"]
    assert capsys.readouterr().err == "Texts: 2 of 4, 0.025/s, 1:20 left\n"
    assert list(track(["a"], None)) == ["a"]
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track(["a", "b"], "Texts")) == ["a", "b"]
    assert "Texts" in capsys.readouterr().err


def test_values_with_commas():
    assert split("ppl, needle,") == ["ppl", "needle"]
    assert numbers("1, 20", "--lengths") == (1, 20) and numbers(None, "--lengths") is None
    with pytest.raises(NsaError, match="--lengths takes whole numbers with commas between them, got '4k'"):
        numbers("4k", "--lengths")
