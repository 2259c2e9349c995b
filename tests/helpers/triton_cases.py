"""What the tests of the Triton kernels share: the cases, the comparison, and a process in which Triton interprets.

Triton decides when it is imported whether kernels are interpreted. So that no other test is affected, the kernels run
in a process of their own: `interpreted(function, ...)` calls a function of a test module there.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from attention_inputs import TENSORS, Inputs, Shape, Sizes, make_inputs, with_gradients

from nsa_hf.kernels import nsa_attention

SMALL = Shape(queries=26, keys=26, kv_heads=1)
ALIKE = Sizes(4, 4, 4, 3, 1, 1, 4)  # compressed blocks that do not overlap
WIDE = Sizes(6, 2, 8, 4, 1, 1, 7)  # each token in three compressed blocks
LARGE = Sizes(8, 4, 80, 3, 1, 1, 20)  # selection blocks taken in parts (of 32 tokens for float32)
# the local blocks in a window of several tiles, so that both are one pass
NEAR = Shape(Sizes(4, 2, 4, 4, 1, 2, 70), queries=150, keys=150, kv_heads=1)

CASES = {
    "groups of two": replace(SMALL, kv_heads=2),
    "groups of one": replace(SMALL, group=1),
    "groups of three": replace(SMALL, group=3),
    "groups of seven": replace(SMALL, group=7),
    "groups of twelve, two rows": replace(SMALL, group=12, batch=2, queries=5, keys=20),
    "groups of twelve, packed": replace(SMALL, group=12, queries=17, keys=17, cu_seqlens=(0, 2, 12, 17)),
    "groups of twelve, ragged and left-padded": replace(
        SMALL, group=12, batch=2, queries=4, keys=20, starts=(17, 3), lengths=(20, 14), key_dim=20, value_dim=4
    ),
    "groups of twelve, large blocks": Shape(replace(LARGE, topk=2), queries=3, keys=170, kv_heads=1, group=12),
    "wide keys": replace(SMALL, key_dim=24, value_dim=16),
    "wide values": replace(SMALL, key_dim=3, value_dim=20),
    "keys of 192, values of 128": replace(SMALL, key_dim=192, value_dim=128),
    "heads of 96, groups of twelve": replace(SMALL, group=12, queries=9, keys=20, key_dim=96, value_dim=96),
    "heads of 80, index of 40": replace(SMALL, group=3, key_dim=80, value_dim=80, index=(3, 0, 40)),
    "own scale": replace(SMALL, scale=0.2),
    "one token": Shape(queries=1, keys=1),
    "shorter than one compressed block": Shape(queries=3, keys=3),
    "no init block": replace(SMALL, sizes=replace(Sizes(), init_blocks=0)),
    "two init blocks": replace(SMALL, sizes=replace(Sizes(), init_blocks=2, topk=5)),
    "forced blocks only": replace(SMALL, sizes=replace(Sizes(), topk=3)),
    "own block only": replace(SMALL, sizes=replace(Sizes(), topk=1, init_blocks=0, local_blocks=1)),
    "more blocks asked than there are": replace(SMALL, sizes=replace(Sizes(), topk=20)),
    "far more blocks asked than there are": replace(SMALL, sizes=replace(Sizes(), topk=300)),
    "everything larger than the text": Shape(Sizes(8000, 4, 8000, 300, 100, 100, 9000), queries=21, keys=21),
    "window of one": replace(SMALL, sizes=replace(Sizes(), window_size=1)),
    "window over everything": replace(SMALL, sizes=replace(Sizes(), window_size=100)),
    "window that neither holds the local blocks nor is in them": replace(NEAR, sizes=replace(Sizes(), window_size=7)),
    "local blocks in the window": NEAR,
    "local blocks in the window, large ones": replace(NEAR, sizes=Sizes(8, 4, 32, 3, 1, 2, 64), group=3),
    "local blocks in the window, the last queries": replace(NEAR, queries=60),
    "local blocks in the window, ragged and left-padded": replace(
        NEAR, batch=3, queries=60, starts=(0, 90, 140), lengths=(41, 150, 149)
    ),
    "local blocks in the window, packed": replace(NEAR, cu_seqlens=(0, 3, 75, 76, 150)),
    "local blocks in the window, groups of twelve": replace(NEAR, group=12, queries=40, keys=90),
    "local blocks in the window, its own keys": replace(NEAR, queries=60, own_window=140),
    "blocks that do not overlap": replace(SMALL, sizes=ALIKE),
    "each token in three blocks": Shape(WIDE, queries=50, keys=50, kv_heads=1),
    # scored some at a time: sections of blocks in one step, in two, and with two local blocks, where nothing is masked
    "many blocks": Shape(Sizes(4, 2, 4, 8, 1, 1, 9), queries=9, keys=300, kv_heads=1, group=3),
    "many blocks, a section in two steps": Shape(replace(WIDE, topk=6), queries=9, keys=430, kv_heads=1),
    "many blocks, of none the first": Shape(
        Sizes(6, 2, 8, 6, 0, 2, 7), queries=40, keys=430, kv_heads=1, cu_seqlens=None, batch=2, starts=(3, 150)
    ),
    "many blocks, packed": Shape(
        replace(WIDE, topk=5), queries=330, keys=330, kv_heads=1, cu_seqlens=(0, 151, 152, 330)
    ),
    "many blocks that do not overlap": Shape(replace(ALIKE, topk=6), queries=9, keys=280, kv_heads=1),
    "large blocks": Shape(LARGE, queries=40, keys=350, kv_heads=1),
    "the last queries": Shape(queries=7, keys=40, kv_heads=1),
    "enough queries to be split over programs": replace(SMALL, queries=72, keys=72),
    "decoding": Shape(batch=2, queries=1, keys=37),
    "own window keys": replace(SMALL, queries=6, own_window=26),
    "own window keys, the last few": replace(SMALL, queries=6, own_window=10),
    "left-padded": replace(SMALL, batch=2, starts=(7, 25)),
    "left-padded, the last queries": replace(SMALL, batch=2, queries=9, starts=(0, 20), own_window=13),
    "ragged": replace(SMALL, batch=2, queries=3, lengths=(26, 11)),
    "ragged, more queries than tokens": replace(SMALL, batch=2, queries=6, lengths=(26, 3)),
    "ragged and left-padded, own window": replace(
        SMALL, batch=3, queries=5, starts=(4, 0, 9), lengths=(26, 11, 12), own_window=26
    ),
    "packed": replace(SMALL, cu_seqlens=(0, 11, 26)),
    "packed, some shorter than a block": replace(SMALL, cu_seqlens=(0, 2, 13, 14, 17, 26)),
    "packed, own window": replace(SMALL, cu_seqlens=(0, 11, 26), own_window=26),
    "index": replace(SMALL, index=(2, 0, 3)),
    "index, no compressed branch": replace(SMALL, kv_heads=2, index=(2, 0, 5), compressed=False),
    "index of one query and one key": replace(SMALL, kv_heads=2, group=3, index=(1, 1, 4), compressed=False),
    "index, the last queries, own window": replace(SMALL, queries=6, index=(2, 0, 3), compressed=False, own_window=10),
    "index in 8 bits": replace(SMALL, kv_heads=2, index=(2, 0, 5), eight_bits=True, compressed=False),
    "index, left-padded": replace(SMALL, batch=2, starts=(7, 25), index=(3, 0, 3), group=3, compressed=False),
    "index, ragged": replace(SMALL, batch=2, queries=3, lengths=(26, 11), index=(2, 0, 3), compressed=False),
    "index, packed": replace(SMALL, cu_seqlens=(0, 2, 13, 14, 17, 26), index=(2, 0, 3), compressed=False),
    "index, many blocks": Shape(
        Sizes(4, 2, 4, 8, 1, 1, 9), queries=9, keys=300, kv_heads=1, index=(2, 0, 6), compressed=False
    ),
    "index, blocks of 48": Shape(
        Sizes(8, 4, 48, 4, 1, 1, 20), queries=20, keys=500, kv_heads=1, index=(2, 0, 6), compressed=False
    ),
    "the paper's sizes": Shape(Sizes(32, 16, 64, 16, 1, 2, 512), queries=3, keys=1500, kv_heads=1, group=3),
}


STEP = Shape(queries=1, keys=61, kv_heads=2)  # of decoding
CACHES = ("k", "v", "k_win", "v_win", "k_index", "k_index_scales")


def as_static_cache(inputs: Inputs) -> Inputs:
    """Keys, values and an index's keys as a static cache has them: `[B, Hk, S, D]`, seen as `[B, S, Hk, D]`."""
    turned = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in CACHES if name in inputs}
    return {**inputs, **turned}


