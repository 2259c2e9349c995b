"""recipes/training/loop.py: what a run learns, and with which settings it learns the same."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import converted, result_of, tiny_run, weights_of
from transformers import AutoModelForCausalLM

from nsa_hf.recipes.training.loop import train


def test_kl_to_the_teacher_falls_when_it_is_the_loss(nsa_dir, texts, tmp_path):
    config = tiny_run(nsa_dir, texts, tmp_path / "out", steps=60, ce_weight=0.0, lr_backbone=1e-4, lr_nsa=1e-3)
    held_out = result_of(train(config))["held_out"]
    assert held_out["kl_after"] < 0.8 * held_out["kl_before"]


def test_next_token_loss_falls(nsa_dir, texts, tmp_path):
    config = tiny_run(nsa_dir, texts, tmp_path / "out", steps=12, kl_weight=0.0, lr_backbone=1e-2)
    curve = result_of(train(config))["curve"]
    assert curve[-1]["ce"] < curve[0]["ce"] - 0.5
    assert all(row["kl"] == 0 for row in curve)


def test_rate_zero_freezes(nsa_dir, texts, tmp_path):
    old, new = weights_of(nsa_dir), weights_of(train(tiny_run(nsa_dir, texts, tmp_path / "out", lr_backbone=0.0)))
    for name in old:
        if ".nsa." not in name:
            assert torch.equal(old[name], new[name]), name
    assert not torch.equal(
        old["model.layers.0.self_attn.nsa.gate.down.weight"], new["model.layers.0.self_attn.nsa.gate.down.weight"]
    )


def test_accumulated_windows_count_as_one_batch(nsa_dir, texts, tmp_path):
    batch = result_of(train(tiny_run(nsa_dir, texts, tmp_path / "a", batch_size=2)))
    accumulated = result_of(train(tiny_run(nsa_dir, texts, tmp_path / "b", accumulate=2)))
    for one, other in zip(batch["curve"], accumulated["curve"], strict=True):
        assert one["ce"] == pytest.approx(other["ce"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_gradient_checkpointing_changes_memory_only(nsa_dir, texts, tmp_path, finished):
    for every in (1, 2):
        out = train(tiny_run(nsa_dir, texts, tmp_path / str(every), gradient_checkpointing=every))
        for one, other in zip(result_of(out)["curve"], result_of(finished[0])["curve"], strict=True):
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_bf16_autocast_keeps_fp32_weights(nsa_dir, texts, tmp_path, finished):
    out = train(tiny_run(nsa_dir, texts, tmp_path / "a", mixed_precision="bf16"))
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.float32}
    bf16, fp32 = (result_of(folder)["curve"][0]["ce"] for folder in (out, finished[0]))
    assert bf16 == pytest.approx(fp32, rel=2e-2)
    assert bf16 != fp32


def test_the_gates_blend_in(tiny_dense_dir, tiny_sizes, texts, tmp_path):
    model = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes, gate="blend")
    out = train(tiny_run(model, texts, tmp_path / "out", gate_blend_steps=2))
    assert AutoModelForCausalLM.from_pretrained(out).config.nsa_gate_blend == 1.0
    assert AutoModelForCausalLM.from_pretrained(model).config.nsa_gate_blend == 0.0
