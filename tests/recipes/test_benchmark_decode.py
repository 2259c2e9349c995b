"""The decode benchmark on a CPU: what it refuses, what it calls wrong, and its run with the clock of the CPU."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch

from nsa_hf.recipes.benchmarks import common as benchmark_common
from nsa_hf.recipes.benchmarks import decode as benchmark_decode
from nsa_hf.recipes.benchmarks.common import Heads
from nsa_hf.recipes.benchmarks.decode import WrongResult, check, dense, make_cache, make_query, measure_shape, nsa
from nsa_hf.recipes.benchmarks.figures import COLUMNS, SPARSE

HEADS = Heads.parse("6:2:16")


def on_cpu(steps):
    """`timed` without a graph."""
    start = time.perf_counter()
    results = [step() for step in steps]
    each = (time.perf_counter() - start) / len(steps) * 1e3
    return (each, each, each), results[0]


def test_without_a_gpu(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark_decode.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("queries", [1, 3])
def test_dense_is_attention_to_every_key(queries: int) -> None:
    cache, query = make_cache(HEADS, 80, 2, "cpu"), make_query(HEADS, 2, queries, "cpu")
    cache, query = (type(x)(*(y.double() for y in x)) for x in (cache, query))
    keys, values = (x.repeat_interleave(3, dim=1) for x in (cache.keys, cache.values))
    weights = torch.einsum("bthd,bhsd->bths", query.q, keys).mul(16**-0.5).softmax(-1)
    truth = torch.einsum("bths,bhsd->bthd", weights, values)
    for fold in (False, True):
        torch.testing.assert_close(dense(cache, query, fold), truth)


def test_the_check_sees_a_wrong_output_and_a_wrong_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, query = make_cache(HEADS, 1600, 3, "cpu", 2), make_query(HEADS, 3, 2, "cpu")
    assert check(cache, query, "reference") == []

    def spoiled(change):
        def call(cache, query, backend, *system, **options):
            out, selection = nsa(cache, query, backend, *system, **options)
            if query.q.dtype == torch.bfloat16:
                change(out, selection)
            return out, selection

        return call

    def wrong(change) -> list[str]:
        monkeypatch.setattr(benchmark_decode, "nsa", spoiled(change))
        return check(cache, query, "reference")

    assert "row 2: the output is off by 0.0" in wrong(lambda out, _: out[2].mul_(1.03))[0]
    assert "row 0: the output is off by nan" in wrong(lambda out, _: out[0, 0, 0, 0].fill_(float("nan")))[0]
    assert "selected blocks are others" in wrong(lambda _, selection: selection[0].add_(1))[0]
    # one block instead of an equally good one, in one group of four: its output is not looked at
    assert wrong(lambda out, selection: (selection[0, 0, 0, :1].fill_(99), out[0, 0, :3].zero_())) == []


@pytest.mark.parametrize("system", SPARSE)
def test_every_system_is_right(system: str) -> None:
    cache, query = make_cache(HEADS, 1600, 2, "cpu", 2), make_query(HEADS, 2, 2, "cpu")
    assert check(cache, query, "reference", system) == []


@pytest.mark.parametrize("queries", [1, 3])
def test_a_window_of_its_own(queries: int) -> None:
    """With the keys and values of the other branches in it, it is theirs."""
    cache, query = make_cache(HEADS, 600, 2, "cpu", queries), make_query(HEADS, 2, queries, "cpu")
    assert cache.k_win.shape == cache.v_win.shape == (2, 2, 512 + queries - 1, 16)
    assert check(cache, query, "reference", "nsa-independent") == []
    shared, own = nsa(cache, query, "reference"), nsa(cache, query, "reference", "nsa-independent")
    assert (shared - own).norm() > 0.1 * shared.norm()
    near = {f"{x}_win": held[:, :, 600 - 511 - queries :] for x, held in (("k", cache.keys), ("v", cache.values))}
    again = nsa(cache._replace(**near), query, "reference", "nsa-independent")
    torch.testing.assert_close(again, shared)


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_decode, "check", lambda *_: ["row 0: all of it"])
    monkeypatch.setattr(benchmark_decode, "COLD", 1)
    with pytest.raises(WrongResult, match="all of it"):
        list(measure_shape(HEADS, 64, 1, 1, "cpu", "reference"))


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Everything but the graph and the GPU: PyTorch's own kernels are refused on a CPU, except flash attention."""
    stamp = dict(zip(benchmark_common.STAMP, ("run", "CPU", "2", "3", "abc"), strict=True))
    shape = measure_shape
    monkeypatch.setattr(benchmark_decode, "no_gpu", lambda: False)
    monkeypatch.setattr(benchmark_decode, "stamp", lambda commit: stamp)
    monkeypatch.setattr(benchmark_decode, "card_rates", lambda: (1e12, 1e10, iter(())))
    monkeypatch.setattr(benchmark_decode, "timed", on_cpu)
    monkeypatch.setattr(benchmark_decode, "COLD", 200_000)
    monkeypatch.setattr(benchmark_decode, "measure_shape", lambda *shape_of: shape(*shape_of, "cpu", "reference"))
    out = tmp_path / "decode.csv"
    arguments = ["--configs", "6:2:16", "--tokens", "64,1600", "--batches", "2,1", "--out", str(out)]
    assert benchmark_decode.main(arguments) == 0
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        rows = list(reader)
    for system in SPARSE:
        ours = [(row["tokens"], row["batch"]) for row in rows if row["system"] == system]
        assert ours == [("64", "2"), ("64", "1"), ("1600", "2"), ("1600", "1")]
    for row in rows:
        assert float(row["median_ms"]) > 0 and row["commit"] == "abc"
        assert (row["times_dense"] != "") == row["system"].startswith("nsa")
    assert {row["system"] for row in rows} == {"flash", "flash, folded", *SPARSE}
    fastest = min(float(row["median_ms"]) for row in rows[:2])
    # the last digits of both are rounded off
    assert float(rows[2]["times_dense"]) == pytest.approx(fastest / float(rows[2]["median_ms"]), abs=0.02)
    text = capsys.readouterr().out
    assert "cudnn: not measured" in text and "6:2:16 batch 1, nsa: " in text
    assert out.with_suffix(".png").exists()


def test_batches_by_rows_or_size(capsys: pytest.CaptureFixture) -> None:
    assert benchmark_decode.batch_sizes("4GiB,1") == [(4, "GiB"), (1, "rows")]
    for wrong in ("full", "4gib", "0.5GiB", "0", "1,"):
        with pytest.raises(SystemExit):
            benchmark_decode.main(["--batches", wrong])
        assert "whole numbers of rows or of GiB, as in 4GiB,1, got " in capsys.readouterr().err
