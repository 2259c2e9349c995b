"""The generate benchmark on a CPU, with a tiny model: what it measures, refuses and draws."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_inputs import Shape as InputShape
from attention_inputs import make_inputs
from transformers import CompileConfig, DynamicCache

from nsa_hf.kernels import nsa_attention
from nsa_hf.recipes.benchmarks import generate as benchmark_generate
from nsa_hf.recipes.benchmarks.common import STAMP, Heads, save_figure, write_rows
from nsa_hf.recipes.benchmarks.generate import (
    COLUMNS,
    decode,
    draw,
    fastest_dense,
    first_token,
    graphs,
    main,
)
from nsa_hf.recipes.benchmarks.logits import COMPARED, Errors, check, row_errors, with_another_bit
from nsa_hf.recipes.benchmarks.models import Shape, filled_cache, make_model, select_these

MODEL, HEADS, TOKENS = "qwen3:2:48:64:256", Heads.parse("6:2:16"), 300


@pytest.fixture(scope="module", params=["nsa", "dense"])
def model(request: pytest.FixtureRequest):
    return request.param, make_model(Shape(MODEL, HEADS), 512, request.param == "nsa", "cpu")


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(256, (1, TOKENS)).expand(2, -1)


@torch.no_grad()
def test_steps_are_timed_one_by_one(model, ids: torch.Tensor) -> None:
    name, made = model
    system = "nsa" if name == "nsa" else "dense-static"
    shapes, started = [], time.perf_counter()
    hook = made.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    times, before, errors = decode(made, ids, system, 5)
    whole = time.perf_counter() - started
    hook.remove()
    assert len(times) == 5 and min(times) > 0 and before > 0
    assert set(errors) == ({"compiled_error", "kernels_error", "one_bit_error"} if name == "nsa" else set())
    assert sum(times) + before <= whole
    # the prompt but for one token is read once, in one row
    assert shapes[0] == (1, TOKENS - 1) and set(shapes[1:]) == {(2, 1)}
    compared = 1 + 4 * COMPARED if name == "nsa" else 0
    assert len(shapes) == 1 + compared + 2 * benchmark_generate.WARM_UP + 5


@torch.no_grad()
def test_the_timed_steps_are_compiled_before(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where Transformers compiles by itself: one graph, the same for all steps and all calls."""
    made = make_model(Shape(MODEL, HEADS), 512, True, "cpu")
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    monkeypatch.setattr(made.generation_config, "compile_config", compiled)
    torch._dynamo.reset()
    graphs()
    times, before, _ = decode(made, ids, "nsa", 3)
    assert graphs() == "1 graphs compiled, 0 breaks, 0 CUDA graphs skipped"
    assert max(times) < before / 5, "compiling is not among the steps"
    torch._dynamo.reset()


@torch.no_grad()
def test_first_token(model, ids: torch.Tensor) -> None:
    name, made = model
    times, before = first_token(made, ids, "nsa" if name == "nsa" else "dense-flash", repeats=3)
    assert len(times) == 3 and min(times) > 0 and before > 0


