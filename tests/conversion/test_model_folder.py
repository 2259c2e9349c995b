"""conversion/files/model_folder.py: what a model's folder holds, and what lies elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from nsa_hf.conversion import convert, export_dense
from nsa_hf.conversion.files.loading import load_whole
from nsa_hf.conversion.files.model_folder import BESIDE, RESULTS, copy_file, foreign_files, leads_out
from nsa_hf.conversion.files.staging import OutputError
from nsa_hf.conversion.sources import open_source
from nsa_hf.errors import NsaError
from nsa_hf.model_cards.card import marked


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def dense_dir(tiny_dense_dir, tmp_path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))


def project(folder: Path) -> list[str]:
    (folder / "src").mkdir(parents=True)
    for name in ("config.json", "package.json", "src/app.js"):
        (folder / name).write_text("{}")
    return ["config.json", "package.json", "src/app.js"]


def test_a_project_with_a_config_is_no_model(tmp_path):
    names = project(tmp_path / "app")
    assert foreign_files(tmp_path / "app") == names
    # nor with the config of a model, and a manifest that is not ours
    (tmp_path / "app" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "app" / "manifest.json").write_text('{"name": "App", "icons": []}')
    assert foreign_files(tmp_path / "app") == ["config.json", "manifest.json", *names[1:]]
    (tmp_path / "app" / "model.safetensors").write_bytes(b"")
    assert foreign_files(tmp_path / "app") == ["manifest.json", *names[1:]]


@pytest.mark.parametrize("command", ["convert", "export-dense"])
def test_overwrite_deletes_no_project(tiny_dense_dir, tmp_path, command):
    project(tmp_path / "app")
    before = everything(tmp_path / "app")
    nsa = convert(tiny_dense_dir, tmp_path / "nsa") if command == "export-dense" else None
    with pytest.raises(OutputError, match=r"belong to no model \(config.json, package.json, src/app.js\)"):
        if nsa is None:
            convert(tiny_dense_dir, tmp_path / "app", overwrite=True)
        else:
            export_dense(nsa, tmp_path / "app", overwrite=True)
    assert everything(tmp_path / "app") == before


def test_models_may_be_replaced_and_what_a_user_put_beside_them_not(dense_dir, tmp_path):
    (dense_dir / "LICENSE").write_text("a license")
    (dense_dir / "additional_chat_templates").mkdir()
    (dense_dir / "additional_chat_templates" / "tool.jinja").write_text("x")
    (dense_dir / "README.md").write_text(marked("a card\n"))
    assert foreign_files(dense_dir) == []
    out = convert(dense_dir, tmp_path / "out", max_shard_size="50KB")
    for name in ("verify.json", "perplexity.png", "generate-chat.json"):
        (out / name).write_text("{}")
    (out / "README.md").write_text(marked("a card\n"))
    assert foreign_files(out) == []
    assert foreign_files(dense_dir) == []
    for name in (".DS_Store", "__pycache__/modeling_nsa.cpython-311.pyc"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"")
    assert foreign_files(out) == []
    mine = ("notes.json", "plan.png", "manifest.old.json", "precious_lora.safetensors", "model-old.safetensors")
    mine += ("other.gguf", "classifier.model", "pytorch_model.mine.bin", "modeling_experiments.py", "LICENSE-notes.odt")
    for name in ("notes.txt", "app.py", ".git/config", "src/data.json", "vocabulary.docx", *mine):
        path = dense_dir / name
        path.parent.mkdir(exist_ok=True)
        for folder in (dense_dir, out):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("mine")
            assert foreign_files(folder) == [name]
            (folder / name).unlink()


def test_a_card_that_somebody_wrote_or_edited_is_not_replaced_with_its_model(tiny_dense_dir, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out")
    for text in ("# Mine", marked("a card\n").replace("a card", "my card"), marked("a card\n") + "mine"):
        (out / "README.md").write_text(text)
        with pytest.raises(OutputError, match=r"belong to no model \(README\.md\)"):
            convert(tiny_dense_dir, out, overwrite=True)
        assert (out / "README.md").read_text() == text


def test_shards_by_any_name_are_the_model_s_where_its_index_names_them(dense_dir):
    (dense_dir / "model.safetensors").rename(dense_dir / "first.safetensors")
    assert "first.safetensors" in foreign_files(dense_dir)
    (dense_dir / "model.safetensors.index.json").write_text('{"weight_map": {"a": "first.safetensors"}}')
    assert foreign_files(dense_dir) == []


def test_the_names_that_our_commands_write_are_known():
    from nsa_hf.model_cards.card import RESULTS as SHOWN
    from nsa_hf.model_cards.card import SAMPLES
    from nsa_hf.model_cards.pictures import pictures_of
    from nsa_hf.recipes import inspection
    from nsa_hf.recipes.evaluation import suites
    from nsa_hf.recipes.training import folder

    verified, exported = sys.modules["nsa_hf.conversion.verify"].RESULT, sys.modules["nsa_hf.conversion.export"].RESULT
    written = {verified, inspection.NAME, suites.NAME, folder.RESULT, *SHOWN.values(), *SAMPLES}
    assert {"manifest.json", *written, *pictures_of(None, None, None)} == RESULTS
    assert exported in BESIDE


def test_an_exported_model_may_be_replaced(dense_dir, tmp_path):
    (dense_dir / "words.tiktoken").write_text("a")
    nsa = convert(dense_dir, tmp_path / "nsa")
    export_dense(nsa, tmp_path / "again")
    assert (tmp_path / "again" / "words.tiktoken").is_file()
    assert foreign_files(tmp_path / "again") == []


# Links


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text("secret")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "tokenizer.json",
        "additional_chat_templates/a.jinja",
        "config.json",
        "README.md",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_a_link_out_of_the_source_is_not_read(dense_dir, tmp_path, secret, name):
    path = dense_dir / name
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        path.rename(secret)
    path.symlink_to(secret)
    with pytest.raises(NsaError, match=r"is a link out of its folder, to .*id_rsa, which is not read"):
        convert(dense_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_behind_a_link_is_not_read_either(dense_dir, tmp_path, secret):
    secret.rename(secret.with_suffix(".jinja"))
    (dense_dir / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(NsaError, match=r"id_rsa\.jinja, which is not read"):
        open_source(dense_dir)


def test_links_inside_the_source_work(dense_dir, tmp_path):
    (dense_dir / "LICENSE.txt").write_text("a license")
    (dense_dir / "LICENSE").symlink_to("LICENSE.txt")
    (tmp_path / "link").symlink_to(dense_dir)
    out = convert(tmp_path / "link", tmp_path / "out")
    assert (out / "LICENSE").read_text() == "a license"
    assert not (out / "LICENSE").is_symlink()


def cached(dense_dir: Path, cache: Path, repository: str) -> Path:
    """The Hub's cache as huggingface_hub lays it out: a snapshot of links to blobs."""
    blobs, snapshot = cache / repository / "blobs", cache / repository / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(dense_dir.iterdir())):
        (blobs / f"{number:040}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{number:040}"))
    return snapshot


