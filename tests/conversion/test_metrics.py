"""conversion/compare/metrics.py, against loops in float64."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise

import pytest
import torch

from nsa_hf.conversion.compare.metrics import (
    NO_LABEL,
    Accumulator,
    compare_by_position,
    position_edges,
    positions_at_once,
)

VOCABULARY = 11


def random_case(tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(tokens, VOCABULARY, generator=generator) * 2
    other = reference + torch.randn(tokens, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    labels[-1] = NO_LABEL
    return reference, other, labels


def by_loops(reference, other, labels, start, end):
    rows = range(start, end)
    log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    labelled = [t for t in rows if labels[t] != NO_LABEL]
    gaps = [
        (reference[t].max() - reference[t, other[t].argmax()]).item()
        for t in rows
        if reference[t].argmax() != other[t].argmax()
    ]
    nll_reference, nll = (-sum(x[t, labels[t]].item() for t in labelled) / len(labelled) for x in (log_p, log_q))
    return {
        "from": start,
        "to": end,
        "tokens": len(rows),
        "ppl_reference": math.exp(nll_reference),
        "ppl": math.exp(nll),
        "rise": math.exp(nll - nll_reference) - 1,
        "kl": sum((log_p[t].exp() * (log_p[t] - log_q[t])).sum().item() for t in rows) / len(rows),
        "same_top1": sum(bool(reference[t].argmax() == other[t].argmax()) for t in rows) / len(rows),
        "max_abs_diff": max((reference[t] - other[t]).abs().max().item() for t in rows),
        "top1_gap": max(gaps, default=0.0),
    }


@pytest.mark.parametrize(
    ("length", "extra", "expected"),
    [
        (2048, [], [0, 512, 1024, 2048]),
        (3000, [], [0, 512, 1024, 2048, 3000]),
        (300, [64], [0, 64, 300]),
        (2048, [1024, 4096, 0], [0, 512, 1024, 2048]),
        (8192, [768], [0, 512, 768, 1024, 2048, 4096, 8192]),
    ],
)
def test_edges(length, extra, expected):
    assert position_edges(length, extra) == expected


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_rows_equal_loops_whatever_the_chunk(chunk):
    case = random_case(20)
    rows = compare_by_position(*case, edges=[0, 5, 16, 20], chunk=chunk).as_dict()
    for row, (start, end) in zip(rows, [(0, 5), (5, 16), (16, 20)], strict=True):
        assert row.pop("rise_error") is None, "of one document"
        assert row == pytest.approx(by_loops(*case, start, end), rel=1e-5)


def test_runs_and_documents_add_up_to_the_whole():
    edges = [0, 5, 16, 20]
    whole, runs, merged = Accumulator(edges), Accumulator(edges), Accumulator(edges)
    for seed in range(3):
        reference, other, labels = random_case(20, seed)
        whole.update(reference, other, labels)
        for start, end in ((0, 7), (7, 8), (8, 20)):
            runs.update(reference[start:end], other[start:end], labels[start:end], start)
        merged.merge(compare_by_position(reference, other, labels, edges))
    for rows in (runs.as_dict(), merged.as_dict()):
        for row, expected in zip(rows, whole.as_dict(), strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
    assert [row["tokens"] for row in whole.as_dict()] == [15, 33, 12]


def test_between_sums_whole_buckets():
    case = random_case(20)
    total = compare_by_position(*case, edges=[0, 5, 16, 20]).between(0, 16).as_dict()
    assert total.pop("rise_error") is None
    assert total == pytest.approx(by_loops(*case, 0, 16), rel=1e-5)


def test_the_rise_is_paired_over_documents():
    edges, cases = [0, 5, 16, 20], [random_case(20, seed) for seed in range(4)]
    together = Accumulator(edges, chunk=3)
    for case in cases:
        together.update(*case)
    for row, (start, end) in zip(together.as_dict(), pairwise(edges), strict=True):
        rises = [math.log1p(by_loops(*case, start, end)["rise"]) for case in cases]
        assert row["rise"] == pytest.approx(math.expm1(statistics.mean(rises)))
        error = math.exp(statistics.mean(rises)) * statistics.stdev(rises) / 2
        assert row["rise_error"] == pytest.approx(error, rel=1e-5)


def test_a_gpu_compares_many_positions_at_once():
    assert positions_at_once(torch.device("cpu"), 49152) == 256
    assert positions_at_once(torch.device("cuda"), 49152) == 1365
    assert positions_at_once(torch.device("cuda"), 10**6) == 256


def test_equal_logits_are_equal_and_low_precision_is_compared_in_float32():
    reference, _, labels = random_case(8)
    row = compare_by_position(reference, reference.clone(), labels, [0, 8]).as_dict()[0]
    assert (row["kl"], row["same_top1"], row["max_abs_diff"], row["top1_gap"]) == (0, 1, 0, 0)
    assert row["ppl"] == row["ppl_reference"]
    rounded = reference.bfloat16()
    row = compare_by_position(rounded, rounded.float(), labels, [0, 8]).as_dict()[0]
    assert row["max_abs_diff"] == 0


def test_a_buckets_without_tokens_or_labels_measures_nothing():
    reference, other, labels = random_case(4)
    rows = compare_by_position(reference, other, torch.full_like(labels, NO_LABEL), [0, 4, 8]).as_dict()
    assert len(rows) == 1
    assert rows[0]["ppl"] is None
    assert rows[0]["ppl_reference"] is None
    assert rows[0]["kl"] is not None


def test_nan_is_not_lost():
    reference, other, labels = random_case(6)
    other[3, 2] = math.nan
    accumulator = compare_by_position(reference, other, labels, [0, 2, 4, 6], chunk=1)
    assert math.isnan(accumulator.between(0, 6).max_abs_diff)
    rows = accumulator.as_dict()
    assert [row["max_abs_diff"] is None for row in rows] == [False, True, False]
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, o, y: (r[:, :-1], o, y, 0), "one shape"),
        (lambda r, o, y: (r, o, y[:-1], 0), "one shape"),
        (lambda r, o, y: (r[None], o[None], y, 0), "one shape"),
        (lambda r, o, y: (r, o, y, 3), "outside the edges"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Accumulator([0, 8]).update(*change(*random_case(6)))


@pytest.mark.parametrize("edges", [[], [0], [0, 0], [5, 3]])
def test_edges_must_rise(edges):
    with pytest.raises(ValueError, match="rising"):
        Accumulator(edges)


def test_only_equal_buckets_merge():
    with pytest.raises(ValueError, match="cannot merge"):
        Accumulator([0, 8]).merge(Accumulator([0, 4, 8]))
