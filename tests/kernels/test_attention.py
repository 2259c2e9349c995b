"""`nsa_attention` (the reference backend) against the oracle: every layout, every dtype, ties and padding."""

from __future__ import annotations

from dataclasses import asdict, replace
from fractions import Fraction
from unittest import mock

import pytest
import torch
from attention_inputs import (
    EMPTY,
    Shape,
    Sizes,
    any_shape,
    assert_selection_is_good,
    check_empty,
    make_inputs,
    one_branch,
    run_empty,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import count_blocks, importances, nsa_oracle, pick
from torch._subclasses import FakeTensorMode

from nsa_hf.kernels import nsa_attention, reference_attention
from nsa_hf.kernels import sizes as sizes_module

PAPER = Sizes(32, 16, 64, 16, 1, 2, 512)
ALIKE = Sizes(4, 4, 4, 3, 1, 1, 4)  # blocks that do not overlap
WIDE = Sizes(6, 2, 8, 4, 1, 1, 7)  # each token in three compressed blocks

CASES = {
    "plain": Shape(),
    "one token": Shape(queries=1, keys=1),
    "shorter than one compressed block": Shape(queries=3, keys=3),
    "exactly one compressed block": Shape(queries=4, keys=4),
    "a batch": Shape(batch=3, queries=17, keys=17),
    "no grouping": Shape(kv_heads=3, group=1),
    "groups of three": Shape(kv_heads=3, group=3, queries=20, keys=20),
    "one KV head": Shape(kv_heads=1, group=4),
    "wide keys": Shape(key_dim=6, value_dim=4),
    "wide values": Shape(key_dim=3, value_dim=5),
    "own scale": Shape(scale=0.2),
    "no init block": Shape(replace(Sizes(), init_blocks=0)),
    "two init blocks": Shape(replace(Sizes(), init_blocks=2, topk=5)),
    "forced blocks only": Shape(replace(Sizes(), topk=3)),
    "own block only": Shape(replace(Sizes(), topk=1, init_blocks=0, local_blocks=1)),
    "more blocks asked than there are": Shape(replace(Sizes(), topk=20)),
    "window of one": Shape(replace(Sizes(), window_size=1)),
    "window over everything": Shape(replace(Sizes(), window_size=100)),
    "blocks that do not overlap": Shape(ALIKE),
    "each token in three blocks": Shape(WIDE, queries=50, keys=50),
    "the last queries": Shape(queries=7, keys=40),
    "decoding": Shape(batch=2, queries=1, keys=37),
    "own window keys": Shape(queries=6, keys=30, own_window=30),
    "own window keys, the last few": Shape(queries=6, keys=30, own_window=10),
    "left-padded": Shape(batch=3, starts=(0, 7, 29)),
    "left-padded, decoding": Shape(batch=3, queries=1, starts=(0, 7, 29)),
    "left-padded, the last queries": Shape(batch=3, queries=9, starts=(0, 7, 25)),
    "left-padded, own window": Shape(batch=3, queries=9, starts=(0, 7, 25), own_window=13),
    "ragged": Shape(batch=3, queries=3, lengths=(30, 11, 3)),
    "ragged, more queries than tokens": Shape(batch=3, queries=6, lengths=(30, 11, 3)),
    "ragged and left-padded": Shape(batch=3, queries=5, starts=(4, 0, 9), lengths=(30, 11, 12)),
    "ragged and left-padded, own window": Shape(
        batch=3, queries=5, starts=(4, 0, 9), lengths=(30, 11, 12), own_window=30
    ),
    "rows that hold nothing": Shape(batch=3, queries=4, keys=20, starts=(0, 5, 2), lengths=(0, 5, 20)),
    "packed": Shape(cu_seqlens=(0, 13, 30)),
    "packed, some shorter than a block": Shape(cu_seqlens=(0, 2, 13, 14, 17, 30)),
    "packed, all shorter than a block": Shape(queries=8, keys=8, cu_seqlens=(0, 2, 5, 8)),
    "packed, own window": Shape(cu_seqlens=(0, 13, 30), own_window=30),
    "index": Shape(index=(2, 0, 3)),
    "index, no compressed branch": Shape(index=(2, 0, 3), compressed=False),
    "index of one query and one key": Shape(kv_heads=3, group=2, index=(1, 1, 4), compressed=False),
    "index, the last queries": Shape(queries=7, keys=40, index=(2, 0, 3), compressed=False),
    "index, ragged and left-padded, own window": Shape(
        batch=3, queries=5, starts=(4, 0, 9), lengths=(30, 11, 12), own_window=30, index=(3, 0, 2), compressed=False
    ),
    "index in 8 bits": Shape(index=(2, 0, 3), eight_bits=True, compressed=False),
    "index in 8 bits, one key, ragged": Shape(
        batch=3, queries=5, starts=(4, 0, 9), lengths=(30, 11, 12), index=(2, 1, 4), eight_bits=True
    ),
    "index, packed": Shape(cu_seqlens=(0, 2, 13, 14, 17, 30), index=(2, 0, 3), compressed=False),
    "the paper's sizes": Shape(PAPER, queries=3, keys=1500, kv_heads=1, group=3, value_dim=3),
}


def limit(shape: Shape, inputs: dict[str, torch.Tensor]) -> float:
    """No output is larger than this: a softmax cannot exceed its largest value, a gate of ours is below 1."""
    return 3 * max(
        float(inputs[name].nan_to_num().abs().max()) for name in ("v", "v_cmp", "v_win") if inputs.get(name) is not None
    )


@pytest.mark.parametrize("name", CASES)
def test_output_and_selection(name: str) -> None:
    inputs = make_inputs(CASES[name], seed=len(name))
    output, selection = nsa_attention(**inputs, backend="reference", return_selection=True)
    answer = nsa_oracle(**inputs)
    assert torch.equal(selection, answer.selection) and selection.dtype == torch.int32
    torch.testing.assert_close(output, answer.output, rtol=1e-10, atol=1e-10)


@given(shape=any_shape(), seed=st.integers(0, 2**16))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_sizes_and_any_layout(shape: Shape, seed: int) -> None:
    inputs = make_inputs(shape, seed)
    output, selection = nsa_attention(**inputs, backend="reference", return_selection=True)
    answer = nsa_oracle(**inputs)
    assert torch.equal(selection, answer.selection)
    torch.testing.assert_close(output, answer.output, rtol=1e-10, atol=1e-10)


@given(shape=any_shape(), seed=st.integers(0, 2**16), times=st.sampled_from([1, 3, 1000]), data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_sizes_larger_than_the_text(shape: Shape, seed: int, times: int, data: st.DataObject) -> None:
    """As in `Sizes.within`, with all sizes taken for large ones."""
    x = shape.sizes.__dict__
    kernel, *others = (data.draw(st.sampled_from([1, times])) for _ in range(6))
    factors = dict(zip(("block_size", "topk", "init_blocks", "local_blocks", "window_size"), others, strict=True))
    grown = {name: factor * x[name] for name, factor in factors.items()}
    grown["kernel_size"] = min(kernel * x["kernel_size"], grown["block_size"])
    grown["topk"] = max(grown["topk"], grown["init_blocks"] + grown["local_blocks"])
    own = None if shape.own_window is None else shape.keys
    inputs = make_inputs(replace(shape, sizes=replace(shape.sizes, **grown), own_window=own), seed)
    with mock.patch.multiple(sizes_module, FEW_BLOCKS=1, FEW_TOKENS=1):
        output, selection = nsa_attention(**inputs, backend="reference", return_selection=True)
    answer = nsa_oracle(**inputs)
    assert torch.equal(selection, answer.selection)
    torch.testing.assert_close(output, answer.output, rtol=1e-10, atol=1e-10)


def test_sizes_far_beyond_the_text_cost_what_the_text_needs() -> None:
    most = 2**31 - 2
    inputs = make_inputs(Shape(Sizes(4, 2, 4, 20, 1, 2, 5)))
    for far in (Sizes(4, 2, 4, 20_000_000, 1, 2, 5), Sizes(4, 2, 4, most, 1, 2, 5)):
        assert torch.equal(nsa_attention(**{**inputs, **asdict(far)}), nsa_attention(**inputs))
        sizes = sizes_module.Sizes(**asdict(far))
        tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        assert reference_attention(**tensors, sizes=sizes, scale=0.5).selection.shape[-1] <= 64
    inputs = make_inputs(Shape(Sizes(40, 2, 40, 20, 1, 2, 50)))
    far = Sizes(most, 2, most, most + 1, most // 2, most // 2, most + 1)
    assert torch.equal(nsa_attention(**{**inputs, **asdict(far)}), nsa_attention(**inputs))


@pytest.mark.parametrize("topk", [50, 65, 1000])
def test_the_selection_has_all_places_that_were_asked_for(topk: int) -> None:
    inputs = make_inputs(Shape(batch=2))
    expected = nsa_attention(**{**inputs, "topk": 8}, return_selection=True)[1]
    selection = nsa_attention(**{**inputs, "topk": topk}, return_selection=True)[1]
    assert selection.shape == (2, 30, 2, topk) and selection.dtype == torch.int32
    assert torch.equal(selection[..., :8], expected) and (selection[..., 8:] == -1).all()


@pytest.mark.parametrize("name", EMPTY)
def test_no_rows_or_no_queries_give_nothing(name: str) -> None:
    compiled = torch.compile(nsa_attention, fullgraph=True, backend="aot_eager")
    for function in (nsa_attention, compiled):
        check_empty(EMPTY[name], run_empty(function, EMPTY[name], "reference"))


@pytest.mark.parametrize("name", ["plain", "ragged and left-padded, own window"])
def test_fake_tensors_have_shapes_and_no_values(name: str) -> None:
    inputs = make_inputs(CASES[name])
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
        found = nsa_attention(**fake, return_selection=True)
    expected = nsa_attention(**inputs, return_selection=True)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


LOW_PRECISION = [
    "plain",
    "groups of three",
    "wide keys",
    "left-padded",
    "packed",
    "own window keys",
    "the paper's sizes",
]


@pytest.mark.parametrize("gates_in_fp32", [False, True], ids=["gates alike", "gates fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_low_precision(name: str, dtype: torch.dtype, gates_in_fp32: bool) -> None:
    """Computed in fp32 and rounded once: half a unit of the dtype's last place, plus what fp32 arithmetic loses.

    The latter: a logit is a sum of a few products, of size up to about 10 here, so it is off by about 1e-6, and its
    probability by as much in relative terms; 1e-5 of the largest possible output leaves room for the sums that follow.
    """
    shape = CASES[name]
    inputs = make_inputs(shape, seed=1, dtype=dtype)
    if gates_in_fp32:
        inputs["gates"] = inputs["gates"].float()
    output, selection = nsa_attention(**inputs, backend="reference", return_selection=True)
    answer = nsa_oracle(**inputs)
    assert output.dtype == dtype
    assert_selection_is_good(selection, answer, shape.sizes, slack=1e-5 * shape.group)
    fp32 = 1e-5 * limit(shape, inputs)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    expected = nsa_oracle(**inputs, selection=selection).output
    error = (output.double() - expected).abs()
    assert (error <= rounding * (expected.abs() + fp32) + fp32).all(), f"off by {error.max():.2e}"


def test_selection_is_returned_only_when_asked() -> None:
    inputs = make_inputs(Shape())
    output = nsa_attention(**inputs)
    assert isinstance(output, torch.Tensor)
    both = nsa_attention(**inputs, return_selection=True)
    assert torch.equal(output, both[0]) and len(both) == 2


def test_auto_is_the_reference_on_the_cpu() -> None:
    inputs = make_inputs(CASES["ragged and left-padded"])
    assert torch.equal(nsa_attention(**inputs), nsa_attention(**inputs, backend="reference"))


TIED = {"init": replace(Sizes(), topk=6), "no init": replace(Sizes(), topk=3, init_blocks=0), "wide": WIDE}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", TIED.values(), ids=TIED.keys())
def test_of_equal_blocks_the_first_is_taken(sizes: Sizes, dtype: torch.dtype) -> None:
    """All keys equal: each of m visible compressed blocks has the probability 1/m; exact fractions tell the pick.

    Small integers make the logits exact: a matrix product of anything else may round equal columns differently.
    """
    shape = Shape(sizes, queries=60, keys=60, kv_heads=1, group=2)
    inputs = make_inputs(shape, dtype=dtype)
    inputs["q"] = (4 * inputs["q"]).round()
    inputs["k_cmp"] = (4 * inputs["k_cmp"][:, :1]).round().expand_as(inputs["k_cmp"]).contiguous()
    _, selection = nsa_attention(**inputs, return_selection=True)
    for p in range(shape.keys):
        visible = count_blocks(p + 1, sizes.kernel_size, sizes.kernel_stride)
        importance = importances(
            [Fraction(1, max(visible, 1))] * visible,
            p // sizes.block_size + 1,
            sizes.kernel_size,
            sizes.kernel_stride,
            sizes.block_size,
        )
        expected = pick(importance, sizes.topk, sizes.init_blocks, sizes.local_blocks)
        expected += [-1] * (sizes.topk - len(expected))
        assert selection[0, p, 0].tolist() == expected, f"query {p}"


def test_of_blocks_without_importance_the_first_is_taken() -> None:
    """Keys so long that one probability is 1 and all others underflow to exactly 0."""
    sizes = Sizes(kernel_size=8, kernel_stride=1, block_size=8, topk=2, init_blocks=0, local_blocks=1)
    inputs = make_inputs(Shape(sizes, queries=40, keys=40))
    inputs["k_cmp"] *= 1e5
    _, selection = nsa_attention(**inputs, return_selection=True)
    assert torch.equal(selection, nsa_oracle(**inputs).selection)


def test_no_compressed_blocks_at_all() -> None:
    inputs = one_branch(make_inputs(Shape(PAPER, queries=31, keys=31)), 0)
    output, selection = nsa_attention(**inputs, return_selection=True)
    assert inputs["k_cmp"].shape[1] == 0
    assert torch.equal(output, torch.zeros_like(output))
    assert (selection[..., 0] == 0).all() and (selection[..., 1:] == -1).all()


@pytest.mark.parametrize("name", [name for name in CASES if "padded" in name or "ragged" in name])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_belongs_to_nobody_is_not_read(name: str, poison: float) -> None:
    shape = CASES[name]
    clean, dirty = make_inputs(shape, poison=None), make_inputs(shape, poison=poison)
    output, selection = nsa_attention(**dirty, return_selection=True)
    assert output.isfinite().all()
    expected, expected_selection = nsa_attention(**clean, return_selection=True)
    assert torch.equal(selection, expected_selection)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_queries_before_the_first_token() -> None:
    shape = CASES["ragged and left-padded"]  # row 2 holds 3 tokens and asks 5 queries
    inputs = make_inputs(shape)
    inputs["q"][2, :2] = inputs["gates"][2, :2] = float("nan")
    output, selection = nsa_attention(**inputs, return_selection=True)
    assert shape.starts is not None and shape.lengths is not None
    for row, (start, length) in enumerate(zip(shape.starts, shape.lengths, strict=True)):
        early = max(0, start - (length - shape.queries))
        assert (output[row, :early] == 0).all() and (selection[row, :early] == -1).all()
        assert (output[row, early:] != 0).all() and (selection[row, early:, :, 0] >= 0).all()
    assert (output == 0).any()


def test_more_slots_than_blocks() -> None:
    shape = CASES["ragged"]
    inputs = make_inputs(shape)
    expected = nsa_attention(**inputs)
    for name in ("k_cmp", "v_cmp"):
        slots = inputs[name]
        inputs[name] = torch.cat([slots, torch.full_like(slots, float("nan"))], dim=1)
    torch.testing.assert_close(nsa_attention(**inputs), expected, rtol=1e-12, atol=1e-12)


def test_inputs_that_are_not_contiguous() -> None:
    inputs = make_inputs(CASES["a batch"])
    expected = nsa_attention(**inputs)
    for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(nsa_attention(**inputs), expected, rtol=1e-12, atol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    inputs = make_inputs(Shape(scale=300.0), dtype=torch.float32)
    output, selection = nsa_attention(**inputs, return_selection=True)
    answer = nsa_oracle(**inputs, selection=selection)
    # a logit of up to 1e4 is off by 1e-3 in fp32
    torch.testing.assert_close(output.double(), answer.output, rtol=0, atol=1e-2 * limit(Shape(), inputs))
