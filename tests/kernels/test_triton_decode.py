"""The decode kernels, interpreted on the CPU, against the float64 reference: what a step of `generate()` may ask."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_inputs import Shape, Sizes, make_inputs
from triton_cases import ALIKE, LARGE, STEP, WIDE, as_static_cache, in_float64

from nsa_hf.kernels import nsa_attention

pytest.importorskip("triton")


def compare(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[float, bool]:
    """The output's largest difference, as a part of its largest number, and whether the selection is the same."""
    from nsa_hf.kernels.gpu import op as triton_op
    from nsa_hf.kernels.gpu.decode import op as triton_decode

    inputs = make_inputs(shape, seed, dtype)
    truth = in_float64(inputs)
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
    "index": replace(STEP, index=(2, 0, 3)),
    "index, no compressed branch": replace(STEP, index=(2, 0, 5), compressed=False),
    "index in 8 bits": replace(STEP, batch=2, index=(2, 0, 40), eight_bits=True, compressed=False),
    "index in 8 bits and compressed branch, three queries": replace(STEP, queries=3, index=(3, 0, 7), eight_bits=True),
    "index of one query and one key": replace(STEP, group=3, queries=5, index=(1, 1, 4), compressed=False),
    "index of other heads than the queries": replace(STEP, group=2, queries=16, index=(5, 0, 4), compressed=False),
    "index, ragged and left-padded, own window": replace(
        STEP, batch=3, queries=2, starts=(4, 0, 30), lengths=(61, 11, 31), own_window=61, index=(2, 0, 3)
    ),
    "index in 8 bits, ragged and left-padded": replace(
        STEP, batch=3, queries=16, starts=(4, 0, 30), lengths=(61, 11, 33), index=(2, 1, 3), eight_bits=True
    ),
    "index, an empty row": replace(STEP, batch=2, lengths=(0, 61), index=(2, 0, 3), compressed=False),
    "index, forced blocks only": replace(STEP, sizes=replace(Sizes(), topk=3), index=(2, 0, 3), compressed=False),
    "index, more blocks asked than there are": replace(
        STEP, sizes=replace(Sizes(), topk=20), index=(2, 0, 3), compressed=False
    ),
    "index, blocks of 48": Shape(
        Sizes(8, 4, 48, 4, 1, 1, 20), queries=2, keys=500, kv_heads=1, index=(2, 0, 6), compressed=False
    ),
    "index, blocks of 300": Shape(
        Sizes(8, 4, 300, 4, 1, 1, 20), queries=2, keys=2900, kv_heads=1, index=(2, 0, 6), compressed=False
    ),
    "index, the paper's sizes": Shape(
        Sizes(32, 16, 64, 16, 1, 2, 512), queries=2, keys=2600, kv_heads=1, group=3, index=(3, 0, 8), compressed=False
    ),
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
        "index in 8 bits",
        "index of one query and one key",
        "index, blocks of 48",
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
    index = (choose.randint(1, 5), choose.randint(0, 1), choose.randint(1, 20)) if choose.random() < 0.5 else None
    eight_bits, compressed = index is not None and choose.random() < 0.5, index is None or choose.random() < 0.3
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
        index=index,
        eight_bits=eight_bits,
        compressed=compressed,
    )


def any_steps(seed: int) -> list[tuple[Shape, tuple[float, bool]]]:
    choose = random.Random(seed)
    return [(shape, compare(shape)) for shape in (any_step(choose) for _ in range(12))]


def test_any_step(process: ProcessPoolExecutor) -> None:
    for shape, (error, same) in process.submit(any_steps, 7).result():
        assert same and error <= 2e-6, shape


def with_splits(splits: int, at_once: int, bundles: int, candidates: int) -> list[tuple[float, bool]]:
    from nsa_hf.kernels.gpu.decode import select as triton_decode_select
    from nsa_hf.kernels.gpu.decode import splits as triton_splits

    shapes = [
        replace(STEP, batch=2, keys=150, lengths=(150, 7), kv_heads=1),
        replace(STEP, own_window=61, kv_heads=1),
        replace(STEP, sizes=replace(Sizes(), topk=9), batch=2, keys=200, lengths=(200, 90), index=(2, 0, 3)),
        # several rows, queries and KV heads with several chunks each, of which more than one candidate is kept
        replace(STEP, sizes=replace(Sizes(), topk=9), batch=2, queries=2, keys=200, lengths=(200, 150)),
    ]
    with (
        mock.patch.object(triton_splits, "fewest_rounds", return_value=splits),
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
    shapes = (shape, shape, replace(shape, index=(2, 0, 3), compressed=False))
    with (
        mock.patch.object(triton_decode_select, "AT_ONCE", 16),
        mock.patch.object(of_triton, "range", shuffled, create=True),
    ):
        found = [compare(shape) for shape in shapes]
    assert any(some != sorted(some) for some in order)
    return found


def test_whichever_program_is_the_last(process: ProcessPoolExecutor) -> None:
    for found in process.submit(in_any_order).result():
        check(found)


def test_splits_fill_the_card() -> None:
    from nsa_hf.kernels.gpu.decode import splits as triton_splits

    with mock.patch.object(triton_splits, "processors", return_value=132):
        cpu = torch.device("cpu")
        assert triton_splits.split_count(4, 64, cpu) == 32
        assert triton_splits.split_count(32, 64, cpu) == 4
        assert triton_splits.split_count(4096, 64, cpu) == 1
        assert triton_splits.split_count(1, 0, cpu) == 1
