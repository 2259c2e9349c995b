"""conversion/convert.py: everything kept, nothing half-written."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf_file import write_gguf
from safetensors.torch import load_file, save_file
from tiny_families import tiny_dense
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import nsa_hf
from nsa_hf.conversion import convert, manifest
from nsa_hf.conversion.files import pieces
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.pieces import same_bits
from nsa_hf.conversion.files.shards import ShardWriter
from nsa_hf.conversion.files.staging import OutputError
from nsa_hf.errors import NsaError
from nsa_hf.families import initial_nsa_state
from nsa_hf.recipes.load import load_tokenizer

# the module: the package's attribute of that name is the function
convert_module = importlib.import_module("nsa_hf.conversion.convert")


@pytest.fixture
def dense_dir(tiny_dense_dir, tmp_path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_result_loads_holds_every_dense_bit_and_the_source_s_companions(tiny_dense_dir, tiny_sizes, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out", **tiny_sizes)
    assert out == tmp_path / "out"
    model, loaded = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loaded.values())
    assert type(model) is nsa_hf.NsaLlamaForCausalLM
    assert {name: getattr(model.config, name) for name in tiny_sizes} == tiny_sizes
    state = model.state_dict()
    dense = load_file(tiny_dense_dir / "model.safetensors")
    assert all(same_bits(state[name], tensor) for name, tensor in dense.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in initial_nsa_state(model.config):
        assert same_bits(state[name], tensor)
    messages = [{"role": "user", "content": "hi"}]
    templates = [AutoTokenizer.from_pretrained(d).apply_chat_template(messages) for d in (tiny_dense_dir, out)]
    assert templates[0] == templates[1]
    assert GenerationConfig.from_pretrained(out).eos_token_id == 1
    ids = torch.arange(50)[None]
    dense_model = AutoModelForCausalLM.from_pretrained(tiny_dense_dir, attn_implementation="sdpa")
    with torch.no_grad():
        assert (model.eval()(ids).logits - dense_model.eval()(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", torch.float16])
def test_dtype_is_kept_unless_another_is_asked_for(dense_dir, tmp_path, stored, wanted):
    AutoModelForCausalLM.from_pretrained(dense_dir, dtype=stored).save_pretrained(dense_dir)
    out = convert(dense_dir, tmp_path / "out", dtype=wanted)
    dtype = stored if wanted is None else getattr(torch, wanted) if isinstance(wanted, str) else wanted
    written = SafetensorsCheckpoint(out)
    assert {info.dtype for info in written.table.values()} == {dtype}
    assert f"torch.{json.loads((out / 'config.json').read_text())['dtype']}" == str(dtype)
    for name, tensor in SafetensorsCheckpoint(dense_dir).tensors():
        assert same_bits(written.read(name), tensor.to(dtype))


def test_mixed_dtypes_are_carried_as_stored(dense_dir, tmp_path):
    norm = torch.randn(48)

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()
        tensors["model.norm.weight"] = norm

    edit_weights(dense_dir, change)
    edit_config(dense_dir, dtype="bfloat16")
    table = SafetensorsCheckpoint(convert(dense_dir, tmp_path / "out")).table
    assert table["model.norm.weight"].dtype == torch.float32
    assert {info.dtype for name, info in table.items() if name != "model.norm.weight"} == {torch.bfloat16}
    assert all(info.dtype == torch.bfloat16 for name, info in table.items() if ".nsa." in name)


def test_the_same_conversion_writes_the_same_bytes_whatever_the_random_state(tiny_dense_dir, tmp_path):
    torch.manual_seed(1)
    first = bytes_of(convert(tiny_dense_dir, tmp_path / "a", max_shard_size="100KB"))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert bytes_of(convert(tiny_dense_dir, tmp_path / "b", max_shard_size="100KB")) == first
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were disturbed"
    other = bytes_of(convert(tiny_dense_dir, tmp_path / "c", max_shard_size="100KB", seed=1))
    assert other != first


@pytest.mark.parametrize("tied_copy", [False, True])
def test_tied_weights_are_stored_once(dense_dir, tmp_path, tied_copy):
    if tied_copy:
        edit_weights(dense_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    out = convert(dense_dir, tmp_path / "out")
    assert "lm_head.weight" not in SafetensorsCheckpoint(out).table
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untied_weights_are_both_carried(dense_dir, tmp_path):
    head = torch.randn(256, 48)
    edit_weights(dense_dir, lambda t: t.update({"lm_head.weight": head}))
    edit_config(dense_dir, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(convert(dense_dir, tmp_path / "out"))
    assert same_bits(model.lm_head.weight.data, head)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("shards", ["30KB", 100_000])
def test_shards_have_an_index_and_one_size_fits_all(tiny_dense_dir, tiny_sizes, tmp_path, shards):
    out = convert(tiny_dense_dir, tmp_path / "out", max_shard_size=shards, **tiny_sizes)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert (out / "model.safetensors.index.json").is_file()
    whole = convert(tiny_dense_dir, tmp_path / "whole", **tiny_sizes)
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]
    sharded, single = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, whole))
    assert all(same_bits(sharded[name], tensor) for name, tensor in single.items())
    # weights can be read by whom the config can
    modes = {path.stat().st_mode for path in out.iterdir() if path.name in {*files, "config.json"}}
    assert len(modes) == 1


def test_a_sharded_source_and_a_converted_layer_choice(tiny_dense_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_dense_dir).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    out = convert(tmp_path / "dense", tmp_path / "out", nsa_dense_layers=[0, -1])
    names = SafetensorsCheckpoint(out).table.keys()
    assert {name.split(".")[2] for name in names if ".nsa." in name} == {"1"}
    assert names >= load_file(tiny_dense_dir / "model.safetensors").keys()


def test_from_python_by_the_short_name(tiny_dense_dir, tmp_path):
    assert nsa_hf.convert is convert
    assert manifest.read(nsa_hf.convert(str(tiny_dense_dir), str(tmp_path / "out"), topk=5))["options"]["nsa_topk"] == 5


def test_a_tokenizer_whose_class_only_the_family_tells(tmp_path, tiny_sizes):
    """As old folders have it: vocabulary and merges."""
    tiny_dense("qwen2").save_pretrained(tmp_path / "dense")
    alphabet = sorted(ByteLevel.alphabet())
    (tmp_path / "dense" / "vocab.json").write_text(json.dumps({letter: at for at, letter in enumerate(alphabet)}))
    (tmp_path / "dense" / "merges.txt").write_text("#version: 0.2\n")
    out = convert(tmp_path / "dense", tmp_path / "out", **tiny_sizes)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "dense", out))
    assert type(after) is type(before)
    assert after("hi").input_ids == before("hi").input_ids == [71, 72]
    assert type(load_tokenizer(out)) is type(before)


def test_a_gguf_source(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    out = convert(tmp_path / "tiny.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"
    assert manifest.read(out)["source"]["license"] == "apache-2.0"
    assert json.loads((out / "config.json").read_text()).get("_model_name_or_path") is None


def poison(value: float, name: str = "model.layers.1.mlp.up_proj.weight"):
    def change(tensors):
        tensors[name][3, 5] = value

    return lambda folder: edit_weights(folder, change)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (poison(float("nan")), {}, "layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 3072"),
        (poison(float("-inf")), {}, "layers.1.mlp.up_proj.weight holds 1 NaN or infinite"),
        (poison(1e6), {"dtype": "float16"}, "up_proj.weight does not fit float16: it would hold 1"),
        (lambda d: edit_weights(d, lambda t: t.pop("model.norm.weight")), {}, "1 missing tensors"),
        (lambda d: edit_weights(d, lambda t: t.update(x=torch.zeros(1))), {}, r"1 unknown tensors \(x\)"),
        (lambda d: edit_config(d, intermediate_size=32), {}, "has shape .* and the config asks for"),
        (
            lambda d: edit_weights(d, lambda t: t.update({"lm_head.weight": torch.zeros(256, 48)})),
            {},
            "ties lm_head.weight to model.embed_tokens.weight, but the file holds two different",
        ),
        (lambda d: (d / "config.json").unlink(), {}, "neither config.json"),
        (lambda d: None, {"topk": 1}, "nsa_topk counts the forced blocks"),
        (lambda d: None, {"topq": 1}, "unknown option 'topq'"),
        (lambda d: None, {"dtype": "int4"}, "dtype must be one of"),
        (lambda d: None, {"max_shard_size": "many"}, "max_shard_size must be"),
        (lambda d: None, {"max_shard_size": "1e400GB"}, "max_shard_size must be"),
        (lambda d: None, {"seed": 10**30}, "seed must be a whole number of at most 62 bits"),
        (lambda d: None, {"dense_layers": [3]}, "nsa_dense_layers must be layers within"),
    ],
)
def test_what_is_refused_is_named_and_leaves_nothing(dense_dir, tmp_path, spoil, options, message):
    spoil(dense_dir)
    before = bytes_of(tmp_path)
    with pytest.raises(nsa_hf.NsaError, match=message):
        convert(dense_dir, tmp_path / "new" / "out", **options)
    assert bytes_of(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


STEPS = ["copy_dense_weights", "initial_nsa_state", "manifest.describe_files", "manifest.build", "manifest.write"]


@pytest.mark.parametrize("step", [*STEPS, "config", "companions"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_at_any_step_leaves_everything_as_it_was(
    tiny_dense_dir, tmp_path, monkeypatch, step, error, overwrite
):
    if overwrite:
        convert(tiny_dense_dir, tmp_path / "out", topk=5)
    before = bytes_of(tmp_path)

    def fail(*args, **kwargs):
        raise error

    if step == "config":
        monkeypatch.setattr(nsa_hf.NsaLlamaConfig, "save_pretrained", fail)
    elif step == "companions":
        monkeypatch.setattr("nsa_hf.conversion.sources.folder.SafetensorsSource.save_companions", fail)
    else:
        owner, name = (convert_module.manifest, step.split(".")[1]) if "." in step else (convert_module, step)
        monkeypatch.setattr(owner, name, fail)
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        convert(tiny_dense_dir, tmp_path / "out", overwrite=overwrite, max_shard_size="50KB")
    # an interrupted conversion can go on: what is done of it is kept, hidden
    stopped = [".out.unfinished"] if isinstance(error, KeyboardInterrupt) else []
    assert {path.name for path in tmp_path.iterdir()} == {*stopped, *(["out"] if overwrite else [])}
    assert {name: data for name, data in bytes_of(tmp_path).items() if not name.startswith(".out.")} == before


@pytest.mark.parametrize("fails_at", [0, 1, 7, 60])
def test_a_full_disk_while_writing_shards_is_a_clear_error(tiny_dense_dir, tmp_path, monkeypatch, fails_at):
    write, calls = os.pwrite, []

    def full(handle, data, position):
        calls.append(position)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[: len(data) // 2 or 1], position)  # a short write is no error

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"cannot write model.* of the new model: No space left.*nothing was left"):
        convert(tiny_dense_dir, tmp_path / "out", max_shard_size="50KB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_at", [0, 3, 40])
def test_one_write_that_fails_is_not_forgotten_when_the_next_ones_succeed(
    tiny_dense_dir, tmp_path, monkeypatch, fails_at
):
    write, calls = os.pwrite, []

    def fail_once(handle, data, position):
        calls.append(position)
        if len(calls) == fails_at + 1:
            raise OSError(errno.EIO, "Input/output error")
        return write(handle, data, position)

    monkeypatch.setattr(pieces, "PIECE", 1024)
    monkeypatch.setattr(os, "pwrite", fail_once)
    with pytest.raises(OutputError, match=r"cannot write model.* of the new model: Input/output error"):
        convert(tiny_dense_dir, tmp_path / "out", max_shard_size="50KB")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_it_is_filled(tiny_dense_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("nothing must be written"))
    with pytest.raises(OutputError, match=r"the new model needs 0\.\d+ GB, and its disk has 0.0001 GB left: make room"):
        convert(tiny_dense_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("tied_copy", [False, True])
def test_an_interrupted_conversion_goes_on_and_ends_with_the_same_bytes(
    dense_dir, tmp_path, monkeypatch, dtype, tied_copy
):
    AutoModelForCausalLM.from_pretrained(dense_dir).save_pretrained(dense_dir, max_shard_size="90KB")
    (dense_dir / "model.safetensors").unlink()
    if tied_copy:
        first = sorted(dense_dir.glob("*.safetensors"))[0]
        tensors = load_file(first)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, first)
        index = json.loads((dense_dir / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = first.name
        (dense_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    # with compressors, that there is more to write
    shards = "60KB" if dtype is None else "20KB"
    options = {"dtype": dtype, "max_shard_size": shards, "selector": "compressed"}
    expected = bytes_of(convert(dense_dir, tmp_path / "whole", **options))
    put, written = ShardWriter.put, []

    def stop(self, name, start, values):
        if len(written) == 25:
            written.clear()
            raise KeyboardInterrupt
        written.append(name)
        return put(self, name, start, values)

    monkeypatch.setattr(ShardWriter, "put", stop)
    attempts = 1
    while True:
        try:
            convert(dense_dir, tmp_path / "out", **options)
            break
        except KeyboardInterrupt:
            attempts += 1
            assert not (tmp_path / "out").exists()
            assert attempts < 30, "no progress"
    assert attempts > 2
    assert bytes_of(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "whole", "out"}


def test_a_complete_file_is_not_written_again_unless_it_was_changed(dense_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "initial_nsa_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(dense_dir, tmp_path / "out", max_shard_size="60KB")
    left = tmp_path / ".out.unfinished" / "model"
    complete = json.loads((left.parent / "progress.json").read_text())["progress"]["files"]
    assert len(complete) > 2
    damaged, *sound = sorted(complete)
    data = bytearray((left / damaged).read_bytes())
    data[-1] ^= 1
    (left / damaged).write_bytes(data)
    before = {file: (left / file).stat().st_ino for file in complete}
    times = {file: (left / file).stat().st_mtime_ns for file in complete}
    (left / "stray").write_text("of a killed process")
    out = convert(dense_dir, tmp_path / "out", max_shard_size="60KB")
    after = {file: (out / file).stat() for file in complete}
    assert all((after[file].st_ino, after[file].st_mtime_ns) == (before[file], times[file]) for file in sound)
    assert after[damaged].st_mtime_ns != times[damaged]
    assert bytes_of(out) == bytes_of(convert(dense_dir, tmp_path / "whole", max_shard_size="60KB"))


@pytest.mark.parametrize("change", ["options", "source", "dtype"])
def test_another_conversion_does_not_go_on_from_what_this_one_left(dense_dir, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "initial_nsa_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(dense_dir, tmp_path / "out", max_shard_size="60KB")
    options = {"max_shard_size": "60KB"}
    if change == "options":
        options["topk"] = 5
    elif change == "dtype":
        options["dtype"] = "bfloat16"
    else:
        edit_weights(dense_dir, lambda t: t["model.norm.weight"].add_(1))
    out = convert(dense_dir, tmp_path / "out", **options)
    assert bytes_of(out) == bytes_of(convert(dense_dir, tmp_path / "whole", **options))


def test_an_existing_folder_needs_overwrite_and_is_replaced_whole(tiny_dense_dir, tiny_sizes, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out", max_shard_size="50KB")
    (out / "verify.json").write_text("{}")
    before = bytes_of(out)
    with pytest.raises(OutputError, match="--overwrite"):
        convert(tiny_dense_dir, out, **tiny_sizes)
    assert bytes_of(out) == before
    convert(tiny_dense_dir, out, overwrite=True, **tiny_sizes)
    fresh = convert(tiny_dense_dir, tmp_path / "fresh", **tiny_sizes)
    assert bytes_of(out) == bytes_of(fresh)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "fresh"}


def test_the_source_is_never_the_output(dense_dir):
    before = bytes_of(dense_dir)
    for out in (dense_dir, dense_dir.parent):
        with pytest.raises(OutputError, match=r"is, or holds, the source|has no config.json"):
            convert(dense_dir, out, overwrite=True)
    assert bytes_of(dense_dir) == before


def test_a_converted_model_is_no_source(tiny_dense_dir, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out")
    with pytest.raises(nsa_hf.NsaError, match="already a sparse one"):
        convert(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_unsupported_family_is_refused_by_name(dense_dir, tmp_path):
    edit_config(dense_dir, model_type="gpt2")
    with pytest.raises(nsa_hf.NsaError, match="gpt2"):
        convert(dense_dir, tmp_path / "out")


def test_reading_that_fails_half_way_names_the_source(dense_dir, tmp_path, monkeypatch):
    pieces = SafetensorsCheckpoint.pieces

    def half(self, wanted):
        for number, piece in enumerate(pieces(self, wanted)):
            yield piece
            if number == 5:
                raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(SafetensorsCheckpoint, "pieces", half)
    with pytest.raises(NsaError, match=f"cannot read {dense_dir}.*Input/output error"):
        convert(dense_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
