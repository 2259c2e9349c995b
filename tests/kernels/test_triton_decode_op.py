"""The operator of decoding, interpreted on the CPU: when it is taken, what it copies, and `torch.compile`."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_inputs import Shape, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import STEP, as_static_cache

from nsa_hf.kernels import nsa_attention

pytest.importorskip("triton")


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


def large_operations(shape: Shape, name: str) -> list[str]:
    """The operations of a step whose result is as large as that input or larger; nothing is launched."""
    from triton.runtime.interpreter import InterpretedFunction

    from nsa_hf.kernels.gpu.decode import op as triton_decode

    inputs = as_static_cache(make_inputs(shape))
    inputs = {
        name: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x for name, x in inputs.items()
    }
    assert not inputs[name].is_contiguous()
    with (
        mock.patch("nsa_hf.kernels.gpu.op.decode_op", triton_decode.run_decode),
        mock.patch.object(InterpretedFunction, "run"),  # the interpreter copies what a kernel is given
        Operations(inputs[name].numel()) as seen,
    ):
        nsa_attention(**inputs, backend="triton")
    return seen.large


CACHE = replace(STEP, keys=400, batch=2, key_dim=64, value_dim=64)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (CACHE, "k"),
        (replace(CACHE, index=(2, 0, 64), compressed=False), "k_index"),
        (replace(CACHE, group=1, value_dim=1, index=(1, 0, 64), eight_bits=True, compressed=False), "k_index_scales"),
    ],
    ids=["compressed", "index", "index in 8 bits"],
)
def test_no_cache_is_copied(process: ProcessPoolExecutor, shape: Shape, name: str) -> None:
    assert process.submit(large_operations, shape, name).result() == []


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