def test_a_snapshot_of_the_hub_s_cache_is_read_through_its_own_links_only(dense_dir, tmp_path, secret):
    (dense_dir / "LICENSE").write_text("a license")
    snapshot = cached(dense_dir, tmp_path / "hub", "models--owner--name")
    out = convert(snapshot, tmp_path / "out")
    assert everything(out).keys() == everything(convert(dense_dir, tmp_path / "plain")).keys()
    assert (out / "LICENSE").read_text() == "a license"
    assert not any(path.is_symlink() for path in out.rglob("*"))
    other = cached(dense_dir, tmp_path / "hub", "models--owner--other")
    for target in (secret, other / "LICENSE", tmp_path / "hub" / "models--owner--other" / "blobs" / f"{0:040}"):
        (snapshot / "LICENSE").unlink()
        (snapshot / "LICENSE").symlink_to(target)
        with pytest.raises(NsaError, match="LICENSE is a link out of its folder"):
            open_source(snapshot)
    # the same links anywhere else are not the cache's
    elsewhere = cached(dense_dir, tmp_path / "mine", "project")
    assert leads_out(elsewhere, elsewhere / "config.json")


def test_a_named_gguf_file_is_read_and_links_beside_it_are_not(tmp_path, secret):
    from gguf_file import write_gguf

    folder = tmp_path / "gguf"
    folder.mkdir()
    path = write_gguf(folder / "tiny.gguf")
    (folder / "LICENSE").symlink_to(secret)
    for src in (path, folder):
        with pytest.raises(NsaError, match="LICENSE is a link out of its folder"):
            open_source(src)


@pytest.mark.parametrize("name", ["../home/id_rsa", "/etc/passwd", "sub/../../home/id_rsa", "link", "absent"])
def test_a_manifest_names_no_file_elsewhere(tiny_dense_dir, tmp_path, secret, name):
    """What `export-dense` copies is named by the manifest, which anybody can edit."""
    nsa = convert(tiny_dense_dir, tmp_path / "nsa")
    (nsa / "sub").mkdir()
    (nsa / "link").symlink_to(secret)
    manifest = json.loads((nsa / "manifest.json").read_text())
    manifest["companions"].append(name)
    (nsa / "manifest.json").write_text(json.dumps(manifest))
    before = everything(tmp_path)
    with pytest.raises(NsaError):
        export_dense(nsa, tmp_path / "dense")
    assert everything(tmp_path) == before
    with pytest.raises(NsaError, match="of its own"):
        copy_file(nsa, name, tmp_path / "dense")


# Adapters


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")


@pytest.mark.parametrize("files", [("adapter_config.json", "adapter_model.safetensors"), ("adapter_model.bin",)])
def test_an_adapter_beside_whole_weights_is_refused_by_name(dense_dir, tmp_path, files):
    adapter(dense_dir)
    (dense_dir / "adapter_model.bin").write_bytes(b"")
    for name in {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} - {*files}:
        (dense_dir / name).unlink()
    with pytest.raises(NsaError, match=rf"holds a PEFT adapter \({', '.join(files)}\).*merge_and_unload"):
        convert(dense_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_an_adapter_only_is_called_that(dense_dir):
    (dense_dir / "model.safetensors").unlink()
    adapter(dense_dir)
    for _ in range(2):
        with pytest.raises(NsaError, match=r"is a PEFT adapter: merge it into its base model with .*merge_and_"):
            open_source(dense_dir)
        (dense_dir / "config.json").unlink(missing_ok=True)


def test_nor_is_one_dropped_from_a_converted_model(tiny_dense_dir, tmp_path):
    """Whatever loads or reads it: generate, eval, train, verify, export-dense."""
    from nsa_hf.recipes.load import load_nsa_model

    out = convert(tiny_dense_dir, tmp_path / "out")
    adapter(out)
    for read in (load_whole, load_nsa_model, lambda folder: export_dense(folder, tmp_path / "dense")):
        with pytest.raises(NsaError, match="holds a PEFT adapter"):
            read(out)
    assert os.listdir(tmp_path) == ["out"]
