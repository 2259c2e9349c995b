"""conversion/sources/gguf/source.py, with a tiny file made here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gguf_file import CHAT_TEMPLATE, write_gguf
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

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


def ends_turns(**tokens: int):
    """More ends than eos, under the names that a file has for them."""
    return lambda writer: [
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token) for name, token in tokens.items()
    ]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [({}, 2), ({"eot": 2}, 2), ({"eot": 7}, [2, 7]), ({"eom": 9, "eot": 7}, [2, 7, 9]), ({"eot": 2, "eom": 7}, [2, 7])],
)
def test_every_token_that_ends_a_text_or_turn_is_kept(tmp_path, tokens, expected):
    path = write_gguf(tmp_path / "tiny.gguf", ends_turns(**tokens))
    open_source(path).save_companions(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == expected


def test_an_end_beyond_the_vocabulary_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", ends_turns(eot=2**32 - 1))
    with pytest.raises(NsaError, match=r"tokenizer\.ggml\.eot_token_id is 4294967295"):
        open_source(path).save_companions(tmp_path)


def named_templates(*names: str):
    def more(writer):
        writer.add_array("tokenizer.chat_templates", list(names))
        for name in names:
            writer.add_string(f"tokenizer.chat_template.{name}", f"{name}: {CHAT_TEMPLATE}")

    return more


def test_named_chat_templates_are_kept_beside_the_first(tmp_path):
    source = open_source(write_gguf(tmp_path / "tiny.gguf", named_templates("tool_use", "rag")))
    out = tmp_path / "out"
    out.mkdir()
    names = source.save_companions(out)
    assert {"additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"} <= {*names}
    assert all((out / name).is_file() for name in names)
    kept = AutoTokenizer.from_pretrained(out).chat_template
    assert kept == {
        "default": CHAT_TEMPLATE,
        "tool_use": f"tool_use: {CHAT_TEMPLATE}",
        "rag": f"rag: {CHAT_TEMPLATE}",
    }


@pytest.mark.parametrize("name", ["../../mine", "default", ""])
def test_a_chat_template_s_name_that_is_none_is_refused(tmp_path, name):
    path = write_gguf(tmp_path / "tiny.gguf", named_templates(name))
    with pytest.raises(NsaError, match=r"tokenizer\.chat_template"):
        open_source(path).save_companions(tmp_path)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, kind):
    path = write_gguf(tmp_path / "tiny.gguf", lambda writer: writer.add_type(kind))
    with pytest.raises(NsaError, match=f"general.type is '{kind}'"):
        open_source(path)
