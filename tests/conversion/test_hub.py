"""conversion/sources/hub.py: what is asked of huggingface_hub, and what is made of its answers."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from nsa_hf.conversion.sources import hub
from nsa_hf.errors import NsaError

REPOSITORY = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "README.md",
    "LICENSE",
    "pytorch_model.bin",
    "m.gguf",
    "onnx/model.onnx",
    "original/model.safetensors",
)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (True, {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"}),
        (False, {"config.json", "tokenizer.json", "README.md", "LICENSE"}),
    ],
)
def test_only_what_is_needed_is_fetched(monkeypatch, tmp_path, weights, expected):
    requested = {}

    def snapshot(name, revision, ignore_patterns):
        requested.update(name=name, revision=revision)
        requested["files"] = {file for file in REPOSITORY if not any(fnmatch(file, p) for p in ignore_patterns)}
        return str(tmp_path / "snapshots" / "0a1b2c")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    folder, commit = hub.download("owner/name", "main", weights)
    assert (folder, commit) == (tmp_path / "snapshots" / "0a1b2c", "0a1b2c")
    assert requested == {"name": "owner/name", "revision": "main", "files": expected}


@pytest.mark.parametrize("safetensors", [False, True])
def test_pickles_are_fetched_only_where_they_are_allowed_and_nothing_else_is_there(monkeypatch, tmp_path, safetensors):
    requested = []

    def snapshot(name, revision, ignore_patterns):
        requested.append("*.bin" not in ignore_patterns)
        if safetensors:
            (tmp_path / "model.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    hub.download("owner/name", None, True)
    hub.download("owner/name", None, True, allow_pickle=True)
    assert requested == ([False, False] if safetensors else [False, False, True])


@pytest.mark.parametrize("name", ["no_such_folder", "./a/b", "/a/b", "a/b/c", "a b/c", "../a"])
def test_what_cannot_be_an_id_is_a_missing_folder(monkeypatch, name):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("must not be asked"))
    with pytest.raises(NsaError, match="there is no folder"):
        hub.download(name, None, True)


def test_the_hub_s_answer_is_passed_on(monkeypatch):
    def snapshot(*args, **kwargs):
        raise LocalEntryNotFoundError("Cannot find\nthe requested files in the disk cache")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(NsaError, match="no folder owner/name, and the Hub's answer is: Cannot find the requested"):
        hub.download("owner/name", None, True)
