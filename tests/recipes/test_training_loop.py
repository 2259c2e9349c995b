"""recipes/training/loop.py: what a run learns, and with which settings it learns the same."""

from __future__ import annotations

import re
from contextlib import closing

import pytest
import torch
from tiny_runs import converted, result_of, tiny_run, weights_of, write_texts
from transformers import AutoModelForCausalLM

from nsa_hf.recipes.training.loop import train
from nsa_hf.recipes.training.stages import stages_of
from nsa_hf.recipes.training.texts import read_texts


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


def test_packed_texts_count_as_each_by_itself(nsa_dir, tmp_path):
    """The losses of the first step are those of the two models on each text alone."""
    texts = write_texts(tmp_path / "texts", count=6, words=12)  # of some 45 tokens, and the first window has 128
    config = tiny_run(nsa_dir, texts, tmp_path / "out", steps=1, ce_weight=1.0, held_out_length=32, batch_size=2)
    row = result_of(train(config))["curve"][0]
    stages = stages_of(config)
    with closing(read_texts(config, stages, {}).stages[0].batches(0, 1, vocabulary=10**6)) as batches:
        batch = next(batches)
    assert batch["input_ids"].shape == (1, 256)
    model = AutoModelForCausalLM.from_pretrained(nsa_dir).eval()
    ends = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist()[1:], 256]
    ce = kl = counted = 0
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        ids = batch["input_ids"][:, start:end]
        with torch.no_grad():
            sparse = model(ids).logits[0, :-1].log_softmax(-1)
            with model.dense_attention():
                dense = model(ids).logits[0, :-1].log_softmax(-1)
        ce -= sparse.gather(1, ids[0, 1:, None]).sum()
        kl += (dense.exp() * (dense - sparse)).sum()
        counted += ids.shape[1] - 1
    assert len(ends) > 4
    assert row["ce"] == pytest.approx(float(ce / counted), rel=1e-5)
    assert row["kl"] == pytest.approx(float(kl / counted), abs=1e-6)


def test_what_is_dropped_is_said(nsa_dir, tmp_path, capsys):
    texts = write_texts(tmp_path / "texts", count=2, words=100)
    write_texts(tmp_path / "texts/short", count=3, words=12)
    held_out = str(texts / "0.txt")
    settings = {"held_out": held_out, "held_out_documents": 1, "steps": 16}  # several times through all
    train(tiny_run(nsa_dir, texts, tmp_path / "a", pack=False, **settings))
    assert re.search(r"^3 texts had fewer than 128 tokens and were dropped; pack=true", capsys.readouterr().out, re.M)
    train(tiny_run(nsa_dir, texts, tmp_path / "b", **settings | {"steps": 2}))
    assert "were dropped" not in capsys.readouterr().out
