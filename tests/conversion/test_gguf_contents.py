"""conversion/sources/gguf/contents.py: what a file must say, may leave out, and says that is absurd."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from gguf_file import write_gguf, write_gguf_of

from nsa_hf.conversion.sources import open_source
from nsa_hf.errors import NsaError


def renamed(path: Path, key: str) -> Path:
    """The file without one of its keys."""
    path.write_bytes(path.read_bytes().replace(f"llama.{key}".encode(), f"other.{key}".encode()))
    return path


@pytest.mark.parametrize("key", ["context_length", "attention.head_count", "attention.layer_norm_rms_epsilon"])
def test_what_a_file_must_say_is_not_made_up(key, tmp_path):
    path = renamed(write_gguf(tmp_path / "tiny.gguf"), key)
    with pytest.raises(NsaError, match=rf"tiny\.gguf .*llama\.{key}"):
        open_source(path)


def test_what_it_may_leave_out_is_as_llama_cpp_has_it(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf_of("gemma3_text", path)
    path.write_bytes(path.read_bytes().replace(b"gemma3.rope.freq_base", b"other3.rope.freq_base"))
    assert open_source(path).config.rope_parameters["full_attention"]["rope_theta"] == 10000.0


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(write_gguf(path).read_bytes().replace(b"llama", b"lmaaa"))
    with pytest.raises(NsaError, match="architecture 'lmaaa', and of GGUF files those of llama, qwen2"):
        open_source(path)


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
    with pytest.raises(NsaError, match=r"tiny\.gguf") as refusal:
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
    with pytest.raises(NsaError, match=r"tiny\.gguf"):
        open_source(path)
