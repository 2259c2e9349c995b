"""The Triton backend's edges: ties, limits that are errors, custom operators, and life without Triton."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from attention_inputs import EMPTY, Shape, Sizes, check_empty, make_inputs, run_empty, with_gradients
from torch.utils.checkpoint import checkpoint
from triton_cases import CASES, SMALL

from nsa_hf.kernels import nsa_attention

pytest.importorskip("triton")


def select_equal_keys(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    shape = Shape(sizes, queries=60, keys=60, kv_heads=1, group=2)
    inputs = make_inputs(shape, dtype=torch.float32)
    inputs["q"] = (4 * inputs["q"]).round()
    inputs["k_cmp"] = (4 * inputs["k_cmp"][:, :1]).round().expand_as(inputs["k_cmp"])
    return tuple(nsa_attention(**inputs, backend=name, return_selection=True)[1] for name in ("triton", "reference"))


@pytest.mark.parametrize("sizes", [replace(Sizes(), topk=6), replace(Sizes(), topk=3, init_blocks=0)], ids=str)
def test_of_equal_blocks_the_first_is_taken(process: ProcessPoolExecutor, sizes: Sizes) -> None:
    got, expected = process.submit(select_equal_keys, sizes).result()
    assert torch.equal(got, expected)


def select_without_importance() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys so long that one probability is 1 and all others underflow to exactly 0."""
    sizes = Sizes(kernel_size=8, kernel_stride=1, block_size=8, topk=2, init_blocks=0, local_blocks=1)
    inputs = make_inputs(Shape(sizes, queries=40, keys=40), dtype=torch.float32)
    inputs["k_cmp"] *= 1e4
    return tuple(nsa_attention(**inputs, backend=name, return_selection=True)[1] for name in ("triton", "reference"))


def test_of_blocks_without_importance_the_first_is_taken(process: ProcessPoolExecutor) -> None:
    got, expected = process.submit(select_without_importance).result()
    assert torch.equal(got, expected)


