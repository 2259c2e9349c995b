"""conversion/sources/gguf_contents.py: what a file says is applied or refused, read without Transformers' loader."""

from __future__ import annotations

import math
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_file import ARCHITECTURES, HIDDEN, write_gguf, write_gguf_of
from packaging.version import Version

from nsa_hf.conversion import convert, plan, verify
from nsa_hf.conversion.files.checkpoint import CheckpointError
from nsa_hf.conversion.files.pieces import same_bits
from nsa_hf.conversion.sources import gguf as gguf_source
from nsa_hf.conversion.sources import open_source
from nsa_hf.releases import INSTALLED

WIDTH = HIDDEN // 4
FREQUENCIES = 10000.0 ** -(np.arange(0, WIDTH, 2) / WIDTH)


def llama3_factors(factor: float = 8.0, length: int = 512) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    factors = []
    for wave in 2 * math.pi / FREQUENCIES:
        if wave < length / 4:
            factors.append(1.0)
        elif wave > length:
            factors.append(factor)
        else:
            smooth = (length / wave - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def scaling(kind: str | None, factor: float, length: int | None = None):
    def more(writer):
        if kind:
            writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", factor)
        if length:
            writer.add_uint32("llama.rope.scaling.original_context_length", length)

    return more


@pytest.mark.parametrize(
    ("more", "expected", "frequencies"),
    [
        (scaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}, FREQUENCIES / 4),
        (scaling(None, 4.0), {"rope_type": "linear", "factor": 4.0}, FREQUENCIES / 4),
        (
            lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0),
            {"rope_type": "linear", "factor": 2.0},
            FREQUENCIES / 2,
        ),
        (
            scaling("yarn", 4.0, 128),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            None,
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", llama3_factors()),
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512},
            FREQUENCIES / llama3_factors(),
        ),
        (scaling("none", 1.0), {"rope_type": "default"}, FREQUENCIES),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), {}, FREQUENCIES),
    ],
)
def test_scaled_rope_is_applied(more, expected, frequencies, tmp_path):
    source = open_source(write_gguf(tmp_path / "tiny.gguf", more))
    assert source.config.rope_parameters.items() >= expected.items()
    assert plan(tmp_path / "tiny.gguf")["source"]["model_type"] == "llama"
    inverse = source.load_model(torch.float32).model.rotary_emb.inv_freq
    if frequencies is not None:
        np.testing.assert_allclose(inverse, frequencies, rtol=1e-5)
    else:
        assert inverse[0] == 1 and inverse[-1] == pytest.approx(FREQUENCIES[-1] / 4)


def test_a_scaled_file_is_converted_with_its_scaling_and_proved(tiny_sizes, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", scaling("linear", 4.0))
    out = convert(path, tmp_path / "out", **tiny_sizes)
    assert verify(path, out, length=64, documents=1)["exact"] is True
    assert '"rope_type": "linear"' in (out / "config.json").read_text()


def bias(writer):
    writer.add_tensor("blk.0.attn_q.bias", np.ones(HIDDEN, np.float32))


def other_factors(writer):
    writer.add_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32))


