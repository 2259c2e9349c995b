"""Which blocks the decode kernels choose, interpreted on the CPU: equal, close, infinite and absent scores."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_inputs import TENSORS, Shape, Sizes, make_inputs

from nsa_hf.kernels import Placement, nsa_attention

pytest.importorskip("triton")


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


def select_by_equal_index_keys(at_once: int) -> list[torch.Tensor]:
    """Every head's largest product of every block is the same."""
    from nsa_hf.kernels.gpu.decode import select as triton_decode_select

    inputs = make_inputs(Shape(replace(Sizes(), topk=6), queries=9, keys=60, index=(3, 0, 2)), dtype=torch.float32)
    inputs["k_index"] = inputs["k_index"][:, :1].expand_as(inputs["k_index"])
    with mock.patch.object(triton_decode_select, "AT_ONCE", at_once):
        return [nsa_attention(**inputs, backend=name, return_selection=True)[1] for name in ("triton", "reference")]


@pytest.mark.parametrize("at_once", [4, 16, 64])
def test_of_equal_blocks_of_an_index_the_first_is_taken(process: ProcessPoolExecutor, at_once: int) -> None:
    got, expected = process.submit(select_by_equal_index_keys, at_once).result()
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
    from nsa_hf.kernels.gpu.decode.scores import CompressedScores

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
        nowhere, lse = torch.full((1, tiles, 1), float("nan")), torch.zeros(1, 1, 1, 1)
        scores = CompressedScores(sums.reshape(1, tiles, 1, 4), nowhere, torch.zeros(1, tiles, 1), lse, 1, (4, 1, 4))
        constants = {"AT_ONCE": (16, 16, 32, 512), "BUNDLES": (1, 4, 256), "CANDIDATES": (1, 32, 1024)}
        with mock.patch.multiple(triton_decode_select, **{name: choose.choice(x) for name, x in constants.items()}):
            shape = triton_decode_select.select_shape(1, free, blocks, 4)
        selection = torch.full((1, 1, 1, topk), -2, dtype=torch.int32)
        sizes, arrived = Sizes(4, 4, 16, topk, init, local, 5), torch.zeros(1, 1, 1, dtype=torch.int32)
        triton_decode_select.decode_select(scores, Placement(), 16 * blocks, sizes, shape, arrived, selection, True)
        worth = sums.nan_to_num(nan=float("inf"), posinf=float("inf")).tolist()
        best = sorted(range(init, blocks - local), key=lambda block: (-worth[block], block))[:free]
        found.append((selection.flatten().tolist(), [*range(init), *sorted(best), *range(blocks - local, blocks)]))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_best_blocks_are_selected_and_of_equal_ones_the_first(process: ProcessPoolExecutor, seed: int) -> None:
    for got, expected in process.submit(ranked, seed).result():
        assert got == expected