def compare(
    shape: Shape, seed: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[dict[str, float], float]:
    """The kernels against the float64 reference on the same inputs, NaN wherever nothing may be read.

    Returns:
        The largest difference of the output and of each gradient, as a part of the tensor's largest number; and the
        share of queries whose selection is the reference's.
    """
    inputs = on_device(make_inputs(shape, seed, dtype), device)
    if device == "cuda":  # what is compared then repeats these launches
        nsa_attention(**with_gradients(on_device(make_inputs(shape, seed + 1, dtype), device))).sum().backward()
    mine = with_gradients(inputs)
    truth = with_gradients(in_float64(inputs))
    out, selection = nsa_attention(**mine, backend="triton", return_selection=True)
    expected, expected_selection = nsa_attention(**truth, backend="reference", return_selection=True)
    assert out.dtype == dtype and selection.dtype == torch.int32 and selection.shape == expected_selection.shape
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    out.backward(dout)
    expected.backward(dout.double())

    def difference(got: torch.Tensor, want: torch.Tensor) -> float:
        assert got.shape == want.shape
        if not want.numel():
            return 0.0
        # where terms of order 1 cancel exactly, their rounding is left
        return float((got.double() - want).abs().max() / want.abs().max().clamp(min=0.1))

    errors = {"out": difference(out.detach(), expected.detach())}
    for name in TENSORS:
        if mine.get(name) is not None:
            assert mine[name].grad.dtype == mine[name].dtype
            errors[name] = difference(mine[name].grad, truth[name].grad)
    return errors, float((selection == expected_selection).all(-1).double().mean())


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64, but for the scales of keys in 8 bits, which have one type."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "k_index_scales" else x
        for name, x in inputs.items()
    }


def on_device(inputs: Inputs, device: str) -> Inputs:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def prepare() -> None:
    """In the new process: one thread, and memory that nothing has written to is NaN."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton's kernels run on the CPU."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare) as pool:
            pool.submit(int).result()  # started with the variable set
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            yield pool
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
