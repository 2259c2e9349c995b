"""conversion/sources/gguf/source.py, with a tiny file made here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gguf_file import CHAT_TEMPLATE, write_gguf
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from nsa_hf.conversion import convert
from nsa_hf.conversion.files.pieces import same_bits
from nsa_hf.conversion.sources import open_source
from nsa_hf.conversion.sources.gguf import source as gguf_source
from nsa_hf.conversion.sources.gguf.source import GgufSource
from nsa_hf.errors import NsaError


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_is_what_transformers_loads_from_it_in_float32(gguf_file, tmp_path):
    for src in (gguf_file, gguf_file.parent):
        source = open_source(src)
        assert isinstance(source, GgufSource)
        assert (source.config.dtype, source.config.num_hidden_layers) == (torch.float32, 2)
    expected = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, quantization_config=GgufConfig(dequantize=True), dtype="auto"
    ).state_dict()
    tensors = dict(source.tensors())
    assert tensors.keys() == source.table.keys() == expected.keys() - {"lm_head.weight"}
    assert all(same_bits(tensor, expected[name]) for name, tensor in tensors.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(tensors[name].bfloat16().float(), tensors[name]), "bfloat16 would round"

    out = tmp_path / "out"
    out.mkdir()
    assert source.save_companions(out) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    original = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    saved = AutoTokenizer.from_pretrained(out)
    text = "the heath\n é 漢 x"
    assert saved(text).input_ids == original(text).input_ids
    assert saved.decode(saved(text).input_ids) == text
    assert (saved.chat_template, saved.eos_token_id, saved.pad_token_id) == (CHAT_TEMPLATE, 2, 3)
    assert source.identity() | {"files": None} == {
        "name": str(gguf_file.parent),
        "kind": "gguf",
        "revision": None,
        "license": "apache-2.0",
        "model_name": "Tiny",
        "files": None,
    }


def test_a_gguf_source_hands_its_weights_over_and_reads_them_again_when_asked(gguf_file):
    source = open_source(gguf_file)
    before = dict(source.tensors())
    model = source.load_model(torch.float32)
    assert model.model.norm.weight.data_ptr() == before["model.norm.weight"].data_ptr()
    again = dict(source.tensors())
    assert all(same_bits(again[name], tensor) for name, tensor in before.items())
    assert source.load_model(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "cannot read .*tiny.gguf"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot read .*tiny.gguf"),
        (lambda path: path.write_bytes(b"<html>404</html>" * 10), "tiny.gguf does not start with the GGUF magic"),
        (lambda path: path.write_bytes(b""), "cannot read .*tiny.gguf"),
        (lambda path: shutil.copy(path, path.with_name("second.gguf")), "holds 2 .gguf files: name one"),
    ],
)
def test_damaged_or_ambiguous_gguf(gguf_file, tmp_path, spoil, message):
    path = tmp_path / "tiny.gguf"
    shutil.copy(gguf_file, path)
    spoil(path)
    with pytest.raises(NsaError, match=message):
        list(open_source(tmp_path).tensors())


def test_a_gguf_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_source, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(NsaError, match=r"tiny.gguf needs gguf: pip install 'nsa-hf\[demo\]'"):
        open_source(tmp_path)


def test_a_tokenizer_that_is_not_saved_as_it_was_read_is_refused(gguf_file, tmp_path, monkeypatch):
    """As Transformers 5.17 saved Gemma's: without its merges."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "saved")
    assert gguf_source.saved_alike(tokenizer, tmp_path / "saved")
    tokenizer.add_tokens(["fox"])
    assert not gguf_source.saved_alike(tokenizer, tmp_path / "saved")
    monkeypatch.setattr(gguf_source, "saved_alike", lambda tokenizer, folder: False)
    with pytest.raises(NsaError, match="saves another tokenizer than it reads from the file"):
        convert(gguf_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