@torch.no_grad()
def test_a_wrong_step_is_not_timed(model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    name, made = model
    if name == "dense":
        return
    cache = filled_cache(made, ids[:, :-1], "nsa", TOKENS + 16)
    errors = check(made, ids, cache)
    assert max(errors.compiled, errors.kernels) < 0.01 and not errors.wrong
    forward = made.model.forward

    def spoiled(*args, **kwargs):
        result = forward(*args, **kwargs)
        if made.config._attn_implementation == "nsa":
            result.last_hidden_state.mul_(1.5)
        return result

    monkeypatch.setattr(made.model, "forward", spoiled)
    with pytest.raises(ArithmeticError, match=r"off by 0\.000 of their norm by compiling, 0\.5"):
        decode(made, ids, "nsa", 2)


@torch.no_grad()
def test_wrongly_compiled_is_not_timed(model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    name, made = model
    if name == "dense":
        return
    generate = made.generate

    def spoiled(*args, **kwargs):
        result = generate(*args, **kwargs)
        result.logits[-1].mul_(0.8)
        return result

    monkeypatch.setattr(made, "generate", spoiled)
    with pytest.raises(ArithmeticError, match=r"off by 0\.200 of their norm by compiling, 0\.0"):
        decode(made, ids, "nsa", 2)


@pytest.mark.parametrize(
    ("errors", "wrong"),
    [
        ((0.02, 0.05, 0.03), False),
        ((0.07, 0.05, 0.03), True),
        ((0.02, 0.11, 0.03), True),
        ((0.15, 0.05, 0.2), True),
        ((0.0, 0.05, 0.0), False),
        ((float("nan"), 0.05, 0.03), True),
        ((0.02, float("nan"), 0.03), True),
        ((0.02, 0.05, float("nan")), True),
    ],
)
def test_compiling_may_change_what_a_rounding_does(errors: tuple[float, float, float], wrong: bool) -> None:
    assert Errors(*errors).wrong == wrong


def test_every_row_of_every_step_is_compared() -> None:
    right, spoiled = torch.ones(2, 3), torch.tensor([[1.0, 1.0, 1.0], [1.0, float("nan"), 1.0]])
    found = row_errors([right * 1.5, spoiled], [right, right])
    assert found[:3].tolist() == pytest.approx([0.5, 0.5, 0]) and math.isnan(found[3])
    assert found.max().isnan() and found.min().isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_bit_is_that_of_one_number_a_token(dtype: torch.dtype) -> None:
    embedded = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed = with_another_bit(None, None, embedded)
    assert (changed != embedded).sum(-1).tolist() == [[1] * 3] * 2
    share = ((changed - embedded).abs().amax(-1) / embedded.abs().amax(-1)).double()
    assert (share <= torch.finfo(dtype).eps).all() and (share > torch.finfo(dtype).eps / 3).all()


def test_the_reference_takes_given_blocks() -> None:
    shape = InputShape(queries=1, keys=200)
    inputs = make_inputs(shape, dtype=torch.float32) | {"backend": "reference", "return_selection": True}
    out, selection = nsa_attention(**inputs)
    others = selection.clone()
    others[..., 1] = torch.where(selection[..., 1] == 7, 8, 7)
    with select_these([selection, others]):
        again, changed = (nsa_attention(**inputs) for _ in range(2))
    assert torch.equal(again[0], out) and torch.equal(changed[1], others)
    assert not torch.allclose(changed[0], out)
    assert torch.equal(nsa_attention(**inputs)[1], selection)


def row(**changes) -> dict:
    same = dict.fromkeys(STAMP, "x") | {"model": MODEL, "config": "6:2:16", "batch": 1, "phase": "first-token"}
    return same | {"tokens": 64, "system": "nsa", "median_ms": "5.0"} | changes


def test_the_fastest_dense_of_the_same_shape(tmp_path: Path) -> None:
    path = tmp_path / "generate.csv"
    assert fastest_dense(path, row()) is None
    others = [row(system="dense-a", median_ms="1", **change) for change in ({"tokens": 128}, {"gpu": "y"})]
    ours = [row(system="dense-a", median_ms="9.5"), row(system="dense-b", median_ms="8.5"), row(median_ms="2")]
    write_rows(path, COLUMNS, [*others, *ours])
    assert fastest_dense(path, row()) == 8.5


def test_decoding_is_held_against_compiled_dense_steps(tmp_path: Path) -> None:
    path, step = tmp_path / "generate.csv", row(phase="decode")
    write_rows(path, COLUMNS, [row(phase="decode", system="dense-cut", median_ms="3")])
    assert fastest_dense(path, step) is None
    write_rows(path, COLUMNS, [row(phase="decode", system="dense-flex", median_ms="4")])
    assert fastest_dense(path, step) == 3


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        benchmark_generate, "save_figure", lambda figure, path: drawn.append(figure) or save_figure(figure, path)
    )
    path = tmp_path / "generate.csv"
    write_rows(path, COLUMNS, [row(), row(phase="decode", tokens=32, tokens_per_s="9.5")])
    assert draw(path) is None and not drawn
    write_rows(path, COLUMNS, [row(tokens=128), row(tokens=128, system="dense-flash", median_ms="8000")])
    assert draw(path) == tmp_path / "generate.png" and (tmp_path / "generate.png").read_bytes()[:4] == b"\x89PNG"
    (lines,) = drawn[-1].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in lines.get_lines()}
    assert curves == {
        f"{MODEL} 6:2:16, dense-flash": [[0.125, 8]],
        f"{MODEL} 6:2:16, nsa": [[0.0625, 0.005], [0.125, 0.005]],
    }
    write_rows(path, COLUMNS, [row(phase="decode", tokens=32, system="dense-cut", tokens_per_s="3")])
    assert draw(path) == tmp_path / "generate.png"
    bars, lines = drawn[-1].axes
    assert [bar.get_width() for bar in bars.patches] == [3, 9.5] and lines.get_lines()
    labels = [label.get_text().splitlines()[0] for label in bars.get_yticklabels()]
    assert labels == ["dense-cut, not compiled", "nsa, compiled"]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--phase", "decode"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_an_unknown_system(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--phase", "first-token", "--systems", "dense-static"])
    assert "--systems of first-token are nsa, dense-flash, dense-cudnn, dense-efficient, got dense-static" in (
        capsys.readouterr().err
    )


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(benchmark_generate, "no_gpu", lambda: False)
    monkeypatch.setattr(benchmark_generate, "stamp", lambda commit: dict.fromkeys(STAMP, "x"))
    monkeypatch.setattr(benchmark_generate, "DEVICE", "cpu")
    out, rounding = tmp_path / "generate.csv", []

    def spied(*given):
        rounding.append(torch._inductor.config.emulate_precision_casts)
        return decode(*given)

    monkeypatch.setattr(benchmark_generate, "decode", spied)
    shape = ["--config", "6:2:16", "--model", MODEL, "--out", str(out)]
    decoding = ["--phase", "decode", "--systems", "nsa,dense-dynamic", "--tokens", "300", "--batch", "2", "--new", "3"]
    assert main(shape + decoding) == 0
    reading = ["--phase", "first-token", "--systems", "nsa,dense-flash", "--tokens", "64,300"]
    assert main(shape + reading) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["phase"], r["system"], r["tokens"], r["batch"]) for r in rows] == [
        ("decode", "dense-dynamic", "300", "2"),
        ("decode", "nsa", "300", "2"),
        ("first-token", "dense-flash", "64", "1"),
        ("first-token", "nsa", "64", "1"),
        ("first-token", "dense-flash", "300", "1"),
        ("first-token", "nsa", "300", "1"),
    ]
    assert rounding == [True, True] and not torch._inductor.config.emulate_precision_casts
    for dense, sparse in zip(rows[::2], rows[1::2], strict=True):
        beside = float(dense["median_ms"]) / float(sparse["median_ms"])
        assert dense["times_dense"] == ""
        if dense["phase"] == "decode":  # nothing dense was compiled
            assert sparse["times_dense"] == ""
        else:
            assert float(sparse["times_dense"]) == pytest.approx(beside, abs=0.01)
        for r in (dense, sparse):
            assert 0 < float(r["p20_ms"]) <= float(r["median_ms"]) <= float(r["p80_ms"])
            assert (float(r["tokens_per_s"] or 0) > 0) == (r["phase"] == "decode")
            checked = r["phase"] == "decode" and r["system"] == "nsa"
            assert [r["compiled_error"], r["kernels_error"]] == (["0.000", "0.000"] if checked else ["", ""])
            assert (r["one_bit_error"] != "") == checked
    assert out.with_suffix(".png").exists()
    # a system that fails: the others are measured, and the exit code says so
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", lambda *_: 1 / 0)
    assert main(shape + decoding) == 1
    assert "error: dense-dynamic, 300 tokens: division by zero" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 1 + len(rows) + 1
