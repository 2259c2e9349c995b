"""`nsa-hf convert --push-to-hub` and `save_pretrained(push_to_hub=True)`, against a stand-in of the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hub_server import TOKEN, hub_server
from huggingface_hub import HfApi, constants

from nsa_hf.conversion import convert
from nsa_hf.conversion.sources import hub as hub_module
from nsa_hf.recipes.cli import run


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


def python(command: list[object], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**clean, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def push(src: Path, out: Path, repo: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = ["-m", "nsa_hf.recipes.cli", "convert", src, out, "--push-to-hub", repo, "--max-shard-size", "150KB"]
    return python(command, environment, out.parent)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_whole_folder_goes_along_with_its_card_and_manifest(hub, tiny_dense_dir, tmp_path):
    done = push(tiny_dense_dir, tmp_path / "out", "owner/tiny-nsa", hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.address}/owner/tiny-nsa" in done.stdout
    uploaded = hub.repositories["owner/tiny-nsa"]
    assert uploaded == files_of(tmp_path / "out")
    assert {"README.md", "manifest.json", "config.json", "modeling_nsa.py", "tokenizer.json"} <= uploaded.keys()
    assert sum(name.endswith(".safetensors") for name in uploaded) > 1
    assert uploaded["README.md"].startswith(b"---\n")
    assert json.loads(uploaded["manifest.json"])["trained"] is False
    assert hub.commits == [("owner/tiny-nsa", "Native Sparse Attention, by nsa-hf")]


@pytest.fixture
def here(hub, monkeypatch):
    """The same in this process, whose huggingface_hub has read its settings already: quicker."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def use(token: str | None = TOKEN, endpoint: str = hub.address) -> None:
        monkeypatch.setattr(hub_module, "HfApi", partial(HfApi, endpoint=endpoint, token=token or False))

    return use


@pytest.mark.parametrize("trouble", ["no token", "wrong token", "no id", "no server"])
def test_what_cannot_be_uploaded_is_not_converted_first(hub, here, tiny_dense_dir, tmp_path, capsys, trouble):
    here(
        {"no token": None, "wrong token": "hf_wrong"}.get(trouble, TOKEN),
        "http://127.0.0.1:9" if trouble == "no server" else hub.address,
    )
    repo = "a/b/c" if trouble == "no id" else "owner/x"
    assert run(["convert", str(tiny_dense_dir), str(tmp_path / "out"), "--push-to-hub", repo]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("takes a Hub id" if trouble == "no id" else "error: cannot upload to owner/x: ") in error
    assert list(tmp_path.iterdir()) == []
    assert hub.repositories == {}


def test_without_the_packages_of_the_card_it_is_not_begun(tiny_dense_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "nsa_hf.recipes.commands.converting.find_spec", lambda name: None if name == "jinja2" else object()
    )
    assert run(["convert", str(tiny_dense_dir), str(tmp_path / "out"), "--push-to-hub", "owner/x"]) == 2
    assert "the model card that goes along needs jinja2: pip install 'nsa-hf[eval]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refuse", ["/create", "/preupload/", "objects/batch", "/commit/"])
def test_a_failed_upload_is_an_error_and_the_model_stays(hub, here, tiny_dense_dir, tmp_path, capsys, refuse):
    here()
    hub.refuse = refuse
    out = tmp_path / "out"
    assert run(["convert", str(tiny_dense_dir), str(out), "--push-to-hub", "owner/x"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the upload to owner/x failed: 403" in errors[0]
    assert f"the model is complete in {out}, and `hf upload owner/x {out}` tries again" in errors[0]
    assert {"README.md", "manifest.json"} <= files_of(out).keys()
    assert not hub.repositories.get("owner/x")


SAVE = """
import sys
import nsa_hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="owner/saved")
model.config.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="owner/config")
model.push_to_hub("owner/pushed")
"""


def test_transformers_own_uploads_send_the_import_line_along(hub, tiny_dense_dir, tiny_sizes, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out", **tiny_sizes)
    done = python(["-c", SAVE, out, tmp_path / "saved"], hub.environment(tmp_path / "home"), tmp_path)
    assert done.returncode == 0, done.stderr
    written = {"config.json", "generation_config.json", "model.safetensors", "modeling_nsa.py"}
    for name in ("owner/saved", "owner/pushed"):
        assert written <= hub.repositories[name].keys()
    assert {"config.json", "modeling_nsa.py"} <= hub.repositories["owner/config"].keys()
    lines = {files["modeling_nsa.py"] for files in hub.repositories.values()}
    assert lines == {(out / "modeling_nsa.py").read_bytes()}