def twice() -> bool:
    results = []
    for _ in range(2):
        inputs = with_gradients(make_inputs(CASES["groups of three"], dtype=torch.float32))
        out = nsa_attention(**inputs, backend="triton")
        out.backward(torch.ones_like(out))
        results.append([out, *(inputs[name].grad for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates"))])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def differentiate_twice() -> str:
    inputs = with_gradients(make_inputs(CASES["groups of three"], dtype=torch.float32))
    out = nsa_attention(**inputs, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
    try:
        first.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_second_derivative_is_an_error(process: ProcessPoolExecutor) -> None:
    assert "once_differentiable" in process.submit(differentiate_twice).result()


def index_with_gradient(queries: int) -> bool:
    shape = Shape(queries=queries, keys=40, kv_heads=1, index=(2, 0, 3), compressed=False)
    inputs = make_inputs(shape, dtype=torch.float32)
    inputs["q_index"].requires_grad_()
    return nsa_attention(**inputs, backend="triton").requires_grad


@pytest.mark.parametrize("queries", [2, 20])
def test_nothing_of_an_index_has_a_gradient(process: ProcessPoolExecutor, queries: int) -> None:
    assert not process.submit(index_with_gradient, queries).result()


IMPORTED_TWICE = """
import sys, torch
from nsa_hf.kernels.gpu import op
for name in [name for name in sys.modules if name.startswith("nsa_hf")]:
    del sys.modules[name]
from nsa_hf.kernels.gpu import op as again
assert again is not op and torch.ops.nsa_hf.forward.default is again.forward_op
"""


def test_the_operators_may_be_imported_twice() -> None:
    """As in a notebook."""
    subprocess.run([sys.executable, "-c", IMPORTED_TWICE], check=True, timeout=120)


def test_the_same_inputs_give_the_same_bits(process: ProcessPoolExecutor) -> None:
    assert process.submit(twice).result()


def with_dead_queries() -> list[torch.Tensor]:
    inputs = make_inputs(CASES["left-padded, the last queries"], dtype=torch.float32)
    dead = slice(0, 3)  # of row 1: positions 17 to 19, and it starts at 20
    inputs["q"][1, dead] = inputs["gates"][1, dead] = float("nan")
    inputs = with_gradients(inputs)
    out, selection = nsa_attention(**inputs, backend="triton", return_selection=True)
    dout = torch.ones_like(out)
    dout[1, dead] = float("nan")
    out.backward(dout)
    gradients = [x.grad for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return [out.detach()[1, dead], inputs["q"].grad[1, dead], selection[1, dead] + 1, *gradients]


def test_queries_before_the_first_token_are_not_read(process: ProcessPoolExecutor) -> None:
    out, dq, selection, *gradients = process.submit(with_dead_queries).result()
    assert not out.any() and not dq.any() and not selection.any()
    assert len(gradients) == 8 and all(bool(x.isfinite().all()) for x in gradients)


def done_in_other_ways() -> tuple[torch.Tensor, ...]:
    def double(q: torch.Tensor, **rest) -> torch.Tensor:
        return 2 * nsa_attention(q, **rest, backend="triton")

    def checkpointed(q: torch.Tensor, **rest) -> torch.Tensor:
        return checkpoint(lambda x: double(x, **rest), q, use_reentrant=False)

    found = []
    for function in (double, torch.compile(double, fullgraph=True, backend="aot_eager"), checkpointed):
        inputs = with_gradients(make_inputs(replace(SMALL, queries=9, keys=9), dtype=torch.float32))
        out = function(**inputs)
        out.sum().backward()
        found += [out.detach(), inputs["q"].grad, inputs["k_cmp"].grad]
    return tuple(found)


def test_compiled_into_one_graph_and_checkpointed(process: ProcessPoolExecutor) -> None:
    found = process.submit(done_in_other_ways).result()
    for other in (found[3:6], found[6:]):
        assert all(torch.equal(a, b) for a, b in zip(found[:3], other, strict=True))


class Cut(torch.autograd.Function):
    """The identity, through which no gradient comes back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def cut_off() -> list[torch.Tensor | None]:
    inputs = with_gradients(make_inputs(SMALL, dtype=torch.float32))
    out = nsa_attention(**inputs, backend="triton")
    (Cut.apply(out).sum() + inputs["q"].sum()).backward()
    return [inputs["q"].grad, inputs["k"].grad]


def test_an_output_without_a_gradient(process: ProcessPoolExecutor) -> None:
    of_q, of_k = process.submit(cut_off).result()
    assert torch.equal(of_q, torch.ones_like(of_q)) and of_k is None


def two_lengths(compiled: bool) -> list[torch.Tensor]:
    function = torch.compile(nsa_attention, fullgraph=True, backend="aot_eager") if compiled else nsa_attention
    found = []
    for tokens in (18, 23):  # at the second one the length becomes a symbol
        inputs = with_gradients(make_inputs(replace(SMALL, queries=tokens, keys=tokens), dtype=torch.float32))
        out = function(**inputs, backend="triton")
        out.sum().backward()
        found += [out.detach(), inputs["q"].grad, inputs["k_cmp"].grad]
    return found


def test_compiled_for_every_length(process: ProcessPoolExecutor) -> None:
    found, expected = (process.submit(two_lengths, compiled).result() for compiled in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def empty(name: str) -> list[torch.Tensor]:
    return run_empty(nsa_attention, EMPTY[name], "triton")


@pytest.mark.parametrize("name", EMPTY)
def test_no_rows_or_no_queries_give_nothing(process: ProcessPoolExecutor, name: str) -> None:
    check_empty(EMPTY[name], process.submit(empty, name).result())


def far_beyond_the_text(shape: Shape) -> list[torch.Tensor]:
    """Output and gradients with sizes that just cover the text, and with far larger ones."""
    found = []
    for topk, window in ((20, 50), (2**31 - 1, 2**31 - 1)):
        inputs = {**make_inputs(shape, dtype=torch.float32), "topk": topk, "window_size": window}
        inputs = with_gradients(inputs) if shape.queries > 1 else inputs
        out = nsa_attention(**inputs, backend="triton")
        found.append([out.detach()])
        if shape.queries > 1:
            out.sum().backward()
            found[-1] += [inputs[name].grad for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates")]
    return [torch.stack(pair) for pair in zip(*found, strict=True)]


@pytest.mark.parametrize("queries", [26, 1], ids=["prefill", "decoding"])
def test_sizes_far_beyond_the_text(process: ProcessPoolExecutor, queries: int) -> None:
    """They would take a terabyte."""
    for little, much in process.submit(far_beyond_the_text, replace(SMALL, queries=queries)).result():
        torch.testing.assert_close(little, much, rtol=0, atol=1e-6)
        assert little.any()


def call(shape: Shape, dtype: torch.dtype) -> None:
    nsa_attention(**make_inputs(shape, dtype=dtype), backend="triton")


LIMITS = {
    "float64": (SMALL, torch.float64, TypeError, "got float64: use backend='reference'"),
    "wide heads": (replace(SMALL, key_dim=264), torch.float32, ValueError, "at most 256 numbers, got Dk = 264"),
    "many heads a KV head": (replace(SMALL, group=129), torch.float32, ValueError, "at most 128 query heads"),
    "many chosen blocks": (
        Shape(Sizes(1, 1, 1, 260, 1, 1, 4), queries=1, keys=300, kv_heads=1),
        torch.float32,
        ValueError,
        "at most 256 blocks by importance, got topk - init_blocks - local_blocks = 258",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_errors(process: ProcessPoolExecutor, name: str) -> None:
    shape, dtype, error, text = LIMITS[name]
    with pytest.raises(error, match=text):
        process.submit(call, shape, dtype).result()


def test_the_cpu_needs_the_interpreter() -> None:
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        nsa_attention(**make_inputs(SMALL, dtype=torch.float32), backend="triton")


def test_without_triton() -> None:
    """The package is imported, and the reference works; the Triton backend says what is missing."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from nsa_hf.kernels import nsa_attention
x = torch.ones(1, 3, 1, 4)
arguments = (x, x, x, x[:, :0], x[:, :0], torch.ones(1, 3, 1, 3))
nsa_attention(*arguments)
try:
    nsa_attention(*arguments, backend="triton")
except ImportError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_nothing_of_triton_at_import() -> None:
    code = "import sys, nsa_hf.kernels; assert not any('triton_' in m for m in sys.modules if 'nsa_hf' in m)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