@pytest.mark.parametrize(
    ("more", "blocks", "message"),
    [
        (lambda writer: writer.add_sliding_window(64), 2, "llama.attention.sliding_window is 64, which"),
        (scaling("longrope", 4.0), 2, "llama.rope.scaling.type is 'longrope', which"),
        (other_factors, 2, "rope_freqs.weight scales RoPE in another way"),
        (bias, 2, "1 tensors that are no part of it, blk.0.attn_q.bias for one"),
        (lambda writer: writer.add_tensor("x.weight", np.ones(3, np.float32)), 2, "x.weight for one"),
        (lambda writer: writer.add_expert_count(8), 2, "llama.expert_count is 8, which"),
        (lambda writer: writer.add_attn_logit_softcapping(50.0), 2, "attn_logit_softcapping is 50.0"),
        (lambda writer: writer.add_float32("llama.new_thing", 2.0), 2, "llama.new_thing is 2.0, which"),
        (lambda writer: writer.add_uint16("split.count", 3), 2, "one of 3 parts of a model"),
        (lambda writer: writer.add_float32("llama.logit_scale", math.nan), 2, "logit_scale is nan"),
        (lambda writer: writer.add_uint32("llama.attention.key_length", 8), 2, "blk.0.attn_q.weight has shape"),
        (lambda writer: None, 1, r"llama.block_count is 1, and the file holds tensors of 2 blocks \(0 to 1\)"),
        (lambda writer: None, 3, "block_count is 3, and the file holds tensors of 2 blocks"),
        (lambda writer: None, 10**9, "block_count is 1000000000, and the file holds tensors of 2"),
    ],
)
def test_what_the_model_would_not_compute_is_refused_by_name(more, blocks, message, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", more, blocks)
    for attempt in (lambda: convert(path, tmp_path / "out"), lambda: plan(path)):
        with pytest.raises(CheckpointError, match=message):
            attempt()
    assert not (tmp_path / "out").exists()


def renamed(path: Path, key: str) -> Path:
    """The file without one of its keys."""
    path.write_bytes(path.read_bytes().replace(f"llama.{key}".encode(), f"other.{key}".encode()))
    return path


@pytest.mark.parametrize("key", ["context_length", "attention.head_count", "attention.layer_norm_rms_epsilon"])
def test_what_a_file_must_say_is_not_made_up(key, tmp_path):
    path = renamed(write_gguf(tmp_path / "tiny.gguf"), key)
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf .*llama\.{key}"):
        open_source(path)


def test_what_it_may_leave_out_is_as_llama_cpp_has_it(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf_of("gemma3_text", path)
    path.write_bytes(path.read_bytes().replace(b"gemma3.rope.freq_base", b"other3.rope.freq_base"))
    assert open_source(path).config.rope_parameters["full_attention"]["rope_theta"] == 10000.0


@pytest.mark.parametrize("key", ["attention.sliding_window", "expert_count"])
def test_nothing_of_a_kind_is_no_matter(key, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", lambda writer: writer.add_uint32(f"llama.{key}", 0))
    assert open_source(path).config.num_hidden_layers == 2


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(write_gguf(path).read_bytes().replace(b"llama", b"lmaaa"))
    with pytest.raises(CheckpointError, match="architecture 'lmaaa', and of GGUF files those of llama, qwen2"):
        open_source(path)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_read_here_it_is_what_transformers_loads(model_type, tmp_path):
    source = open_source(write_gguf_of(model_type, tmp_path / "tiny.gguf"))
    try:
        loaded, stored = dict(source.tensors()), dict(source.stored())
    except CheckpointError as error:
        # a family's quantised types that an older Transformers does not know
        if "not supported yet" not in str(error) or Version("5.23") <= INSTALLED:
            raise
        return
    assert loaded.keys() == stored.keys()
    assert all(same_bits(tensor, stored[name]) for name, tensor in loaded.items())
    rope = source.config.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == 12345.0


def test_a_loader_that_loses_something_is_found(tiny_sizes, tmp_path, monkeypatch):
    load_whole = gguf_source.load_whole

    def lossy(*args, **kwargs):
        model = load_whole(*args, **kwargs)
        model.model.norm.weight.data[5] = 1
        return model

    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_source, "load_whole", lossy)
    result = verify(path, convert(path, tmp_path / "out", **tiny_sizes), length=64, documents=1)
    assert (result["exact"], result["tensors"]["changed"]) == (False, ["model.norm.weight"])


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HEADER, LLAMA = (
    b"GGUF" + struct.pack("<I", 3),
    string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama"),
)


def with_value(value: bytes) -> bytes:
    return HEADER + struct.pack("<QQ", 0, 2) + LLAMA + string(b"llama.block_count") + value


def with_tensor(about: bytes) -> bytes:
    return HEADER + struct.pack("<QQ", 1, 1) + LLAMA + string(b"blk.0.x") + about


ABSURD = {
    "counts": HEADER + struct.pack("<QQ", 2**63, 2**63) + LLAMA,
    "tensors": HEADER + struct.pack("<QQ", 2**40, 1) + LLAMA,
    "key": HEADER + struct.pack("<QQ", 0, 2) + LLAMA + struct.pack("<Q", 2**62) + b"x",
    "string": with_value(struct.pack("<IQ", 8, 2**62)),
    "bytes": with_value(struct.pack("<IIQ", 9, 0, 2**40)),
    "numbers": with_value(struct.pack("<IIQ", 9, 10, 2**63)),
    "strings": with_value(struct.pack("<IIQ", 9, 8, 2**60)),
    "nesting": with_value(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "type": with_value(struct.pack("<IQ", 77, 1)),
    "blocks": with_value(struct.pack("<IQ", 10, 2**62)),
    "dimensions": with_tensor(struct.pack("<I", 2**32 - 1)),
    "shape": with_tensor(struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    "place": with_tensor(struct.pack("<IQIQ", 1, 4, 0, 2**63)),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_numbers_end_in_one_line_soon(name, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(ABSURD[name] + bytes(64))
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"tiny\.gguf") as refusal:
        open_source(path)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["embedding_length", "feed_forward_length", "attention.head_count", "vocab_size"])
@pytest.mark.parametrize("value", [2**31, 0])
def test_absurd_sizes_of_a_whole_file(key, value, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    name = string(f"llama.{key}".encode())
    data = path.read_bytes()
    at = data.index(name) + len(name) + 4
    Path(path).write_bytes(data[:at] + struct.pack("<I", value) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        open_source(path)
