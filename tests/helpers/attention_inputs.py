"""Random inputs of `nsa_attention` for the tests: small, of every layout, with NaN wherever nothing may be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import Answer, count_blocks, documents, forced_blocks

from nsa_hf.kernels import quantize_index_keys

Inputs = dict[str, Any]
TENSORS = ("q", "k", "v", "k_cmp", "v_cmp", "gates", "k_win", "v_win")  # those that have gradients


@dataclass(frozen=True)
class Sizes:
    """The sizes of the operation, small by default: in 30 tokens every branch already leaves something out."""

    kernel_size: int = 4
    kernel_stride: int = 2
    block_size: int = 4
    topk: int = 4
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 5


@dataclass(frozen=True)
class Shape:
    """Everything that decides the inputs but the random numbers."""

    sizes: Sizes = Sizes()
    batch: int = 1
    queries: int = 30
    keys: int = 30
    kv_heads: int = 2
    group: int = 2
    key_dim: int = 4
    value_dim: int = 4
    starts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    own_window: int | None = None  # tokens in k_win and v_win; None: shared
    scale: float | None = None
    index: tuple[int, int, int] | None = None  # index heads a KV head, 1 if all heads share one key, channels
    eight_bits: bool = False  # the index's keys in 8 bits
    compressed: bool = True  # False: no compressed branch, with an index only


def make_inputs(
    shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float64, poison: float | None = float("nan")
) -> Inputs:
    """The keyword arguments of `nsa_attention`. Keys, values and compressed blocks that belong to nobody are `poison`
    (None leaves them random, for tests that must perturb them)."""
    sizes, random = shape.sizes, torch.Generator().manual_seed(seed)
    found = documents(
        shape.batch,
        shape.keys,
        sizes.kernel_size,
        sizes.kernel_stride,
        shape.starts,
        shape.lengths,
        shape.cu_seqlens,
    )
    if shape.cu_seqlens is None:  # as many slots as a row without padding has
        slots = count_blocks(shape.keys, sizes.kernel_size, sizes.kernel_stride)
    else:
        slots = sum(document.blocks for document in found)

    def normal(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=random, dtype=torch.float64)

    def owned(length: int, dim: int, missing: int = 0, of_blocks: bool = False) -> torch.Tensor:
        x = normal(shape.batch, length, shape.kv_heads, dim)
        keep = torch.zeros(shape.batch, length, dtype=torch.bool)
        for document in found:
            first, count = document.first - missing, document.tokens
            if of_blocks:
                first, count = document.first_block, document.blocks
            keep[document.row, max(first, 0) : max(first + count, 0)] = True
        if poison is not None:
            x[~keep] = poison
        return x

    inputs: Inputs = {
        "q": normal(shape.batch, shape.queries, shape.kv_heads * shape.group, shape.key_dim),
        "k": owned(shape.keys, shape.key_dim),
        "v": owned(shape.keys, shape.value_dim),
        "k_cmp": owned(slots, shape.key_dim, of_blocks=True),
        "v_cmp": owned(slots, shape.value_dim, of_blocks=True),
        "gates": torch.sigmoid(normal(shape.batch, shape.queries, shape.kv_heads * shape.group, 3)),
    }
    if shape.own_window is not None:
        missing = shape.keys - shape.own_window
        inputs["k_win"] = owned(shape.own_window, shape.key_dim, missing)
        inputs["v_win"] = owned(shape.own_window, shape.value_dim, missing)
    if shape.index is not None:
        heads, one_key, channels = shape.index
        keys = owned(shape.keys, channels)
        inputs["q_index"] = normal(shape.batch, shape.queries, shape.kv_heads * heads, channels)
        inputs["k_index"] = keys[:, :, :1] if one_key else keys
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if shape.eight_bits:
        inputs["k_index"], inputs["k_index_scales"] = quantize_index_keys(inputs["k_index"])
    if not shape.compressed:
        inputs |= {"k_cmp": None, "v_cmp": None}
    for name in ("starts", "lengths", "cu_seqlens"):
        if (bounds := getattr(shape, name)) is not None:
            inputs[name] = torch.tensor(bounds, dtype=torch.int32)
    return {**inputs, **asdict(sizes), "scale": shape.scale}


def with_gradients(inputs: Inputs) -> Inputs:
    """The same inputs with every differentiable tensor as a fresh leaf that wants a gradient."""
    return {
        name: x.detach().clone().requires_grad_() if name in TENSORS and x is not None else x
        for name, x in inputs.items()
    }


EMPTY = {
    "no rows": Shape(batch=0),
    "no queries": Shape(batch=2, queries=0),
    "no queries, own window": Shape(queries=0, own_window=5),
    "no text": Shape(batch=2, queries=0, keys=0),
    "no rows, ragged": Shape(batch=0, starts=(), lengths=()),
    "no queries, ragged": Shape(batch=2, queries=0, starts=(3, 1), lengths=(7, 30)),
}


def run_empty(attention: Callable[..., Any], shape: Shape, backend: str, device: str = "cpu") -> list[torch.Tensor]:
    """Output, selection and all gradients of `nsa_attention`."""
    inputs = make_inputs(shape, dtype=torch.float32)
    inputs = with_gradients({name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
    out, selection = attention(**inputs, backend=backend, return_selection=True)
    out.sum().backward()
    return [out.detach(), selection, *(inputs[name].grad for name in TENSORS if inputs.get(name) is not None)]


def check_empty(shape: Shape, found: list[torch.Tensor]) -> None:
    """Empty tensors of the right shapes, and gradients that are zero, not absent."""
    out, selection, *gradients = found
    assert out.shape == (shape.batch, shape.queries, shape.kv_heads * shape.group, shape.value_dim)
    assert selection.shape == (shape.batch, shape.queries, shape.kv_heads, shape.sizes.topk)
    assert out.dtype == torch.float32 and selection.dtype == torch.int32
    inputs = make_inputs(shape)
    assert [x.shape for x in gradients] == [inputs[name].shape for name in TENSORS if inputs.get(name) is not None]
    assert not any(x.any() for x in gradients)


def one_branch(inputs: Inputs, branch: int) -> Inputs:
    """The same inputs with the gates open for one branch alone (0 compressed, 1 selected, 2 window)."""
    gates = torch.zeros_like(inputs["gates"])
    gates[..., branch] = 1
    return {**inputs, "gates": gates}


def assert_selection_is_good(selection: torch.Tensor, answer: Answer, sizes: Sizes, slack: float) -> None:
    """What an inexact computation owes, since near-equals may change places.

    `selection` holds the forced blocks and as many others as there may be, ascending and then -1; no block left out is
    more important than one taken, by more than `slack`.
    """
    assert selection.dtype == torch.int32 and selection.shape == answer.selection.shape
    asked = torch.zeros(selection.shape[:-1], dtype=torch.bool)
    for (b, t, h), importance in answer.importance.items():
        asked[b, t, h] = True
        row = selection[b, t, h].tolist()
        count = min(sizes.topk, len(importance))
        blocks = row[:count]
        assert blocks == sorted(set(blocks)) and row[count:] == [-1] * (sizes.topk - count)
        assert set(blocks) <= set(range(len(importance)))
        forced = forced_blocks(len(importance), sizes.init_blocks, sizes.local_blocks)
        assert forced <= set(blocks)
        taken = [importance[j] for j in set(blocks) - forced]
        left = [importance[j] for j in set(range(len(importance))) - set(blocks)]
        assert not taken or not left or min(taken) >= max(left) - slack
    assert (selection[~asked] == -1).all()


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    """Sizes that fit each other: d | l, d | l', l <= l', n >= init + local."""
    stride = draw(st.integers(1, 4))
    kernel = draw(st.integers(1, 3))
    block = draw(st.integers(kernel, 4))
    init, local = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    return Sizes(
        kernel_size=kernel * stride,
        kernel_stride=stride,
        block_size=block * stride,
        topk=init + local + draw(st.integers(0, 3)),
        init_blocks=init,
        local_blocks=local,
        window_size=draw(st.integers(1, 12)),
    )


@st.composite
def any_shape(draw: st.DrawFn) -> Shape:
    """Any layout: plain rows, left-padded and ragged rows, packed documents; own window keys or shared ones."""
    sizes = draw(any_sizes())
    heads = {"kv_heads": draw(st.integers(1, 2)), "group": draw(st.integers(1, 3))}
    dims = {"key_dim": draw(st.integers(1, 5)), "value_dim": draw(st.integers(1, 5))}
    scale = draw(st.sampled_from([None, 0.3, 1.0]))
    index = draw(st.none() | st.tuples(st.integers(1, 3), st.integers(0, 1), st.integers(1, 4)))
    scorer = {
        "index": index,
        "eight_bits": index is not None and draw(st.booleans()),
        "compressed": index is None or draw(st.booleans()),
    }
    if draw(st.booleans()):
        tokens = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
        ends = [sum(tokens[:i]) for i in range(len(tokens) + 1)]
        total, own = ends[-1], draw(st.booleans())
        return Shape(
            sizes,
            1,
            total,
            total,
            **heads,
            **dims,
            **scorer,
            scale=scale,
            cu_seqlens=tuple(ends),
            own_window=total if own else None,
        )
    keys = draw(st.integers(1, 40))
    queries, batch = draw(st.integers(1, keys)), draw(st.integers(1, 3))
    lengths = tuple(draw(st.integers(0, keys)) for _ in range(batch)) if draw(st.booleans()) else None
    starts = None
    if draw(st.booleans()):
        starts = tuple(draw(st.integers(0, keys if lengths is None else lengths[b])) for b in range(batch))
    shortest = keys if lengths is not None else min(keys, sizes.window_size + queries - 1)
    own_window = draw(st.integers(shortest, keys)) if draw(st.booleans()) else None
    return Shape(
        sizes,
        batch,
        queries,
        keys,
        **heads,
        **dims,
        **scorer,
        starts=starts,
        lengths=lengths,
        own_window=own_window,
        scale=scale,
    )
