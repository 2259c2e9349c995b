"""Gradients of `nsa_attention` (the reference backend): numerical ones, padding, low precision, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention_inputs import TENSORS, Shape, Sizes, make_inputs, one_branch, with_gradients

from nsa_hf.kernels import nsa_attention

TINY = {"batch": 1, "queries": 11, "keys": 11, "kv_heads": 1, "key_dim": 2, "value_dim": 2}
SMALL = Sizes(kernel_size=2, kernel_stride=1, block_size=2, topk=3, init_blocks=1, local_blocks=1, window_size=3)
CASES = {
    "plain": Shape(SMALL, **TINY),
    "blocks of four": Shape(Sizes(topk=3, local_blocks=1), **TINY),
    "two KV heads, wide keys, a scale": Shape(
        SMALL, queries=6, keys=6, kv_heads=2, group=1, key_dim=3, value_dim=2, scale=0.4
    ),
    "own window": Shape(SMALL, **TINY, own_window=11),
    "the last queries, own window": Shape(SMALL, **{**TINY, "queries": 3}, own_window=6),
    "packed": Shape(SMALL, **TINY, cu_seqlens=(0, 1, 7, 11)),
    "packed, own window": Shape(SMALL, **TINY, cu_seqlens=(0, 4, 11), own_window=11),
    "left-padded": Shape(SMALL, **{**TINY, "batch": 2, "queries": 4, "keys": 9}, starts=(6, 0)),
    "ragged and left-padded, own window": Shape(
        SMALL, **{**TINY, "batch": 2, "queries": 4, "keys": 8}, starts=(2, 0), lengths=(4, 8), own_window=8
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = with_gradients(make_inputs(CASES[name], poison=None))  # random numbers where nobody may read
    names = [name for name in TENSORS if name in inputs]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return nsa_attention(**{**inputs, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, [inputs[name] for name in names])


@pytest.mark.parametrize("name", ["plain", "left-padded"])
def test_without_any_compressed_block(name: str) -> None:
    shape = CASES[name]
    inputs = with_gradients(make_inputs(Shape(Sizes(16, 8, 16), **{**TINY, "batch": shape.batch}, starts=shape.starts)))
    nsa_attention(**inputs).sum().backward()
    assert all(inputs[x].grad is not None and inputs[x].grad.isfinite().all() for x in ("q", "k", "v", "gates"))
    assert (inputs["gates"].grad[..., 0] == 0).all()


def test_queries_that_see_no_block_have_no_gradient_in_that_branch() -> None:
    inputs = with_gradients(one_branch(make_inputs(Shape()), 0))
    nsa_attention(**inputs).sum().backward()
    # of the gates, that of the compressed branch
    for grad in (inputs["q"].grad, inputs["gates"].grad[..., 0]):
        assert grad.isfinite().all()
        assert (grad[:, :3] == 0).all() and (grad[:, 3:] != 0).any()


PADDED = {
    "left-padded": Shape(batch=3, starts=(0, 7, 29)),
    "ragged": Shape(batch=3, queries=6, lengths=(30, 11, 3)),
    "both": Shape(batch=3, queries=5, starts=(4, 0, 9), lengths=(30, 11, 12)),
    "both, own window": Shape(batch=3, queries=5, starts=(4, 0, 9), lengths=(30, 11, 12), own_window=30),
    "left-padded, short own window": Shape(batch=3, queries=9, starts=(0, 7, 25), own_window=13),
}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("name", PADDED)
def test_what_belongs_to_nobody_gets_no_gradient(name: str, poison: float) -> None:
    shape = PADDED[name]
    inputs = with_gradients(make_inputs(shape, poison=poison))
    clean = with_gradients(make_inputs(shape, poison=None))
    for x in (inputs, clean):
        nsa_attention(**x).square().sum().backward()
    for tensor in (name for name in TENSORS if name in inputs):
        grad = inputs[tensor].grad
        nobodys = ~inputs[tensor].isfinite() | (inputs[tensor] == poison)
        assert grad.isfinite().all() and (grad[nobodys] == 0).all()
        assert tensor in ("q", "gates") or nobodys.any()
        torch.testing.assert_close(grad, clean[tensor].grad, rtol=1e-12, atol=1e-12)


def test_queries_before_the_first_token_get_no_gradient() -> None:
    inputs = with_gradients(make_inputs(PADDED["both"]))
    with torch.no_grad():
        inputs["q"][2, :2] = inputs["gates"][2, :2] = float("nan")
    nsa_attention(**inputs).sum().backward()
    for name in ("q", "gates"):
        assert (inputs[name].grad[2, :2] == 0).all()
        assert (inputs[name].grad[2, 2:] != 0).any() and inputs[name].grad.isfinite().all()


LOW_PRECISION = {"plain": Shape(), "packed": Shape(cu_seqlens=(0, 13, 30)), "own window": PADDED["both, own window"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Against float64 at the same (rounded) inputs: fp32 arithmetic, rounded to the dtype at the end.

    Keys and values that two branches share may get the sum of two rounded gradients, rounded again: in float64 both
    branches have their own here, so that the two parts are known.
    """
    low = with_gradients(make_inputs(LOW_PRECISION[name], seed=3, dtype=dtype))
    high = {name: x.double() if name in TENSORS else x for name, x in low.items()}
    high = with_gradients({"k_win": high["k"], "v_win": high["v"], **high})
    output, picked = nsa_attention(**low, return_selection=True)
    exact, picked_exactly = nsa_attention(**high, return_selection=True)
    assert torch.equal(picked, picked_exactly)  # no two blocks of this seed are so close
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    output.backward(upstream)
    exact.backward(upstream.double())
    half_unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for tensor in (name for name in TENSORS if name in low):
        shared = tensor in ("k", "v") and "k_win" not in low
        parts = [high[x].grad for x in ([tensor, f"{tensor}_win"] if shared else [tensor])]
        expected = sum(parts[1:], start=parts[0])
        rounded = [*parts, expected] if shared else [expected]
        # 1e-5 of the largest gradient: the sums of some hundred products in fp32; 1 %: of what is already rounded
        allowed = 1e-5 * expected.abs().max() + 1.01 * half_unit * sum(x.abs() for x in rounded)
        grad = low[tensor].grad
        error = (grad.double() - expected).abs()
        assert grad.dtype == dtype and (error <= allowed).all(), f"{tensor} off by {error.max():.2e}"


MEASURE = """
import re, resource, sys, torch
from pathlib import Path
from nsa_hf.kernels import n_blocks, nsa_attention

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # of this program alone: Linux's `ru_maxrss` begins with what the process that started it had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

tokens, blocks = 8192, n_blocks(8192, 32, 16)
def tensor(*shape):
    return torch.randn(*shape, requires_grad=True)
q, gates = tensor(1, tokens, 9, 64), tensor(1, tokens, 9, 3)
k, v = tensor(1, tokens, 3, 64), tensor(1, tokens, 3, 64)
k_cmp, v_cmp = tensor(1, blocks, 3, 64), tensor(1, blocks, 3, 64)
before = peak()
nsa_attention(q, k, v, k_cmp, v_cmp, gates, backend="reference").sum().backward()
assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v, k_cmp, v_cmp, gates))
print(peak() - before)
"""


def test_memory_of_8192_tokens_stays_under_2_gib() -> None:
    """Of SmolLM2's heads (9 on 3, 64 wide) in fp32; every logit of one branch at once would take 2.25 GiB."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout)
    assert 0 < used < 2 * 2**30, f"{used / 2**30:.2f} GiB"
