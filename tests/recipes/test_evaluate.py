import json

import pytest
import torch
from rich.console import Console
from tiny_runs import converted, write_texts

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.evaluate import (
    compare_models,
    evaluate,
    final_states,
    mean_kl,
    render_before_after,
    render_rows,
)


def windows(count=2, length=100):
    generator = torch.Generator().manual_seed(3)
    return [(str(i), torch.randint(256, (length,), generator=generator).tolist()) for i in range(count)]


def printed(table):
    console = Console(width=200, record=True)
    console.print(table)
    return console.export_text()


def test_rows_equal_the_definition_on_whole_logits(tiny_nsa_model):
    model, texts = tiny_nsa_model(), windows()
    with model.dense_attention():
        dense = final_states(model, texts)
    rows = compare_models(model, dense, model, final_states(model, texts), texts, chunk=7)
    assert [(row["from"], row["to"], row["tokens"]) for row in rows] == [(0, 64, 128), (64, 100, 72)]
    with torch.no_grad():
        ids = torch.tensor([ids for _, ids in texts])
        sparse = model(ids).logits.log_softmax(-1)
        with model.dense_attention():
            reference = model(ids).logits.log_softmax(-1)
    kl = (reference.exp() * (reference - sparse)).sum(-1)
    nll = -sparse[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert rows[0]["kl"] == pytest.approx(kl[:, :64].mean().item(), rel=1e-4)
    assert rows[1]["kl"] == pytest.approx(kl[:, 64:].mean().item(), rel=1e-4)
    assert rows[0]["ppl"] == pytest.approx(nll[:, :64].mean().exp().item(), rel=1e-4)
    # the last position predicts nothing
    assert rows[1]["ppl"] == pytest.approx(nll[:, 64:].mean().exp().item(), rel=1e-4)
    assert mean_kl(rows) == pytest.approx(kl.mean().item(), rel=1e-4)
    assert mean_kl(rows, 64) == pytest.approx(kl[:, 64:].mean().item(), rel=1e-4)
    assert mean_kl(rows, 1000) is None


def test_final_states_leave_the_mode_as_it_was(tiny_nsa_model):
    model = tiny_nsa_model().train()
    (states,) = final_states(model, windows(1))
    assert model.training
    assert states.shape == (1, 100, 48)
    assert not states.requires_grad


def test_eval_writes_what_it_returns(tiny_dense_dir, tiny_sizes, tmp_path):
    out = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes)
    texts = write_texts(tmp_path / "texts")
    result = evaluate(out, text=str(texts), documents=2, length=128)
    assert json.loads((out / "eval.json").read_text()) == result
    assert [row["to"] for row in result["rows"]] == [64, 128]
    assert result["rows"][0]["kl"] < 1e-7 < result["rows"][1]["kl"]
    assert "64-128" in printed(render_rows(result["rows"], "title"))
    with pytest.raises(NsaError, match="too short"):
        evaluate(out, text=str(texts), documents=1, length=4000)


def test_logits_that_are_not_finite_are_no_result(tiny_nsa_model):
    """One text of two, or a few positions, would otherwise be left out of the mean without a word."""
    model, texts = tiny_nsa_model(), windows()
    states = final_states(model, texts)
    spoiled = [states[0], states[1].clone()]
    spoiled[1][0, 80] = float("nan")
    for pair in ((states, spoiled), (spoiled, states)):
        with pytest.raises(NsaError, match=r"logits are not finite \(positions 64-100\)"):
            compare_models(model, pair[0], model, pair[1], texts)


def test_an_interrupted_evaluation_leaves_the_mode_as_it_was(tiny_nsa_model, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    model = tiny_nsa_model().train()
    monkeypatch.setattr(model.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        final_states(model, windows(1))
    assert model.training


def test_before_and_after_stand_in_one_row():
    def row(ppl_reference, ppl, kl):
        return {"from": 0, "to": 2048, "ppl_reference": ppl_reference, "ppl": ppl, "kl": kl}

    held_out = {
        "names": ["x.py"],
        "before": [row(8.0, 9.0, 0.25)],
        "after": [row(8.0, 8.5, 0.125)],
        "after_own_dense": [row(8.25, 8.5, None)],
    }
    text = printed(render_before_after(held_out))
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "2,048" in line).split("│")]
    assert cells[1:-1] == ["0-2,048", "8.000", "9.000", "8.500", "8.250", "0.25000", "0.12500"]
