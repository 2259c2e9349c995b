"""The decode kernels, interpreted on the CPU, against the float64 reference: what a step of `generate()` may ask."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_inputs import TENSORS, Inputs, Shape, Sizes, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import ALIKE, LARGE, WIDE, interpreter

from nsa_hf.kernels import Placement, nsa_attention

pytest.importorskip("triton")

STEP = Shape(queries=1, keys=61, kv_heads=2)
CACHES = ("k", "v", "k_win", "v_win")


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


def as_static_cache(inputs: Inputs) -> Inputs:
    """Keys and values as a static cache has them: `[B, Hk, S, D]`, seen as `[B, S, Hk, D]`."""
    turned = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in CACHES if name in inputs}
    return {**inputs, **turned}


def compare(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[float, bool]:
    """The output's largest difference, as a part of its largest number, and whether the selection is the same."""
    from nsa_hf.kernels.gpu import op as triton_op
    from nsa_hf.kernels.gpu.decode import op as triton_decode

    inputs = make_inputs(shape, seed, dtype)
    truth = {name: x.double() if name in TENSORS else x for name, x in inputs.items()}
    with mock.patch.object(triton_op, "decode_op", wraps=triton_decode.decode_op) as used:
        out, selection = nsa_attention(**as_static_cache(inputs), backend="triton", return_selection=True)
    assert used.call_count == 1
    expected, expected_selection = nsa_attention(**truth, backend="reference", return_selection=True)
    assert out.dtype == dtype and out.shape == expected.shape
    error = (out.double() - expected).abs().max() / expected.abs().max().clamp(min=0.1)
    return float(error), torch.equal(selection, expected_selection)


def check(found: tuple[float, bool]) -> None:
    """float32 has 24 bits: a rounding is 6e-8 of a number, and sums of some dozen terms lose a few bits more."""
    error, same = found
    assert same
    assert error <= 2e-6


def at_every_length() -> list[tuple[float, bool]]:
    """Across the borders of block (4), kernel (4), window (5), topk (16 tokens) and all strides between."""
    return [compare(replace(STEP, keys=keys, kv_heads=1)) for keys in range(1, 26)]


def test_at_every_length(process: ProcessPoolExecutor) -> None:
    for found in process.submit(at_every_length).result():
        check(found)


def at_every_fill() -> list[tuple[float, bool]]:
    """One row a fill, in caches of one capacity; NaN behind each."""
    fills = tuple(range(18))  # with the borders of block, kernel, window and topk
    return [
        compare(replace(STEP, batch=18, keys=40, kv_heads=1, lengths=fills)),
        compare(replace(STEP, batch=18, keys=40, kv_heads=1, lengths=(18,) * 18, starts=fills)),
    ]


def test_at_every_fill_and_start(process: ProcessPoolExecutor) -> None:
    for found in process.submit(at_every_fill).result():
        check(found)


