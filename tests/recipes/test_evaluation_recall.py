"""Recall of the blocks that dense attention looks at, against loops over whole attention weights."""

from __future__ import annotations

import weakref

import pytest
import torch

from nsa_hf import attention
from nsa_hf.recipes.evaluation.recall import recall_by_layer


def by_loops(model, ids, rows, layer):
    """From Transformers' weights of the dense model: layer 0 has the same input dense and sparse."""
    config = model.config
    model.set_attn_implementation("eager")
    with model.dense_attention():
        weights = model(ids, output_attentions=True).attentions[layer][0]  # [Hq, T, S]
    with model.record_selection() as selection:
        model(ids)
    size, heads, hits, wanted, captured, oracle = config.nsa_block_size, config.num_key_value_heads, 0, 0, 0.0, 0.0
    for row in rows:
        own = row // size
        forced = {0, own}
        for head, group in enumerate(weights.unflatten(0, (heads, -1))):
            mass = [float(group[:, row, b * size : (b + 1) * size].sum(-1).mean()) for b in range(own + 1)]
            free = sorted((b for b in range(own + 1) if b not in forced), key=lambda b: -mass[b])
            best = set(free[: config.nsa_topk - len(forced)])
            chosen = {int(b) for b in selection[layer][0, row, head] if b >= 0}
            hits, wanted = hits + len(best & chosen), wanted + len(best)
            captured += sum(mass[b] for b in chosen)
            oracle += sum(mass[b] for b in best | forced)
    return hits / wanted, captured / len(rows) / heads, oracle / len(rows) / heads


@torch.no_grad()
def test_recall_is_that_of_whole_attention(tiny_nsa_model):
    model = tiny_nsa_model()
    ids = torch.randint(256, (1, 150), generator=torch.Generator().manual_seed(5))
    window = ("text", ids[0].tolist())
    rows = recall_by_layer(model, [window, window], queries=9)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    positions = torch.linspace(64, 149, 9).long().tolist()
    expected = by_loops(model, ids, positions, layer=0)
    assert (rows[0]["recall"], rows[0]["captured"], rows[0]["oracle"]) == pytest.approx(expected, rel=1e-5)
    assert 0 < rows[0]["recall"] < 1


def test_only_one_layer_at_a_time_is_in_memory(tiny_nsa_model, monkeypatch):
    """Queries and keys of all layers of a long text would be several times the model."""
    made, alive, whole = [], [], attention.Attended

    def noting(query, key, *rest):
        made.append(weakref.ref(key))
        alive.append(sum(other() is not None for other in made))
        return whole(query, key, *rest)

    monkeypatch.setattr(attention, "Attended", noting)
    assert len(recall_by_layer(tiny_nsa_model(), [("text", list(range(100)))])) == 3
    assert alive == [1, 1, 1]


def test_nothing_is_up_for_choice_in_a_short_text(tiny_nsa_model):
    assert recall_by_layer(tiny_nsa_model(), [("text", list(range(64)))]) == []
