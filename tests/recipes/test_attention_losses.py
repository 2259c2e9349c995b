"""recipes/training/attention_losses.py and selector_losses.py: each attention's output and selector, by themselves."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_runs import result_of, stop_at, tiny_run, weights_of

from nsa_hf.recipes.load import load_nsa_model
from nsa_hf.recipes.training.attention_losses import AttentionLossModel, attention_outputs
from nsa_hf.recipes.training.config import make_run_config
from nsa_hf.recipes.training.loop import train
from nsa_hf.recipes.training.selector_losses import (
    Blocks,
    bce_of_top_blocks,
    kl_of_mass,
    sample_queries,
    score_blocks,
    selector_loss,
)
from nsa_hf.releases import checkpoint_activations

PLAIN = {"ce_weight": 0.0, "kl_weight": 1.0, "chunk": 64}


@pytest.fixture
def paper(nsa_dir):
    """A tiny model with the paper's selector."""
    return load_nsa_model(nsa_dir).train()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 256, (2, 128), generator=torch.Generator().manual_seed(0))


def losses_of(folder, ids, checkpointing=0, **weights):
    """The losses of a batch and every parameter's gradient."""
    torch.manual_seed(0)
    student, teacher = load_nsa_model(folder).train(), load_nsa_model(folder).requires_grad_(False)
    checkpoint_activations(student, checkpointing)
    stage = make_run_config({"model": "a", "out": "b", **weights})
    losses = AttentionLossModel(student, teacher, stage=stage, **PLAIN)(ids)
    losses.total.backward()
    return losses, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weights", [{"layer_weight": 3.0}, {"selector_weight": 3.0}], ids=["layer", "selector"])
def test_gradients_are_the_same_under_checkpointing(nsa_dir, ids, weights):
    plain_losses, plain = losses_of(nsa_dir, ids)
    losses, gradients = losses_of(nsa_dir, ids, **weights)
    again, checkpointed = losses_of(nsa_dir, ids, checkpointing=1, **weights)
    assert losses.kl == plain_losses.kl
    total = losses.total.item()
    assert total == pytest.approx((losses.kl + 3 * (losses.layer + losses.selector)).item())
    assert again.total.item() == total > plain_losses.total.item()
    # the loss has a gradient of its own, and checkpointing does not take it away
    part = "compress_k" if "selector_weight" in weights else "self_attn.o_proj"
    own = {n for n in gradients if part in n and not torch.allclose(gradients[n], plain[n], rtol=1e-3, atol=1e-9)}
    assert {name.split(".")[2] for name in own} >= {"0", "1"}
    assert gradients.keys() == checkpointed.keys()
    for name in gradients:
        assert torch.allclose(gradients[name], checkpointed[name], rtol=1e-4, atol=1e-7), name


def test_the_selectors_loss_moves_the_key_compressors_alone(nsa_dir, ids):
    _, plain = losses_of(nsa_dir, ids)
    _, gradients = losses_of(nsa_dir, ids, selector_weight=1.0)
    moved = {name for name in gradients if not torch.equal(gradients[name], plain[name])}
    assert moved and all(".nsa.compress_k." in name for name in moved)


def test_outputs_are_those_of_the_attention_and_of_the_first_pass(paper, ids):
    checkpoint_activations(paper, 1)
    with attention_outputs(paper) as outputs:
        loss = paper(ids).logits.sum()
    first = dict(outputs)
    assert list(first) == [f"model.layers.{i}.self_attn" for i in range(len(first))]
    assert all(output.shape == (2, 128, 48) and output.requires_grad for output in first.values())
    loss.backward()
    assert all(outputs[name] is first[name] for name in first)


def test_attention_is_recorded_once_and_without_gradients(paper, ids):
    checkpoint_activations(paper, 1)
    with paper.record_attention() as attended:
        loss = paper(ids).logits.sum()
        first = dict(attended)
        loss.backward()
        assert {i: id(record) for i, record in attended.items()} == {i: id(record) for i, record in first.items()}
    assert not any(record.query.requires_grad or record.key.requires_grad for record in first.values())
    with paper.dense_attention(), paper.record_attention() as none:
        paper(ids)
    assert none == {}


def test_scores_and_mass_by_hand(paper, ids):
    """The mass is that of dense attention, the scores choose the blocks that the operation chose."""
    with paper.record_attention() as attended, paper.record_selection() as selected, torch.no_grad():
        paper(ids)
    sizes, rows = paper.config.nsa_sizes, torch.tensor([70, 93, 127])
    for layer, record in attended.items():
        compressor = next(m for m in paper.attention_layers() if m.layer_idx == layer).nsa.compress_k
        blocks = score_blocks(record, compressor, sizes, rows)
        group = record.query.shape[1] // record.key.shape[1]
        logits = record.query[:, :, rows] @ record.key.repeat_interleave(group, 1).transpose(-1, -2) * record.scale
        weights = logits.masked_fill(torch.arange(128) > rows[:, None], float("-inf")).softmax(-1)
        by_hand = weights.unflatten(1, (-1, group)).sum(2).unflatten(-1, (-1, sizes.block_size)).sum(-1)
        assert torch.allclose(blocks.mass, by_hand, atol=1e-5)
        choices = sizes.topk - sizes.init_blocks - sizes.local_blocks
        best = blocks.scores.masked_fill(~blocks.open, -1).topk(choices, -1).indices.sort().values
        for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in best.shape[:3])):
            chosen = set(selected[layer][b, rows[r], h].tolist())
            assert set(best[b, h, r].tolist()) <= chosen


