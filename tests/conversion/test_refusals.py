"""Sources and outputs that are refused: by what is wrong with them, in one line, and with nothing written or harmed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nsa_hf.conversion import convert, export_dense, plan, verify
from nsa_hf.conversion.files.staging import staged_folder
from nsa_hf.errors import NsaError, check_folder
from nsa_hf.recipes.cli import run

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


def config(**changes) -> Callable[[Path], None]:
    """Fields of config.json that change; None takes one away."""

    def spoil(folder: Path) -> None:
        fields = {**json.loads((folder / "config.json").read_text()), **changes}
        fields = {name: value for name, value in fields.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(fields))

    return spoil


def weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def value(number: float) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors[UP].view(-1)[7:9].fill_(number))


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(keep((folder / name).read_bytes()))


def sharded(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """The same model in shards, then spoiled."""

    def both(folder: Path) -> None:
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
        (folder / WEIGHTS).unlink(missing_ok=True)
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        spoil(folder)

    return both


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return sharded(spoil)


def shard(number: int) -> Callable[[Path], Path]:
    return lambda folder: sorted(folder.glob("model-*.safetensors"))[number]


def pickled(spoil: Callable[[Path], object] = lambda path: None, state=None) -> Callable[[Path], None]:
    """The same weights as a pickle, which `spoil` gets the path of; or another `state`."""

    def both(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(tensors if state is None else state, folder / "pytorch_model.bin")
        spoil(folder / "pytorch_model.bin")

    return both


class Program:
    """What a malicious pickle does when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def pickle_index(folder: Path) -> None:
    pickled()(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00002.bin")
    named = {NORM: "pytorch_model-00001-of-00002.bin", UP: "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": named}))


