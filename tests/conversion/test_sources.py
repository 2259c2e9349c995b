"""conversion/sources: where a dense model comes from, good and bad."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_run, write_texts
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from nsa_hf.conversion import convert, export_dense, plan, sources, verify
from nsa_hf.conversion.compare.tokens import has_tokenizer
from nsa_hf.conversion.files.loading import transformers_progress
from nsa_hf.conversion.files.pieces import same_bits
from nsa_hf.conversion.sources import open_source
from nsa_hf.conversion.sources.folder import SafetensorsSource, tokenizer_code
from nsa_hf.conversion.sources.pickled import PickleCheckpoint
from nsa_hf.errors import NsaError
from nsa_hf.recipes.cli import run
from nsa_hf.recipes.load import load_tokenizer
from nsa_hf.recipes.training.loop import train


@pytest.fixture
def dense_dir(tiny_dense_dir, tmp_path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_gives_its_tensors_as_stored(tiny_dense_dir):
    source = open_source(tiny_dense_dir)
    assert isinstance(source, SafetensorsSource)
    assert (source.config.model_type, source.config.dtype, source.revision) == ("llama", torch.float32, None)
    expected = AutoModelForCausalLM.from_pretrained(tiny_dense_dir).state_dict()
    tensors = dict(source.tensors())
    assert tensors.keys() == source.table.keys() == expected.keys() - {"lm_head.weight"}
    assert all(same_bits(tensor, expected[name]) for name, tensor in tensors.items())


def test_the_dense_model_is_transformers_own(tiny_dense_dir):
    model = open_source(tiny_dense_dir).load_model(torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config._attn_implementation, model.training) == ("sdpa", False)
    ids = torch.arange(20)[None]
    reference = AutoModelForCausalLM.from_pretrained(tiny_dense_dir, dtype=torch.float32, attn_implementation="sdpa")
    assert same_bits(model(ids).logits, reference.eval()(ids).logits)


@pytest.mark.parametrize(("stored", "expected"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_a_config_without_dtype_takes_the_weights(dense_dir, stored, expected):
    AutoModelForCausalLM.from_pretrained(dense_dir, dtype=stored).save_pretrained(dense_dir)
    config = json.loads((dense_dir / "config.json").read_text())
    del config["dtype"]
    (dense_dir / "config.json").write_text(json.dumps(config))
    assert str(open_source(dense_dir).config.dtype) == f"torch.{expected}"


def test_companions_are_copied_as_they_are_and_code_and_weights_are_not(dense_dir, tmp_path):
    (dense_dir / "additional_chat_templates").mkdir()
    (dense_dir / "additional_chat_templates" / "tool.jinja").write_text("x")
    (dense_dir / "LICENSE.txt").write_text("a license")
    (dense_dir / "tokenizer.model").write_bytes(b"\x00\x01")
    for name in ("tokenizer_custom.py", "optimizer.pt", "README.md", "vocab.bin"):
        (dense_dir / name).write_text("not to be copied")
    out = tmp_path / "out"
    out.mkdir()
    names = open_source(dense_dir).save_companions(out)
    assert names == [
        "LICENSE.txt",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (out / name).read_bytes() == (dense_dir / name).read_bytes()
    assert len([path for path in out.rglob("*") if path.is_file()]) == len(names)


@pytest.mark.parametrize("name", ["tekken.json", "emoji.json", "sentencepiece.bpe.model", "spiece.model"])
def test_a_tokenizer_of_one_file_is_carried_and_counted_as_one(dense_dir, tmp_path, name):
    for path in dense_dir.glob("tokenizer*"):
        path.unlink()
    (dense_dir / name).write_text("{}")
    open_source(dense_dir).save_companions(tmp_path)
    assert (tmp_path / name).is_file()
    assert has_tokenizer(tmp_path)


def test_identity_hashes_every_file_read_and_names_the_license(dense_dir):
    (dense_dir / "README.md").write_text("---\nlicense: mit\n---\n# A model")
    identity = open_source(dense_dir).identity()
    assert (identity["name"], identity["kind"], identity["license"]) == (str(dense_dir), "safetensors", "mit")
    expected = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(identity["files"]) == [*expected, "tokenizer.json", "tokenizer_config.json"]
    for name, entry in identity["files"].items():
        data, kind = (dense_dir / name).read_bytes(), "sha256"
        size = len(data)
        # of weights the header: every tensor has a hash of its own in the manifest
        if name == "model.safetensors":
            data, kind = data[: 8 + int.from_bytes(data[:8], "little")], "header_sha256"
        assert entry == {"bytes": size, kind: hashlib.sha256(data).hexdigest()}


# a thousand bytes that would be a billion values
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 10)}]}}\n" for n in range(9))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\n: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: [a, b]\n---\n",
        f"---\n{MERGED}license: mit\n---\n",
        "---\na: " + "[" * 5000 + "\nlicense: mit\n---\n",
        "---\nlicense: mit\na: 2024-02-30\n---\n",
        "---\nlicense: " + "x" * 5000 + "\n---\n",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_a_card_that_says_nothing_is_no_error(dense_dir, text):
    (dense_dir / "README.md").write_text(text)
    assert "license" not in open_source(dense_dir).identity()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "neither config.json nor a .gguf file"),
        (lambda d: (d / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda d: (d / "config.json").write_text("{}"), "names no model_type"),
        (lambda d: edit_config(d, model_type="nonesuch"), "cannot read .*nonesuch"),
        (lambda d: edit_config(d, hidden_size="wide"), "cannot read .*hidden_size"),
        (lambda d: edit_config(d, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised .*gptq"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
        (lambda d: edit_config(d, transformers_weights="other.safetensors"), "names a weight file of its own"),
        (lambda d: edit_config(d, dtype="float8_e4m3fn"), "its config says dtype torch.float8_e4m3fn"),
        (lambda d: edit_config(d, dtype="int8"), "its config says dtype torch.int8"),
    ],
)
def test_bad_folders_are_refused(dense_dir, spoil, message):
    spoil(dense_dir)
    with pytest.raises(NsaError, match=message):
        open_source(dense_dir)


def test_missing_weights_are_not_made_up(dense_dir):
    edit_config(dense_dir, num_hidden_layers=4)
    with pytest.raises(NsaError, match="lacks 9 tensors"):
        open_source(dense_dir).load_model(torch.float32)


def test_what_is_no_source(tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(NsaError, match="is a file: expected a model's folder"):
        open_source(tmp_path / "file.txt")
    with pytest.raises(NsaError, match="there is no folder"):
        open_source(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NsaError, match="the source is empty"):
        open_source("")


def test_a_hub_id_is_downloaded_and_its_commit_recorded(tiny_dense_dir, tmp_path, monkeypatch):
    downloads = []

    def download(name, revision, weights, allow_pickle):
        downloads.append((name, revision, weights))
        assert allow_pickle is False
        return tiny_dense_dir, "0a1b2c"

    monkeypatch.setattr(sources, "download", download)
    monkeypatch.chdir(tmp_path)
    source = open_source("owner/name", revision="v1")
    assert downloads == [("owner/name", "v1", True)]
    assert (source.name, source.revision, source.identity()["revision"]) == ("owner/name", "0a1b2c", "0a1b2c")
    # for a plan the config is enough: no weights are fetched, and none are looked at
    assert not open_source("owner/name", weights=False).has_weights
    assert downloads[1] == ("owner/name", None, False)


TOKENIZER = """
from transformers import PreTrainedTokenizerFast
from .tokenization_parts import SUFFIX