CASES = {
    "groups of three, two queries": replace(STEP, group=3, queries=2),
    "groups of seven, five queries": replace(STEP, group=7, queries=5, kv_heads=1),
    "groups of sixteen": replace(STEP, group=16, batch=2),
    "groups of four, sixteen queries": replace(STEP, group=4, queries=16, kv_heads=1),
    "groups of thirty-three": replace(STEP, group=33, kv_heads=1),
    "wide keys": replace(STEP, key_dim=192, value_dim=128, group=1),
    "wide values": replace(STEP, key_dim=20, value_dim=72, group=1),
    "blocks that do not overlap": replace(STEP, sizes=ALIKE),
    "each token in three blocks": Shape(WIDE, queries=3, keys=90, kv_heads=1),
    "blocks of three strides": Shape(Sizes(4, 2, 6, 4, 1, 1, 9), queries=3, keys=90, kv_heads=1),
    "blocks of many strides": Shape(Sizes(2, 1, 80, 3, 1, 1, 33), queries=2, keys=450, kv_heads=1),
    "large blocks": Shape(LARGE, queries=2, keys=350, kv_heads=1),
    "no init block": replace(STEP, sizes=replace(Sizes(), init_blocks=0)),
    "forced blocks only": replace(STEP, sizes=replace(Sizes(), topk=3)),
    "own block only": replace(STEP, sizes=replace(Sizes(), topk=1, init_blocks=0, local_blocks=1)),
    "as many blocks as are ranked": replace(STEP, sizes=replace(Sizes(), topk=12)),
    "nearly all blocks": Shape(Sizes(32, 16, 64, 20, 1, 2, 512), queries=1, keys=2000, kv_heads=1, group=2),
    "more blocks asked than there are": replace(STEP, sizes=replace(Sizes(), topk=20)),
    "far more blocks asked than there are": replace(STEP, sizes=replace(Sizes(), topk=300)),
    "everything larger than the text": Shape(
        Sizes(8000, 4, 8000, 300, 100, 100, 9000), queries=1, keys=21, kv_heads=1, group=1
    ),
    "window of one": replace(STEP, sizes=replace(Sizes(), window_size=1)),
    "window over everything": replace(STEP, sizes=replace(Sizes(), window_size=100)),
    "own window keys": replace(STEP, queries=3, own_window=61),
    "own window keys, the last few": replace(STEP, queries=3, own_window=9),
    "ragged and left-padded": replace(
        STEP, batch=3, queries=16, kv_heads=1, starts=(4, 0, 30), lengths=(61, 11, 33), group=1
    ),
    "ragged and left-padded, own window": replace(
        STEP, batch=3, queries=2, starts=(4, 0, 30), lengths=(61, 11, 31), own_window=61
    ),
    "an empty row": replace(STEP, batch=2, lengths=(0, 61)),
    "own scale": replace(STEP, scale=0.2),
    "the paper's sizes": Shape(Sizes(32, 16, 64, 16, 1, 2, 512), queries=2, keys=2600, kv_heads=1, group=3),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_selection(process: ProcessPoolExecutor, name: str) -> None:
    check(process.submit(compare, CASES[name]).result())


def an_empty_batch() -> list[torch.Size]:
    inputs = make_inputs(replace(STEP, batch=2), 1, torch.float32)
    none = {name: x[:0] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    return [x.shape for x in nsa_attention(**none, backend="triton", return_selection=True)]


def test_an_empty_batch(process: ProcessPoolExecutor) -> None:
    assert process.submit(an_empty_batch).result() == [(0, 1, 4, 4), (0, 1, 2, 4)]


@pytest.mark.parametrize(
    "name",
    [
        "groups of three, two queries",
        "groups of sixteen",
        "blocks that do not overlap",
        "each token in three blocks",
        "blocks of three strides",
        "blocks of many strides",
        "large blocks",
        "nearly all blocks",
        "ragged and left-padded",
        "the paper's sizes",
    ],
)
def test_float16(process: ProcessPoolExecutor, name: str) -> None:
    """float16 has 11 bits: a rounding is 5e-4 of a number; inputs are the same, weights and the output are rounded."""
    error, same = process.submit(compare, CASES[name], torch.float16).result()
    assert same
    assert error <= 2e-3


def any_step(choose: random.Random) -> Shape:
    stride = choose.randint(1, 4)
    reach = choose.randint(1, 3)
    init, local = choose.randint(0, 2), choose.randint(1, 3)
    topk = init + local + choose.choice((0, 1, 2, 3, 7, 15))
    block = (reach + choose.randint(0, 3)) * stride
    sizes = Sizes(reach * stride, stride, block, topk, init, local, choose.randint(1, 12))
    keys, batch = choose.randint(1, 70), choose.randint(1, 2)
    lengths = tuple(choose.randint(0, keys) for _ in range(batch)) if choose.random() < 0.5 else None
    starts = None
    if choose.random() < 0.5:
        starts = tuple(choose.randint(0, end) for end in lengths or (keys,) * batch)
    queries = choose.randint(1, min(keys, 16))
    least = keys if lengths is not None else min(keys, sizes.window_size + queries - 1)
    own_window = choose.randint(least, keys) if choose.random() < 0.3 else None
    return Shape(
        sizes,
        batch,
        queries,
        keys,
        1,
        choose.randint(1, 5),
        choose.randint(1, 20),
        choose.randint(1, 20),
        starts,
        lengths,
        None,
        own_window,
    )


def any_steps(seed: int) -> list[tuple[Shape, tuple[float, bool]]]:
    choose = random.Random(seed)
    return [(shape, compare(shape)) for shape in (any_step(choose) for _ in range(12))]


def test_any_step(process: ProcessPoolExecutor) -> None:
    for shape, (error, same) in process.submit(any_steps, 7).result():
        assert same and error <= 2e-6, shape


def with_splits(splits: int, at_once: int, bundles: int, candidates: int) -> list[tuple[float, bool]]:
    from nsa_hf.kernels.gpu.decode import op as triton_decode
    from nsa_hf.kernels.gpu.decode import select as triton_decode_select

    shapes = [
        replace(STEP, batch=2, keys=150, lengths=(150, 7), kv_heads=1),
        replace(STEP, own_window=61, kv_heads=1),
        # several rows, queries and KV heads with several chunks each, of which more than one candidate is kept
        replace(STEP, sizes=replace(Sizes(), topk=9), batch=2, queries=2, keys=200, lengths=(200, 150)),
    ]
    with (
        mock.patch.object(triton_decode, "split_count", return_value=splits),
        mock.patch.object(triton_decode_select, "AT_ONCE", at_once),
        mock.patch.object(triton_decode_select, "BUNDLES", bundles),
        mock.patch.object(triton_decode_select, "CANDIDATES", candidates),
    ):
        return [compare(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("splits", "at_once", "bundles", "candidates"),
    [(1, 16, 2, 1), (1, 16, 2, 16), (5, 16, 256, 1024), (64, 1024, 2, 1)],
)
def test_any_split_and_any_number_of_blocks_at_once(
    process: ProcessPoolExecutor, splits: int, at_once: int, bundles: int, candidates: int
) -> None:
    """64 splits are more than there are tiles: most of them have nothing to do."""
    for found in process.submit(with_splits, splits, at_once, bundles, candidates).result():
        check(found)


def in_any_order() -> list[tuple[float, bool]]:
    """The interpreter runs programs one after another: here shuffled, so that any of a query's may be the last."""
    from triton.runtime import interpreter as of_triton

    from nsa_hf.kernels.gpu.decode import select as triton_decode_select

    def shuffled(*bounds: int) -> list[int] | range:
        if sys._getframe(1).f_code.co_name != "__call__":
            return range(*bounds)
        order.append(choose.sample(range(*bounds), len(range(*bounds))))
        return order[-1]

    choose, order = random.Random(3), []
    shape = replace(STEP, sizes=replace(Sizes(), topk=9), batch=2, queries=2, keys=200, lengths=(200, 150))
    with (
        mock.patch.object(triton_decode_select, "AT_ONCE", 16),
        mock.patch.object(of_triton, "range", shuffled, create=True),
    ):
        found = [compare(shape) for _ in range(3)]
    assert any(some != sorted(some) for some in order)
    return found


def test_whichever_program_is_the_last(process: ProcessPoolExecutor) -> None:
    for found in process.submit(in_any_order).result():
        check(found)


def test_splits_fill_the_card() -> None:
    from nsa_hf.kernels.gpu.decode import op as triton_decode

    with mock.patch.object(triton_decode, "processors", return_value=132):
        cpu = torch.device("cpu")
        assert triton_decode.split_count(4, 64, cpu) == 32
        assert triton_decode.split_count(32, 64, cpu) == 4
        assert triton_decode.split_count(4096, 64, cpu) == 1
        assert triton_decode.split_count(1, 0, cpu) == 1


def select_equal(name: str, at_once: int) -> list[torch.Tensor]:
    from nsa_hf.kernels.gpu.decode import select as triton_decode_select

    sizes = Sizes(8, 1, 8, 2, 0, 1) if name == "no importance" else replace(Sizes(), topk=6)
    keys = 180 if name == "no importance" else 60
    inputs = make_inputs(Shape(sizes, queries=9, keys=keys, kv_heads=1), dtype=torch.float32)
    if name == "no importance":
        inputs["k_cmp"] *= 1e4  # one probability is 1, all others underflow to exactly 0
    else:
        inputs["q"] = (4 * inputs["q"]).round()
        inputs["k_cmp"] = (4 * inputs["k_cmp"][:, :1]).round().expand_as(inputs["k_cmp"])
    with mock.patch.object(triton_decode_select, "AT_ONCE", at_once):
        return [nsa_attention(**inputs, backend=name, return_selection=True)[1] for name in ("triton", "reference")]


@pytest.mark.parametrize(("name", "at_once"), [("equal keys", 16), ("no importance", 16), ("no importance", 64)])
def test_of_equal_blocks_the_first_is_taken(process: ProcessPoolExecutor, name: str, at_once: int) -> None:
    got, expected = process.submit(select_equal, name, at_once).result()
    assert torch.equal(got, expected)


def select_close(best: tuple[int, ...], distance: float, rise: float) -> list[torch.Tensor]:
    """Of 150 blocks, one head and float16 inputs: some are the best, the others' logits are that much less, and rise by
    so little from block to block."""
    sizes = Sizes(16, 16, 16, 12, 1, 1, 5)
    inputs = make_inputs(Shape(sizes, queries=1, keys=2400, kv_heads=1, group=1, key_dim=2), dtype=torch.float16)
    coarse, fine = torch.full((150,), -distance), rise * torch.arange(150)
    coarse[list(best)] = 0
    inputs["k_cmp"][0, :, 0] = torch.stack((coarse, fine), -1)
    inputs |= {"q": torch.ones_like(inputs["q"]), "scale": 1.0}
    truth = {name: x.double() if name in TENSORS else x for name, x in inputs.items()}
    found = nsa_attention(**inputs, backend="triton", return_selection=True)
    return [found[1], nsa_attention(**truth, backend="reference", return_selection=True)[1]]


@pytest.mark.parametrize(
    ("best", "distance", "rise"), [((0,), 60, 0.01), ((0, 70, 140), 15, 0.01), ((0, 70, 140), 0.5, 2**-16)]
)
def test_blocks_that_differ_little_are_ranked(
    process: ProcessPoolExecutor, best: tuple[int, ...], distance: float, rise: float
) -> None:
    """Far below the best, or nearly as important as each other: scores in float16 would lose the order."""
    got, expected = process.submit(select_close, best, distance, rise).result()
    assert torch.equal(got, expected)


def ranked(seed: int) -> list[tuple[list[int], list[int]]]:
    """Random importances, of which many are equal, or not finite: what is selected of them, and what should be."""
    from nsa_hf.kernels.gpu.decode import select as triton_decode_select

    choose, random_numbers, found = random.Random(seed), torch.Generator().manual_seed(seed), []
    for _ in range(24):
        free, init, local = choose.choice((1, 2, 3, 5, 7, 8, 13, 20, 40)), choose.randint(0, 3), choose.randint(1, 3)
        topk = init + free + local
        # few to choose from, any number, or just what fills a program or a bundle, or one more
        filled = local + 16 * choose.randint(1, 10) + choose.randint(0, 1)
        blocks = choose.choice((topk + choose.randint(1, 3), topk + choose.randint(1, 150), max(topk + 1, filled)))
        tiles = -(-blocks // 4)
        sums = torch.full((4 * tiles,), float("nan"))  # behind the blocks nothing is written
        sums[:blocks] = torch.randint(choose.choice((1, 3, 1000)), (blocks,), generator=random_numbers).float()
        sums[blocks - local - choose.randint(0, 1)] = 1000  # the last block that may be chosen, or the one behind it
        sums[:blocks][torch.rand(blocks, generator=random_numbers) < choose.choice((0, 0.1))] = float("nan")
        sums[:blocks][torch.rand(blocks, generator=random_numbers) < choose.choice((0, 0.1))] = float("inf")
        nowhere = torch.full((1, tiles, 1), float("nan"))
        constants = {"AT_ONCE": (16, 16, 32, 512), "BUNDLES": (1, 4, 256), "CANDIDATES": (1, 32, 1024)}
        with mock.patch.multiple(triton_decode_select, **{name: choose.choice(x) for name, x in constants.items()}):
            shape = triton_decode_select.select_shape(1, free, blocks, 4)
        selection = torch.full((1, 1, 1, topk), -2, dtype=torch.int32)
        importance = torch.full((1, 1, 1, -(-blocks // shape["BJ"]), shape["BJ"]), 0x7FFFFFFF, dtype=torch.int32)
        triton_decode_select.decode_select(
            torch.zeros(1, 1, 1, 1),
            1,
            Placement(),
            16 * blocks,
            Sizes(4, 4, 16, topk, init, local, 5),
            (4, 1, 4),
            (sums.reshape(1, tiles, 1, 4), nowhere, torch.zeros(1, tiles, 1)),
            shape,
            importance,
            torch.zeros(1, 1, 1, dtype=torch.int32),
            selection,
        )
        worth = sums.nan_to_num(nan=float("inf"), posinf=float("inf")).tolist()
        best = sorted(range(init, blocks - local), key=lambda block: (-worth[block], block))[:free]
        found.append((selection.flatten().tolist(), [*range(init), *sorted(best), *range(blocks - local, blocks)]))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_best_blocks_are_selected_and_of_equal_ones_the_first(process: ProcessPoolExecutor, seed: int) -> None:
    for got, expected in process.submit(ranked, seed).result():
        assert got == expected


class Operations(TorchDispatchMode):
    """Names of the operations whose result is at least as large as a cache."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.large = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = {"transpose", "detach", "alias", "expand", "slice", "view"}
        if isinstance(result, torch.Tensor) and result.numel() >= self.least:
            if function.overloadpacket.__name__ not in views:
                self.large.append(str(function))
        return result


def large_operations() -> list[str]:
    from triton.runtime.interpreter import InterpretedFunction

    from nsa_hf.kernels.gpu.decode import op as triton_decode

    inputs = as_static_cache(make_inputs(replace(STEP, keys=400, batch=2, key_dim=64, value_dim=64)))
    inputs = {name: x.float() if name in TENSORS else x for name, x in inputs.items()}
    assert not inputs["k"].is_contiguous()
    with (
        mock.patch("nsa_hf.kernels.gpu.op.decode_op", triton_decode.decode_op._init_fn),
        mock.patch.object(InterpretedFunction, "run"),  # the interpreter copies what a kernel is given
        Operations(inputs["k"].numel()) as seen,
    ):
        nsa_attention(**inputs, backend="triton")
    return seen.large


def test_no_cache_is_copied(process: ProcessPoolExecutor) -> None:
    assert process.submit(large_operations).result() == []


def compiled() -> list[torch.Tensor]:
    inputs = make_inputs(replace(STEP, batch=2, lengths=(61, 20), starts=(3, 2)), dtype=torch.float32)
    found = []
    for function in (nsa_attention, torch.compile(nsa_attention, fullgraph=True, backend="aot_eager")):
        found += function(**as_static_cache(inputs), backend="triton", return_selection=True)
    return found


def test_compiled_into_one_graph(process: ProcessPoolExecutor) -> None:
    out, selection, *again = process.submit(compiled).result()
    assert torch.equal(out, again[0]) and torch.equal(selection, again[1])


def which_operation(queries: int, grad: bool, packed: bool) -> list[str]:
    shape = Shape(queries=queries, keys=20, kv_heads=1, cu_seqlens=(0, 9, 20) if packed else None)
    inputs = make_inputs(shape, dtype=torch.float32)
    inputs["q"].requires_grad_()
    from nsa_hf.kernels.gpu import op as triton_op

    with (
        torch.set_grad_enabled(grad),
        mock.patch.object(triton_op, "decode_op", wraps=triton_op.decode_op) as decode,
        mock.patch.object(triton_op, "forward_op", wraps=triton_op.forward_op) as forward,
    ):
        nsa_attention(**inputs, backend="triton")
    return ["decode"] * decode.call_count + ["forward"] * forward.call_count


@pytest.mark.parametrize(
    ("queries", "grad", "packed", "expected"),
    [
        (16, False, False, "decode"),
        (17, False, False, "forward"),
        (1, True, False, "forward"),
        (20, False, True, "forward"),
    ],
)
def test_which_kernels_serve(
    process: ProcessPoolExecutor, queries: int, grad: bool, packed: bool, expected: str
) -> None:
    assert process.submit(which_operation, queries, grad, packed).result() == [expected]


def last_dimension_apart() -> list[torch.Tensor]:
    inputs = make_inputs(STEP, dtype=torch.float32)
    apart = {**inputs, "k": inputs["k"].transpose(1, 3).contiguous().transpose(1, 3)}
    assert apart["k"].stride(-1) != 1
    return [nsa_attention(**these, backend="triton") for these in (inputs, apart)]


def test_keys_whose_numbers_are_apart(process: ProcessPoolExecutor) -> None:
    one, other = process.submit(last_dimension_apart).result()
    assert torch.equal(one, other)
