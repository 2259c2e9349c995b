"""conversion/sources/gguf/config.py and rope.py: what a file says is applied or refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gguf_file import HIDDEN, write_gguf

from nsa_hf.conversion import convert, plan, verify
from nsa_hf.conversion.sources import open_source
from nsa_hf.errors import NsaError

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
        with pytest.raises(NsaError, match=message):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["attention.sliding_window", "expert_count"])
def test_nothing_of_a_kind_is_no_matter(key, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", lambda writer: writer.add_uint32(f"llama.{key}", 0))
    assert open_source(path).config.num_hidden_layers == 2
