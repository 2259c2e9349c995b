"""Every kernel of a forward and a backward pass compiles ahead for each kind of card, within its shared memory.

No GPU is needed: the operation is called on CPU tensors, and where it would launch a kernel, Triton's compiler is
called with the same arguments for another card.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_inputs import Shape, make_inputs
from triton_ahead import PAPER, SHARED_MEMORY, compile_for, scattered_reductions

triton = pytest.importorskip("triton")


def compile_all(monkeypatch: pytest.MonkeyPatch, card: int, shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """Shared memory in bytes of every kernel of a forward and a backward pass, by its name; the most, where several."""
    from nsa_hf.kernels.gpu import common as triton_common
    from nsa_hf.kernels.gpu import interval as triton_interval
    from nsa_hf.kernels.gpu import interval_backward as triton_interval_backward
    from nsa_hf.kernels.gpu import op as triton_op
    from nsa_hf.kernels.gpu import query_major as triton_query_major
    from nsa_hf.kernels.gpu import selected as triton_selected
    from nsa_hf.kernels.gpu.scores import compressed as triton_select
    from nsa_hf.kernels.gpu.scores import index as triton_index

    found = compile_for(
        monkeypatch,
        card,
        triton_common,
        triton_interval,
        triton_interval_backward,
        triton_query_major,
        triton_select,
        triton_index,
        triton_selected,
    )
    # nothing is computed: indices that nobody wrote are the largest number, which no slot's block is
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        inputs = make_inputs(shape, dtype=dtype)
        tensors = [inputs[name] for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates")] + [None] * 7
        if shape.index is not None:
            tensors[8:10] = inputs["q_index"], inputs["k_index"]
        numbers = list(shape.sizes.__dict__.values())
        out, selection, *saved = triton_op.run_forward(*tensors, numbers, 0.1)
        triton_op.run_backward(out, *tensors[:8], False, selection, saved, numbers, 0.1)
    finally:
        torch.use_deterministic_algorithms(False)
    return found


KERNELS = {
    "interval_forward_kernel",
    "interval_dq_kernel",
    "interval_dkv_kernel",
    "select_kernel",
    "selected_forward_kernel",
    "selected_backward_kernel",
    "merge_kernel",
    "sum_items_kernel",
    "sum_dq_kernel",
    "gate_gradient_kernel",
    "layout_kernel",
    "count_kernel",
    "scan_kernel",
    "place_kernel",
    "borders_kernel",
    "sum_splits_kernel",
}


# with an index and without a compressed branch
INDEX = KERNELS - {"select_kernel", "sum_splits_kernel"} | {"index_select_kernel"}


@pytest.mark.parametrize(
    ("card", "channels", "dtype"),
    [
        (86, 64, torch.bfloat16),
        (90, 32, torch.bfloat16),
        pytest.param(86, 256, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(80, 128, torch.float16, marks=pytest.mark.slow),
        pytest.param(86, 256, torch.float32, marks=pytest.mark.slow),
        pytest.param(100, 32, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_an_index_compiles_ahead(monkeypatch: pytest.MonkeyPatch, card: int, channels: int, dtype: torch.dtype) -> None:
    shape = Shape(PAPER, 1, 2048, 2048, 2, 4, 64, 64, index=(4, 0, channels), compressed=False)
    found = compile_all(monkeypatch, card, shape, dtype)
    assert set(found) == INDEX
    assert all(shared <= SHARED_MEMORY[card] * 1024 for shared in found.values()), found


@pytest.mark.parametrize(("card", "block", "channels"), [(90, 128, 128), (86, 512, 64)])
def test_an_index_of_large_blocks_compiles_ahead(
    monkeypatch: pytest.MonkeyPatch, card: int, block: int, channels: int
) -> None:
    """A program reads several blocks at once, and a stage holds all their keys."""
    sizes = replace(PAPER, block_size=block, topk=4)
    shape = Shape(sizes, 1, 8 * block, 8 * block, 1, 4, 64, 64, index=(4, 0, channels), compressed=False)
    found = compile_all(monkeypatch, card, shape, torch.bfloat16)
    assert found["index_select_kernel"] <= SHARED_MEMORY[card] * 1024


# of groups from 12 on: one kernel in the place of two
LARGE_GROUP = KERNELS - {"selected_forward_kernel", "merge_kernel"} | {"query_major_kernel", "combine_kernel"}


@pytest.mark.parametrize(
    ("card", "dims", "dtype"),
    [
        (86, (128, 128), torch.bfloat16),
        (90, (80, 64), torch.bfloat16),
        pytest.param(90, (64, 64), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(100, (128, 128), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(90, (128, 128), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(80, (128, 128), torch.float16, marks=pytest.mark.slow),
        pytest.param(90, (192, 128), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(80, (192, 128), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(89, (192, 128), torch.float16, marks=pytest.mark.slow),
        pytest.param(100, (192, 192), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(86, (256, 256), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(86, (256, 256), torch.float32, marks=pytest.mark.slow),
        pytest.param(86, (128, 128), torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_ahead(monkeypatch: pytest.MonkeyPatch, card: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    shape = Shape(PAPER, 1, 2048, 2048, 2, 4, *dims)
    found = compile_all(monkeypatch, card, shape, dtype)
    assert set(found) == KERNELS
    assert all(shared <= SHARED_MEMORY[card] * 1024 for shared in found.values()), found


@pytest.mark.parametrize(
    ("card", "dtype"),
    [
        (89, torch.bfloat16),
        pytest.param(90, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(86, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_large_groups_compile_ahead(monkeypatch: pytest.MonkeyPatch, card: int, dtype: torch.dtype) -> None:
    found = compile_all(monkeypatch, card, Shape(PAPER, 1, 2048, 2048, 2, 16, 128, 128), dtype)
    assert set(found) == LARGE_GROUP
    assert all(shared <= SHARED_MEMORY[card] * 1024 for shared in found.values()), found


@pytest.mark.parametrize(
    ("card", "group"),
    [(100, 64), pytest.param(100, 128, marks=pytest.mark.slow), pytest.param(90, 128, marks=pytest.mark.slow)],
)
def test_very_large_groups_compile_ahead(monkeypatch: pytest.MonkeyPatch, card: int, group: int) -> None:
    found = compile_all(monkeypatch, card, Shape(PAPER, 1, 2048, 2048, 1, group, 64, 64), torch.bfloat16)
    assert set(found) == LARGE_GROUP


@pytest.mark.parametrize("card", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_an_index_of_small_blocks_in_float32_compiles_ahead(monkeypatch: pytest.MonkeyPatch, card: int) -> None:
    sizes = replace(PAPER, kernel_size=4, kernel_stride=2, block_size=4)
    shape = Shape(sizes, 1, 512, 512, 1, 4, 64, 64, index=(4, 0, 32), compressed=False)
    assert set(compile_all(monkeypatch, card, shape, torch.float32)) == INDEX


@pytest.mark.parametrize(
    ("layout", "axis", "scattered"),
    [
        ("#linear", 1, True),
        ("#linear", 0, False),
        ("#beside", 1, False),
        ("#ttg.slice<{dim = 0, parent = #blocked}>", 1, False),
        ("#ttg.slice<{dim = 0, parent = #outer}>", 0, True),
        ("#mma", 1, False),
    ],
)
def test_a_reduction_over_lanes_that_are_no_neighbours_is_seen(layout: str, axis: int, scattered: bool) -> None:
    """Triton adds up what lies in lanes 1, 2 and 4 apart; in the first layout a row lies in lanes 1, 2 and 8 apart."""
    ttgir = f"""
#linear = #ttg.linear<{{register = [[1, 0]], lane = [[0, 1], [0, 2], [0, 0], [0, 4], [2, 0]]}}>
#beside = #ttg.linear<{{register = [[1, 0]], lane = [[2, 0], [0, 1], [0, 2], [0, 4], [0, 0]]}}>
#outer = #ttg.linear<{{register = [], lane = [[0, 1], [1, 0], [0, 2], [0, 4], [2, 0]]}}>
#blocked = #ttg.blocked<{{sizePerThread = [1, 1, 2], threadsPerWarp = [2, 4, 4], order = [2, 1, 0]}}>
#mma = #ttg.nvidia_mma<{{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 64, 16]}}>
    %1 = "tt.reduce"(%0) <{{axis = {axis} : i32}}> ({{
    ^bb0(%a: f32 loc("x"), %b: f32 loc("x")):
      %c = arith.addf %a, %b : f32
      tt.reduce.return %c : f32
    }}) : (tensor<8x8xf32, {layout}>) -> tensor<8xf32, #ttg.slice<{{dim = {axis}, parent = {layout}}}>> loc("x")
"""
    assert bool(scattered_reductions(ttgir)) == scattered