class XTokenizer(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *args, **kwargs):
        text = text + SUFFIX if isinstance(text, str) else [part + SUFFIX for part in text]
        return super()._encode_plus(text, *args, **kwargs)
"""
NAMED = {"AutoTokenizer": [None, "tokenization_x.XTokenizer"]}


@pytest.fixture
def code_dir(dense_dir, tmp_path, monkeypatch) -> Path:
    """A model whose tokenizer is defined by two files in its folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # nor is it looked for in another test's cache
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").is_dir()])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    name_tokenizer(dense_dir, NAMED)
    (dense_dir / "tokenization_x.py").write_text(TOKENIZER)
    (dense_dir / "tokenization_parts.py").write_text("SUFFIX = 'z' * 100\n")
    (dense_dir / "train.py").write_text("not of the tokenizer")
    return dense_dir


def name_tokenizer(folder: Path, auto_map) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))


def test_a_tokenizer_with_code_of_its_own_is_carried_where_it_is_trusted(code_dir, tmp_path, tiny_sizes):
    out = tmp_path / "out"
    for make in (plan, lambda src: convert(src, out)):
        with pytest.raises(NsaError, match=r"tokenizer that is defined by code of its own \(tokenization_x"):
            make(code_dir)
    assert not out.exists()
    assert plan(code_dir, trust_remote_code=True)["exact_up_to"]
    convert(code_dir, out, trust_remote_code=True, **tiny_sizes)
    for name in ("tokenization_x.py", "tokenization_parts.py", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (code_dir / name).read_bytes()
    assert not (out / "train.py").exists()
    record = json.loads((out / "manifest.json").read_text())
    assert {"tokenization_x.py", "tokenization_parts.py"} <= {*record["companions"]} & record["files"].keys()
    # also to what is trained, and back
    assert {"tokenization_x.py", "tokenization_parts.py"} <= {*open_source(out).save_companions(tmp_path)}
    export_dense(out, tmp_path / "back")
    assert (tmp_path / "back" / "tokenization_x.py").is_file()


def test_its_code_is_run_where_that_is_asked_for_and_nobody_is_asked(code_dir, tmp_path, tiny_sizes):
    out = convert(code_dir, tmp_path / "out", trust_remote_code=True, **tiny_sizes)
    texts = [("a", "a" * 100)]
    with pytest.raises(NsaError, match="code of its own"):
        verify(code_dir, out, texts=texts, length=200, documents=1)
    # so long only with what the code puts behind it
    result = verify(code_dir, out, texts=texts, length=200, documents=1, trust_remote_code=True)
    assert (result["exact"], result["length"]) == (True, 200)
    assert len(load_tokenizer(out, trust_remote_code=True)("a").input_ids) == 101
    (tmp_path / "a.txt").write_text("a" * 150)
    for arguments in (
        ["generate", "--prompt", "a", "--max-new-tokens", "1"],
        ["eval", "--text", tmp_path / "a.txt", "--documents", "1", "--length", "200"],
        ["inspect", "--text", tmp_path / "a.txt", "--length", "200"],
    ):
        command = [str(part) for part in (arguments[0], out, *arguments[1:])]
        assert run(command) == 2
        assert run([*command, "--trust-remote-code"]) == 0
    write_texts(tmp_path / "texts")
    config = tiny_run(out, tmp_path / "texts", tmp_path / "trained", steps=1, trust_remote_code=True)
    assert (train(config) / "tokenization_x.py").is_file()
    with pytest.raises(NsaError, match=r"code of its own \(tokenization_x.py\), which is not run unless trusted"):
        load_tokenizer(out)


@pytest.mark.parametrize(
    "auto_map", [["tokenization_x.XTokenizer", None], {"AutoTokenizer": "tokenization_x.XTokenizer"}]
)
def test_other_ways_to_name_it(code_dir, auto_map):
    name_tokenizer(code_dir, auto_map)
    assert tokenizer_code(code_dir) == ["tokenization_x.py", "tokenization_parts.py"]


@pytest.mark.parametrize("auto_map", [None, {}, {"AutoTokenizer": None}, {"AutoProcessor": "processing_x.X"}])
def test_no_code_of_its_own(code_dir, auto_map):
    name_tokenizer(code_dir, auto_map)
    assert tokenizer_code(code_dir) == []


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        ({"AutoTokenizer": "absent.X"}, r"tokenizer_config\.json: .*absent\.py"),
        ({"AutoTokenizer": "/etc/absent.X"}, "is not in this folder"),
        ({"AutoTokenizer": "../absent.X"}, r"tokenizer_config\.json"),
        ({"AutoTokenizer": 7}, r"tokenizer_config\.json"),
        ({"AutoTokenizer": "owner/other--tokenization_x.X"}, r"\(owner/other--tokenization_x.X\)"),
    ],
)
def test_code_that_is_not_there(code_dir, auto_map, message):
    name_tokenizer(code_dir, auto_map)
    with pytest.raises(NsaError, match=message):
        open_source(code_dir, trust_remote_code="--" not in message)


@pytest.mark.parametrize("before", [True, False])
def test_transformers_progress_is_put_back(before):
    was = transformers_logging.is_progress_bar_enabled()
    switch = {True: transformers_logging.enable_progress_bar, False: transformers_logging.disable_progress_bar}
    try:
        switch[before]()
        for shown in (True, False):
            with transformers_progress(shown):
                assert transformers_logging.is_progress_bar_enabled() is shown
            assert transformers_logging.is_progress_bar_enabled() is before
    finally:
        switch[was]()


@pytest.mark.parametrize("weight_map", [{}, {"a": 5}, {"a": ["x"]}, {"a": None}])
def test_an_index_of_pickles_that_names_no_files_is_named(tmp_path, weight_map):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(NsaError, match="is not an index of weights"):
        PickleCheckpoint(tmp_path)
