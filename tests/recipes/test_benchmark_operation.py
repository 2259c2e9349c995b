"""What the host takes for the operation, as its benchmark measures it."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import DeviceType

from nsa_hf.recipes.benchmarks import operation
from nsa_hf.recipes.benchmarks.common import Heads
from nsa_hf.recipes.benchmarks.parts import make_inputs

CASE = operation.Case("1:1:16", 48, "random")


def test_both_passes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(Heads.parse(CASE.config), CASE.tokens, CASE.inputs, device="cpu")
    q, calls = x.q.requires_grad_(), []
    q.register_hook(lambda gradient: calls.append("backward"))

    def forward() -> torch.Tensor:
        calls.append("forward")
        return 2 * q

    monkeypatch.setattr(operation, "whole", lambda system, inputs: (forward, [q]))
    (median, low, high), launches, kernels = operation.measure_both("nsa", x, calls=3)
    assert 0 < low <= median <= high
    assert launches == kernels == 0, "without a GPU nothing is launched on it"
    # one for the output's shape and one before, three that are timed, one whose launches are counted
    assert calls == ["forward", *["forward", "backward"] * 5]


def test_launches_are_the_gpus_events() -> None:
    took = SimpleNamespace(elapsed_us=lambda: 1500)
    kinds = (DeviceType.CPU, DeviceType.CUDA, DeviceType.CUDA)
    events = [SimpleNamespace(device_type=kind, time_range=took) for kind in kinds]
    assert operation.of_the_gpu(events) == (2, 3.0)


def test_the_rows_of_a_short_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = (2.0, 1.0, 3.0)
    monkeypatch.setattr(operation, "card_rates", lambda: (1e15, 1e12, iter([])))
    monkeypatch.setattr(operation, "make_inputs", lambda *arguments: None)
    monkeypatch.setattr(operation, "measure_system", lambda *arguments: iter([("forward", times, 5.0)]))
    monkeypatch.setattr(operation, "measure_both", lambda system, x: operation.Both(times, 23, 1.5))
    recorder = operation.Recorder(tmp_path / "rows.csv", dict.fromkeys(operation.STAMP, "x"))
    for tokens in (CASE.tokens, operation.HOST_TOKENS + 1):
        for systems in (["nsa", "nsa-index"], ["fa2"]):
            case = CASE._replace(tokens=tokens)
            operation.measure_case(recorder, Heads.parse(CASE.config), case, systems, with_parts=False)
    with recorder.path.open(newline="") as file:
        names = ("tokens", "system", "part", "median_ms", "launches")
        found = [[row[name] for name in names] for row in csv.DictReader(file)]
    both = [("forward + backward, host", "2.0000"), ("forward + backward, kernels", "1.5000")]
    short = [["48", system, *part, "23"] for system in ("nsa", "nsa-index", "fa2") for part in both]
    assert [row for row in found if row[-1]] == short
    assert len(found) == 6 + len(short)