def two_copies(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    path = folder / next(name for name in sorted(index.values(), reverse=True) if name != index[NORM])
    save_file({**load_file(path), NORM: torch.zeros(48)}, path)


def gguf(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        spoil(write_gguf(folder / "tiny.gguf"))

    return both


def nothing(folder: Path) -> None:
    """Leaves the source as it is."""


REMOTE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}

# name: (what is done to the source, further options, what the error says)
SOURCES = {
    "no folder": (shutil.rmtree, [], "there is no folder"),
    "a file": (lambda d: (shutil.rmtree(d), d.write_text("x")), [], "is a file: expected a model's folder"),
    "an empty folder": (lambda d: [p.unlink() for p in d.iterdir()], [], "has neither config.json nor a .gguf file"),
    "no config": (remove("config.json"), [], "has neither config.json nor a .gguf file"),
    "an adapter": (lambda d: (d / "config.json").rename(d / "adapter_config.json"), [], "is a PEFT adapter: merge it"),
    "config cut off": (cut("config.json", lambda data: data[:40]), [], "config.json: "),
    "config is a list": (write("config.json", "[]"), [], "config.json: "),
    "config is empty": (write("config.json", b""), [], "config.json: "),
    "no model type": (config(model_type=None), [], "it names no model_type"),
    "unknown model type": (config(model_type="nonesuch"), [], "nonesuch"),
    "other family": (config(model_type="gpt2"), [], "gpt2"),
    "a field of the wrong type": (config(hidden_size="wide"), [], "hidden_size"),
    "a field that cannot be": (config(num_attention_heads=0), [], "config.json: "),
    "code of its own": (config(auto_map=REMOTE), [], "is defined by code of its own (modeling_x.XForCausalLM)"),
    "an unknown type with code": (config(model_type="x", auto_map=REMOTE), [], "--trust-remote-code"),
    "trusted code that is not there": (config(auto_map=REMOTE), ["--trust-remote-code"], "configuration_x.py"),
    "quantised": (config(quantization_config=GPTQ), [], "is quantised (gptq): expected plain weights"),
    "float8": (weights(lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})), [], f"{UP} has dtype F8_E4M3"),
    "integers": (weights(lambda t: t.update({UP: t[UP].to(torch.int8)})), [], f"{UP} is stored as int8"),
    "complex": (weights(lambda t: t.update({UP: t[UP].to(torch.complex64)})), [], f"{UP} has dtype C64"),
    "no weights": (remove(WEIGHTS), [], "holds no weights: expected model.safetensors"),
    "truncated": (cut(WEIGHTS, lambda data: data[:-3]), [], "model.safetensors is damaged or incomplete"),
    "longer than it says": (cut(WEIGHTS, lambda data: data + b"x"), [], "model.safetensors is damaged"),
    "empty weights": (write(WEIGHTS, b""), [], "model.safetensors is damaged or incomplete"),
    "a pointer of git-lfs": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), [], "is damaged"),
    "a web page": (write(WEIGHTS, "<!doctype html><title>404</title>" * 9), [], "is damaged or incomplete"),
    "a bit of the header": (cut(WEIGHTS, lambda d: d[:8] + bytes([d[8] ^ 1]) + d[9:]), [], "is damaged"),
    "a missing tensor": (weights(lambda t: t.pop(UP)), [], f"1 missing tensors ({UP})"),
    "an unknown tensor": (weights(lambda t: t.update(x=torch.zeros(2))), [], "1 unknown tensors (x)"),
    "a layer too few": (config(num_hidden_layers=4), [], "9 missing tensors (model.layers.3."),
    "a layer too many": (config(num_hidden_layers=2), [], "9 unknown tensors (model.layers.2."),
    "another shape": (config(intermediate_size=32), [], "and the config asks for [48, 32]"),
    "another vocabulary": (config(vocab_size=300), [], "has shape [256, 48], and the config asks for [300, 48]"),
    "two tensors for one": (
        weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        [],
        "ties lm_head.weight to model.embed_tokens.weight, but the file holds two different tensors",
    ),
    "NaN": (value(float("nan")), [], f"{UP} holds 2 NaN or infinite values of 3072"),
    "infinity": (value(float("inf")), [], f"{UP} holds 2 NaN or infinite values of 3072"),
    "minus infinity": (value(float("-inf")), ["--dtype", "bfloat16"], f"{UP} holds 2 NaN or infinite values"),
    "too large for float16": (value(1e6), ["--dtype", "float16"], f"{UP} does not fit float16: it would hold 2"),
    "a missing shard": (sharded(lambda d: shard(1)(d).unlink()), [], "lacks model-00002-of-0"),
    "a truncated shard": (sharded(lambda d: os.truncate(shard(1)(d), 500)), [], "is damaged or incomplete"),
    "shards without index": (sharded(remove(INDEX)), [], f"has shards but no {INDEX}"),
    "an index cut off": (sharded(cut(INDEX, lambda data: data[:50])), [], "is not an index of safetensors files"),
    "an index of nothing": (index(lambda m: m.clear()), [], "is not an index of safetensors files"),
    "an index of another folder": (index(lambda m: m.update({NORM: "../x.safetensors"})), [], "is not an index"),
    "an index that swaps": (index(lambda m: m.update({NORM: m["model.embed_tokens.weight"]})), [], "disagrees with"),
    "an index that lacks": (index(lambda m: m.pop(NORM)), [], f"{NORM} should be in none"),
    "an index that invents": (index(lambda m: m.update(x=m[NORM])), [], "and is in none"),
    "one tensor in two files": (sharded(two_copies), [], f"{NORM} is in both model-0"),
    "another name": (lambda d: (d / WEIGHTS).rename(d / "model.fp16.safetensors"), [], "Transformers does not load"),
    "pickle": (pickled(), [], "has its weights as pickle (pytorch_model.bin)"),
    "a pickle that is a program": (pickled(state={UP: Program()}), ["--allow-pickle"], "holds more than tensors"),
    "a truncated pickle": (pickled(lambda path: os.truncate(path, 999)), ["--allow-pickle"], "is damaged"),
    "a pickle of something else": (pickled(state=[torch.zeros(2)]), ["--allow-pickle"], "is no state dict"),
    "a missing pickle": (pickle_index, ["--allow-pickle"], "lacks pytorch_model-00002-of-00002.bin"),
    "pickles allowed and none there": (remove(WEIGHTS), ["--allow-pickle"], "holds no weights"),
    "NaN in a pickle": (
        lambda d: (value(float("nan"))(d), pickled()(d)),
        ["--allow-pickle"],
        f"{UP} holds 2 NaN or infinite",
    ),
    "a dtype that is none": (nothing, ["--dtype", "int4"], "dtype must be one of float32"),
    "a shard size that is none": (nothing, ["--max-shard-size", "many"], "max_shard_size must be a number of bytes"),
    "sizes that do not fit": (nothing, ["--nsa-kernel-stride", "24"], "nsa_kernel_stride must divide"),
    "layers that are not there": (nothing, ["--nsa-dense-layers", "7"], "nsa_dense_layers must be layers within"),
}

if find_spec("gguf") and find_spec("accelerate"):
    SOURCES |= {
        "a truncated GGUF": (gguf(lambda path: os.truncate(path, path.stat().st_size - 2000)), [], "tiny.gguf"),
        "a GGUF that is none": (gguf(lambda path: path.write_bytes(b"<html>" * 99)), [], "GGUF magic"),
        "two GGUF files": (gguf(lambda path: shutil.copy(path, path.with_name("b.gguf"))), [], "name one"),
    }


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"/" for path in folder.rglob("*")
    }


def refused(capsys, arguments: list[str]) -> str:
    """Runs the command, which must exit with 2 after one line; gives that line."""
    capsys.readouterr()
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.mark.parametrize("name", SOURCES)
def test_a_bad_source(tiny_dense_dir, tmp_path, capsys, monkeypatch, name):
    spoil, options, message = SOURCES[name]
    monkeypatch.chdir(tmp_path)
    src = Path(shutil.copytree(tiny_dense_dir, tmp_path / "src"))
    spoil(src)
    before = everything(tmp_path)
    line = refused(capsys, ["convert", str(src), str(tmp_path / "new" / "out"), *options])
    assert message in line
    assert everything(tmp_path) == before


