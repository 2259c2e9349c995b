"""The benchmark of a training step on a CPU, with a tiny model: what it measures, refuses and draws."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa_hf.recipes.benchmarks import training
from nsa_hf.recipes.benchmarks.common import STAMP, Heads, dense_times, write_rows
from nsa_hf.recipes.benchmarks.models import Shape
from nsa_hf.recipes.benchmarks.training import COLUMNS, PARTS, SAME, Step, draw, main, measure, parts_of

SHAPE, TOKENS = Shape("qwen3:2:48:64:256", Heads.parse("6:2:16")), 300


@pytest.fixture
def losses(monkeypatch) -> list[float]:
    """The losses of the steps that are measured, uncompiled."""
    found: list[float] = []
    step = Step.__call__
    monkeypatch.setattr(training, "compile_layers", lambda model: None)
    monkeypatch.setattr(training, "FIELDS", {"nsa-index": training.INDEX | {"nsa_selector_dim": 8}})
    monkeypatch.setattr(Step, "__call__", lambda self: (found.append(float(loss := step(self))), loss)[1])
    return found


def test_a_step_is_measured_and_trains(losses) -> None:
    rows = {system: measure(SHAPE, TOKENS, system, "cpu") for system in ("nsa-index", "dense-flash")}
    sparse, dense = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert sparse[0] == pytest.approx(dense[0], abs=1e-2)  # the same weights, within the exact range
    assert sparse[-1] < sparse[0] and dense[-1] < dense[0]
    for row in rows.values():
        assert {*row} <= {*COLUMNS} and row["tokens_per_s"] > 0
        assert float(row["products_ms"]) > 0 and float(row["optimizer_ms"]) > 0
        assert sum(float(row[part]) for part in PARTS) == pytest.approx(float(row["median_ms"]), abs=0.3)
    assert float(rows["dense-flash"]["attention_ms"]) > 0


def test_what_a_step_goes_into() -> None:
    def event(name: str, own: float, caller: SimpleNamespace | None = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, self_device_time_total=own, cpu_parent=caller)

    forward, dense, linear = (
        event("nsa_hf::forward", 4000),
        event("aten::_scaled_dot_product_cudnn_attention_backward", 0),
        event("aten::linear", 0),
    )
    events = [
        event("Torch-Compiled Region", 8000),
        forward,
        event("cuLaunchKernelEx", 7000, forward),  # the kernels of another operator
        event("aten::copy_", 100, event("aten::clone", 0, forward)),
        event("nsa_hf::backward", 5900),
        dense,
        event("aten::_cudnn_attention_backward", 500, dense),
        linear,
        event("aten::mm", 3000, linear),
        event("aten::copy_", 9000, linear),
    ]
    assert list(parts_of(events, 2.0, 20.0).values()) == [10.5, 3.0, 2.0, 4.5]


def test_dense_of_the_same_shape_stands_beside(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    row = dict.fromkeys(STAMP, "x") | {"model": "m", "config": "c", "tokens": 8192, "tokens_per_s": 10}
    others = [("dense-cudnn", 8192, 3), ("dense-flash", 8192, 5), ("nsa-index", 8192, 1), ("dense-cudnn", 4096, 2)]
    assert dense_times(path, row, SAME) == []
    write_rows(path, COLUMNS, [row | {"system": s, "tokens": t, "median_ms": ms} for s, t, ms in others])
    assert dense_times(path, row, SAME) == [(3, "dense-cudnn"), (5, "dense-flash")]
    assert dense_times(path, row | {"gpu": "another"}, SAME) == []
    picture = draw(path)
    assert picture is not None and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, said", [(["--systems", "dense"], "--systems are nsa-index"), (["--model", "a:1:2:3:4"], "go together")]
)
def test_what_cannot_be_measured(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([]) == 2
