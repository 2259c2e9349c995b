"""The operation's stages as the benchmark times them, interpreted on the CPU."""

from __future__ import annotations

import pytest
from triton_cases import interpreter

pytest.importorskip("triton")


def run_stages(name: str) -> dict[str, list[str]]:
    """Runs every stage of a short text; the stages' names."""
    from nsa_hf.recipes.benchmarks.common import Heads
    from nsa_hf.recipes.benchmarks.parts import Inputs, Stages, make_inputs

    # the interpreter has no bfloat16 arithmetic
    stages = Stages(Inputs(*(x.float() for x in make_inputs(Heads.parse(name), 144, "realistic", device="cpu"))))
    passes = {"forward": stages.forward(), "backward": stages.backward()}
    for parts in passes.values():
        for part in parts.values():
            part()
    return {name: list(parts) for name, parts in passes.items()}


@pytest.mark.parametrize("name", ["2:1:16", "12:1:16/32"])
def test_every_stage_runs(name: str) -> None:
    with interpreter() as process:
        found = process.submit(run_stages, name).result()
    assert found["forward"] == [
        "compression",
        "layout",
        "attention",
        "scores + top-k",
        "window and local blocks",
        "other selected blocks, combination",
    ]
    assert all(part.startswith("backward, ") for part in found["backward"])
    assert "backward, selection" in found["backward"]