def test_an_already_converted_source(tiny_dense_dir, tmp_path, capsys):
    src = convert(tiny_dense_dir, tmp_path / "src")
    line = refused(capsys, ["convert", str(src), str(tmp_path / "out")])
    assert "already a sparse one (nsa_llama): convert its dense source" in line
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


OUTPUTS = {
    "a model": (lambda out: shutil.copytree(out.parent / "src", out), [], "is not empty: choose another folder, or"),
    "a folder with something": (lambda out: (out.mkdir(), (out / "diary").write_text("x")), [], "give --overwrite"),
    "no model to replace": (
        lambda out: (out.mkdir(), (out / "diary").write_text("x")),
        ["--overwrite"],
        "so it is no model folder",
    ),
    "a file": (lambda out: out.write_text("x"), [], "is a file: expected a new or empty folder"),
    "a file to replace": (lambda out: out.write_text("x"), ["--overwrite"], "is a file: expected a new or empty"),
    "a link to nowhere": (lambda out: out.symlink_to(out.parent / "nowhere"), [], "is a file: expected a new or"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_bad_output(tiny_dense_dir, tmp_path, capsys, name):
    prepare, options, message = OUTPUTS[name]
    src = Path(shutil.copytree(tiny_dense_dir, tmp_path / "src"))
    prepare(tmp_path / "out")
    before = everything(tmp_path)
    assert message in refused(capsys, ["convert", str(src), str(tmp_path / "out"), *options])
    assert everything(tmp_path) == before


def test_the_source_as_output_and_a_file_above_it(tiny_dense_dir, tmp_path, capsys):
    src = Path(shutil.copytree(tiny_dense_dir, tmp_path / "src"))
    before = everything(tmp_path)
    for out, message in (
        (src, "is, or holds, the source"),
        (tmp_path, "no model folder"),
        (src / "config.json" / "out", "config.json is a file"),
    ):
        assert message in refused(capsys, ["convert", str(src), str(out), "--overwrite"])
    assert everything(tmp_path) == before


def test_an_output_that_another_process_writes(tiny_dense_dir, tmp_path, capsys):
    with staged_folder(tmp_path / "out") as stage:
        (stage / "half").write_text("x")
        line = refused(capsys, ["convert", str(tiny_dense_dir), str(tmp_path / "out")])
        assert "another process is writing" in line
        assert (stage / "half").read_text() == "x"
    assert everything(tmp_path) == {"out": b"/", "out/half": b"x"}


def test_debug_shows_where(tiny_dense_dir, tmp_path, capsys):
    src = Path(shutil.copytree(tiny_dense_dir, tmp_path / "src"))
    value(float("nan"))(src)
    assert run(["convert", str(src), str(tmp_path / "out"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_there_are_at_least_thirty_kinds():
    assert len(SOURCES) + len(OUTPUTS) >= 60
    assert len({message for _, _, message in SOURCES.values()}) > 40


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_are_allowed_are_converted_bit_for_bit(tiny_dense_dir, tmp_path, capsys, legacy):
    expected = convert(tiny_dense_dir, tmp_path / "expected", max_shard_size="60KB")
    src = Path(shutil.copytree(tiny_dense_dir, tmp_path / "src"))
    pickled()(src)
    if legacy:  # as PyTorch wrote them before 1.6; it cannot be read piece by piece
        path = src / "pytorch_model.bin"
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert run(["plan", str(src), "--allow-pickle"]) == 0
    capsys.readouterr()
    out = convert(src, tmp_path / "out", allow_pickle=True, max_shard_size="60KB")
    files = everything(expected)
    del files["manifest.json"]
    assert files.items() <= everything(out).items()
    assert json.loads((out / "manifest.json").read_text())["source"]["kind"] == "pickle"
    assert verify(src, out, length=100, documents=1, allow_pickle=True)["exact"] is True


NO_PATHS = ["~nosuchuser/x", "a\0b", "x" * 5000, "a\udcff", 7, None, b"x", True]


@pytest.mark.parametrize("path", NO_PATHS, ids=lambda path: repr(path)[:12])
def test_what_no_file_can_be_called_is_one_error(tiny_dense_dir, tmp_path, path):
    for call in (
        lambda: plan(path),
        lambda: convert(path, tmp_path / "out"),
        lambda: convert(tiny_dense_dir, path),
        lambda: verify(tiny_dense_dir, path),
        lambda: export_dense(path, tmp_path / "out"),
        lambda: export_dense(tiny_dense_dir, path),
        lambda: check_folder(path),
    ):
        with pytest.raises(NsaError, match="a path") as error:
            call()
        assert len(str(error.value)) < 400
        str(error.value).encode()
    assert list(tmp_path.iterdir()) == []


def test_a_file_to_be_carried_along_has_a_name_of_text(tiny_dense_dir, tmp_path):
    source = Path(shutil.copytree(tiny_dense_dir, tmp_path / "source"))
    Path(os.fsdecode(bytes(source) + b"/LICENSE\xff")).write_text("a license")
    with pytest.raises(NsaError, match=r"LICENSE\\udcff has a name that is not UTF-8"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
