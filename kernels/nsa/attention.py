"""The operation: Native Sparse Attention from queries, keys, values and gates to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import check_arguments, check_scale
from .placement import Placement
from .reference import fill_up, reference_attention
from .sizes import Sizes

BACKENDS = ("auto", "triton", "reference")


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    q_index: Tensor | None = None,
    k_index: Tensor | None = None,
    k_index_scales: Tensor | None = None,
    index_scale: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention (arXiv 2502.11089, eq. 5): the gated sum of three attentions over a causal past.

        >>> q, k, v = (torch.randn(1, 256, heads, 16) for heads in (4, 2, 2))  # [B, T, H, D]
        >>> mean = MeanCompressor(kernel_size=32, head_dim=16)
        >>> k_cmp, v_cmp = (compress(x, mean, kernel_stride=16) for x in (k, v))
        >>> gates = torch.ones(1, 256, 4, 3)  # compressed, selected, window
        >>> out, blocks = nsa_attention(q, k, v, k_cmp, v_cmp, gates, topk=3, return_selection=True)
        >>> out.shape, blocks[0, -1, 0].tolist()[:1]
        (torch.Size([1, 256, 4, 16]), [0])

    Row `b`'s real tokens are the positions `[starts[b], lengths[b])`; its queries are the last T before `lengths[b]`. A
    query before `starts[b]` gives output 0, selection -1 and no gradient. What stands outside the real tokens, or
    behind a row's own entries, may be anything, NaN included, and gets zero gradient.

    Args:
        q: `[B, T, Hq, Dk]` float16, bfloat16, float32 or float64; T <= S. B and T may be 0.
        k: `[B, S, Hk, Dk]`, q's dtype; `Hq % Hk == 0`.
        v: `[B, S, Hk, Dv]`, q's dtype.
        k_cmp: `[B, N, Hk, Dk]`, the compressed keys (`compress`): block `i` of row `b` covers
            `[starts[b] + i*d, + l)`. N is `n_blocks(S, l, d)`; with `starts` or `lengths` at least the largest row's
            number; with `cu_seqlens` the documents' blocks, one document after another.
            None, with an index: there is no compressed branch, its gate is not read and gets no gradient.
        v_cmp: `[B, N, Hk, Dv]`; goes with `k_cmp`.
        gates: `[B, T, Hq, 3]` in q's dtype or float32, in the order compressed, selected, window.
        kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size: see `Sizes`.
        k_win: `[B, Sw, Hk, Dk]` the window's own keys, the last Sw positions,
            `min(S, window_size + T - 1) <= Sw <= S` (Sw = S with `lengths`); None shares `k` and `v`.
        v_win: `[B, Sw, Hk, Dv]`; goes with `k_win`.
        q_index: `[B, T, Hi, c]` in q's dtype, c at most 256: blocks are scored by an index instead of the compressed
            keys. Hi is a multiple of Hk, its heads shared out among the KV heads as q's are. Of block j, before a
            query's own, each index head says `s[g, j] = max over its tokens t of q_index[g] . k_index[t]`; the block's
            score is the `max over g of (s[g, j] - max over j' of s[g, j'])`. Forced blocks, number and ties are as
            ever. Nothing of it has a gradient.
        k_index: `[B, S, Hj, c]`, Hj = Hk, or 1: one key for all. In q's dtype, or int8 with `k_index_scales`.
        k_index_scales: `[B, S, Hj]` bfloat16, powers of two, with an int8 `k_index`: the keys are the products of both,
            as `quantize_index_keys` gives them.
        index_scale: a positive factor of the index's logits. Blocks are chosen the same whatever it is.
        scale: of the logits, positive; None = `1 / sqrt(Dk)`.
        cu_seqlens: int32 `[documents + 1]`, borders of packed documents; B = 1, T = S.
        starts: int32 `[B]`, first real position of each left-padded row; None = 0.
        lengths: int32 `[B]`, positions of each row that hold something; None = S.
        backend: `triton`, `reference`, or `auto`: Triton on CUDA tensors, the reference elsewhere. Nothing is ever
            computed by another backend than the one named here.
        return_selection: also return the selected blocks.

    Returns:
        `[B, T, Hq, Dv]` in q's dtype; with `return_selection` also the block indices `[B, T, Hk, topk]` int32, counted
        from the row's or document's start, ascending, -1 for unused places (which come last).

    Raises:
        TypeError, ValueError: an argument is wrong; says what was expected, what came and what to do.
        ImportError: Triton was asked for, or `auto` meant it, and is not installed.
    """
    sizes = Sizes(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size).check()
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    placement = Placement(starts, lengths, cu_seqlens)
    check_scale(scale)
    check_scale(index_scale, "index_scale")
    check_arguments(q, k, v, k_cmp, v_cmp, gates, sizes, k_win, v_win, q_index, k_index, k_index_scales, placement)
    inputs = (q, k, v, k_cmp, v_cmp, gates)
    options: dict[str, Any] = {
        "sizes": sizes,
        "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
        "k_win": k_win,
        "v_win": v_win,
        "q_index": q_index,
        "k_index": k_index,
        "k_index_scales": k_index_scales,
        "placement": placement,
    }
    triton = load_triton(q.device.type) if backend == "triton" or (backend == "auto" and q.is_cuda) else None
    if 0 in q.shape[:2]:
        out, selection = empty_result(*inputs, k_win, v_win)
    elif triton is not None:
        out, selection = triton(*inputs, **options)
    else:
        out, selection, _ = reference_attention(*inputs, **options)
    return (out, fill_up(selection, topk)) if return_selection else out


def empty_result(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and selection of no rows or no queries. The gradients of all inputs are zero, not absent."""
    (batch, tokens, heads, _), (kv_heads, value_dim) = q.shape, v.shape[2:]
    out = torch.cat([x[:0].flatten().to(q.dtype) for x in (q, k, v, *others) if x is not None])
    return out.view(batch, tokens, heads, value_dim), q.new_empty(batch, tokens, kv_heads, 0, dtype=torch.int32)


def load_triton(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The Triton backend, imported when it is first used: Triton is optional, and its import takes a while."""
    if not torch.compiler.is_compiling():
        check_triton(device)
    from .gpu.op import triton_attention

    return triton_attention


def check_triton(device: str) -> None:
    """Whether the kernels can run.

    Raises:
        ImportError: Triton is not installed.
        ValueError: the tensors are not on a GPU, and Triton's interpreter, which needs none, is not on.
    """
    try:
        import triton
    except ImportError as error:
        raise ImportError(
            "backend='triton', which 'auto' means on CUDA tensors, needs Triton: `pip install triton` on Linux, or say "
            "backend='reference' (a model: attn_implementation='eager'), which is correct but slow"
        ) from error
    if device != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {device}: move them, use backend='reference', or, to test the "
            "kernels without a GPU, set TRITON_INTERPRET=1 before the first use"
        )