def test_packed_documents_are_scored_by_themselves(paper, ids):
    """Each as if it stood alone."""
    documents = [ids[:1, :96], ids[1:, :128]]
    packed = torch.cat(documents, 1)
    position_ids = torch.cat([torch.arange(96), torch.arange(128)])[None]
    with paper.record_attention() as together, torch.no_grad():
        paper(packed, position_ids=position_ids)
    with paper.record_attention() as alone, torch.no_grad():
        paper(documents[1])
    sizes = paper.config.nsa_sizes
    compressor = next(paper.attention_layers()).nsa.compress_k
    rows = torch.tensor([80, 127])
    one, other = (
        score_blocks(together[0], compressor, sizes, rows + 96),
        score_blocks(alone[0], compressor, sizes, rows),
    )
    count = other.mass.shape[-1]
    for packed_part, part in zip(one, other, strict=True):
        assert torch.allclose(packed_part[..., :count].float(), part.float(), atol=1e-5)
    assert not one.open[..., count:].any()


def test_the_losses_by_hand():
    mass = torch.tensor([[[[0.5, 0.2, 0.2, 0.1]]]])
    is_open = torch.tensor([[[[False, True, True, True]]]])
    scores = torch.tensor([[[[0.9, 0.1, 0.1, 0.8]]]])
    target, shares = [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]
    by_hand = sum(t * math.log(t / s) for t, s in zip(target, shares, strict=True))
    assert kl_of_mass(Blocks(scores, mass, is_open)).item() == pytest.approx(by_hand, rel=1e-5)
    assert kl_of_mass(Blocks(mass, mass, is_open)).item() == pytest.approx(0, abs=1e-6)
    # one choice: the threshold is between .8 and .1; the dense attention's top block is number 1
    scores = torch.tensor([[[[0.9, 0.4, 0.1, 0.8]]]])
    mass = torch.tensor([[[[0.5, 0.3, 0.1, 0.1]]]])
    threshold = math.sqrt(0.8 * 0.4)
    chances = [0.4 / (0.4 + threshold), 0.1 / (0.1 + threshold), 0.8 / (0.8 + threshold)]
    by_hand = -(math.log(chances[0]) + math.log(1 - chances[1]) + math.log(1 - chances[2])) / 3
    assert bce_of_top_blocks(Blocks(scores, mass, is_open), 1).item() == pytest.approx(by_hand, rel=1e-5)


def test_rows_have_a_choice_and_no_row_comes_twice():
    torch.manual_seed(0)
    rows = sample_queries(128, 64, 20, torch.device("cpu"))
    assert len(rows) == len(set(rows.tolist())) == 20 and rows.min() >= 64 and rows.max() < 128
    assert sample_queries(70, 64, 20, torch.device("cpu")).tolist() == list(range(64, 70))


@pytest.mark.parametrize("kind", ["kl", "bce"])
def test_the_loss_falls_and_the_selector_gets_better(paper, ids, kind):
    """The compressors are trained by this loss alone; more of the dense attention's top blocks are selected."""
    sizes, layer = paper.config.nsa_sizes, next(paper.attention_layers())
    with paper.record_attention() as attended, torch.no_grad():
        paper(ids)
    record, compressor, rows = attended[0], layer.nsa.compress_k, torch.arange(64, 128)
    choices = sizes.topk - sizes.init_blocks - sizes.local_blocks

    def found():
        blocks = score_blocks(record, compressor, sizes, rows)
        tops = [x.masked_fill(~blocks.open, -1).topk(choices, -1).indices for x in (blocks.scores, blocks.mass)]
        return (tops[0][..., None] == tops[1][..., None, :]).float().mean().item()

    before = found()
    optimizer = torch.optim.AdamW(compressor.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = selector_loss(record, compressor, sizes, rows, kind)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert found() > before


def test_a_run_records_both_and_goes_on_exactly(nsa_dir, texts, tmp_path):
    settings = {"layer_weight": 0.5, "selector_weight": 0.5, "ce_weight": 0.0, "selector_queries": 16}
    whole = train(tiny_run(nsa_dir, texts, tmp_path / "whole", **settings))
    for row in result_of(whole)["curve"]:
        assert row["layer"] > 0 and row["selector"] > 0
        assert row["loss"] == pytest.approx(row["kl"] + 0.5 * (row["layer"] + row["selector"]), rel=1e-5)
    config = tiny_run(nsa_dir, texts, tmp_path / "stopped", **settings)
    stop_at(config, 2)
    assert (train(config) / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    before, after = weights_of(nsa_dir), weights_of(whole)
    name = "model.layers.0.self_attn.nsa.compress_k.up.weight"
    assert not torch.equal(before[name], after[name])
