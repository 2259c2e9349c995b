import pytest
import torch
from rich.console import Console

from nsa_hf.errors import NsaError
from nsa_hf.recipes.evaluation.perplexity import (
    Way,
    batches,
    compare,
    mean_kl,
    render_before_after,
    show,
    show_rise,
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
    (rows,) = compare([(Way(model, dense=True), Way(model))], texts, chunk=7)
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


def test_each_way_runs_once_over_a_text(tiny_nsa_model, monkeypatch):
    """And the mode is afterwards as it was."""
    teacher, student, ran = tiny_nsa_model(), tiny_nsa_model().train(), []
    student.get_input_embeddings().weight.data *= 1.5
    states = Way.states
    monkeypatch.setattr(Way, "states", lambda way, *others: ran.append(way) or states(way, *others))
    ways = [Way(teacher, dense=True), Way(student), Way(student, dense=True)]
    texts = windows()
    beside_teacher, beside_own = compare([(ways[0], ways[1]), (ways[2], ways[1])], texts)
    assert ran == [ways[0], ways[1], ways[2]] * 2
    assert student.training and not teacher.training
    assert [beside_teacher] == compare([(ways[0], ways[1])], texts)
    assert [beside_own] == compare([(ways[2], ways[1])], texts)
    assert beside_own[0]["kl"] != beside_teacher[0]["kl"]
    assert beside_teacher[0]["ppl"] == beside_own[0]["ppl"]


@pytest.mark.parametrize("tokens", [0, 199, 200, 10_000])
def test_neighbours_of_one_length_go_together(tokens):
    texts = [(str(number), [0] * length) for number, length in enumerate((100, 100, 100, 50, 100))]
    together = [[name for name, _ in batch] for batch in batches(texts, tokens)]
    expected = {0: [["0"], ["1"], ["2"], ["3"], ["4"]], 200: [["0", "1"], ["2"], ["3"], ["4"]]}
    expected |= {199: expected[0], 10_000: [["0", "1", "2"], ["3"], ["4"]]}
    assert together == expected[tokens]


def test_texts_that_run_together_are_compared_each_by_itself(tiny_nsa_model):
    model, texts = tiny_nsa_model(), windows()
    pair = [(Way(model, dense=True), Way(model))]
    (apart,) = compare(pair, texts)
    (together,) = compare(pair, texts, tokens_at_once=200)
    for one, other in zip(apart, together, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-7)


def test_logits_that_are_not_finite_are_no_result(tiny_nsa_model, monkeypatch):
    """One text of two, or a few positions, would otherwise be left out of the mean without a word."""
    model, texts = tiny_nsa_model(), windows()
    states = Way.states
    for spoiled in (Way(model, dense=True), Way(model)):

        def with_nan(way, ids, autocast, spoiled=spoiled):
            given = states(way, ids, autocast)
            if way == spoiled and ids[0].tolist() == texts[1][1]:
                given[0, 80] = float("nan")
            return given

        with monkeypatch.context() as patch:
            patch.setattr(Way, "states", with_nan)
            with pytest.raises(NsaError, match=r"logits are not finite \(positions 64-100\)"):
                compare([(Way(model, dense=True), Way(model))], texts)


def test_an_interrupted_evaluation_leaves_the_mode_as_it_was(tiny_nsa_model, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    model = tiny_nsa_model().train()
    monkeypatch.setattr(model.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare([(Way(model, dense=True), Way(model))], windows(1))
    assert model.training


def test_before_and_after_stand_in_one_row():
    def row(ppl_reference, ppl, kl, **rise):
        return {"from": 0, "to": 2048, "ppl_reference": ppl_reference, "ppl": ppl, "kl": kl, **rise}

    held_out = {
        "names": ["x.py"],
        "before": [row(8.0, 9.0, 0.25, rise=0.125, rise_error=0.002)],
        "after": [row(8.0, 8.5, 0.125, rise=0.0625, rise_error=None)],
        "after_own_dense": [row(8.25, 8.5, None)],
    }
    text = printed(render_before_after(held_out))
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "2,048" in line).split("│")]
    assert cells[1:-1] == [
        "0-2,048",
        "8.000",
        "9.000",
        "8.500",
        "8.250",
        "+12.50% ± 0.20%",
        "+6.25%",
        "0.25000",
        "0.12500",
    ]
    alone = printed(render_before_after({**held_out, "teacher": "none"}))
    assert ("teacher" in text, "teacher" in alone, "before, run dense" in alone) == (True, False, True)


def test_what_is_shown_as_zero_has_no_sign():
    assert [show(value, ".5f") for value in (-1e-7, 0.0, -0.25, None)] == ["0.00000", "0.00000", "-0.25000", "-"]
    assert show_rise({"rise": -1e-6, "rise_error": 0.001}) == "0.00% ± 0.10%"
    assert [show_rise({"rise": rise}) for rise in (1e-6, -0.01, 0.01)] == ["0.00%", "-1.00%", "+1.00%"]
