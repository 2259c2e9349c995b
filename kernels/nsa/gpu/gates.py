"""The gated sum of the three branches (eq. 5) and what its backward pass needs of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, load_tile, padded, store_tile
from .launch import Kernel

# The branches' outputs `[B, T, Hq, Dv]`: compressed (None: there is no such branch), selected, window.
Outputs = tuple[Tensor | None, Tensor, Tensor]


@triton.jit
def add_gated(acc, out, gates, branch, row, alive, D: tl.constexpr, DP: tl.constexpr):
    """`acc + gate * out` of one branch at the rows `row [R]` of `[B*T*HQ]`; nothing is read where not `alive`, nor of a
    branch that there is not (None)."""
    if out is not None:
        gate = tl.load(gates + row * 3 + branch, mask=alive, other=0.0).to(tl.float32)
        acc += gate[:, None] * load_tile(out, row, D, alive, D, DP).to(tl.float32)
    return acc


@Kernel
def combine_kernel(
    out_cmp, out_slc, out_win, gates, relative, out, ROWS, HQ, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr
):
    """`out = sum over the branches of gate * out_branch`; 0 for a query before its document, whatever its gates."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    exists = row < ROWS
    alive = tl.load(relative + row // HQ, mask=exists, other=-1) >= 0
    acc = add_gated(tl.zeros([BM, DP], tl.float32), out_cmp, gates, 0, row, alive, D, DP)
    acc = add_gated(acc, out_slc, gates, 1, row, alive, D, DP)
    acc = add_gated(acc, out_win, gates, 2, row, alive, D, DP)
    store_tile(out, row, D, exists, acc, D, DP)


@Kernel
def gate_gradient_kernel(
    out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win, dout, gates, relative, dgates, rows, records, T, HQ,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, FIRST: tl.constexpr,
):
    """`correction = dout . out_branch`, which is also the gradient of the branch's gate; BM queries of one head.

    FIRST: 1 where there is no compressed branch; its gate has the gradient 0.
    """
    batch, head = tl.program_id(1) // HQ, tl.program_id(1) % HQ
    index = tl.arange(0, BM)
    t = tl.program_id(0) * BM + index
    exists = t < T
    alive = tl.load(relative + batch * T + t, mask=exists, other=-1) >= 0
    start = (batch * T + tl.program_id(0) * BM).to(tl.int64) * HQ + head
    query = start + index * HQ
    douts = load_tile(dout + start * D, index, HQ * D, alive, D, DP).to(tl.float32)
    # [3, B, HQ, 3, T]
    rows += (FIRST * tl.num_programs(1) + batch * HQ + head).to(tl.int64) * 3 * T + t
    if FIRST == 1:
        tl.store(dgates + query * 3, tl.zeros([BM], dgates.dtype.element_ty), mask=exists)
    for branch in tl.static_range(FIRST, 3):
        source = out_cmp if branch == 0 else out_slc if branch == 1 else out_win
        lse = lse_cmp if branch == 0 else lse_slc if branch == 1 else lse_win
        dots = tl.sum(douts * load_tile(source + start * D, index, HQ * D, alive, D, DP).to(tl.float32), 1)
        tl.store(dgates + query * 3 + branch, dots.to(dgates.dtype.element_ty), mask=exists)
        log_sum = tl.load(lse + query, mask=exists, other=0.0)
        gate = tl.load(gates + query * 3 + branch, mask=exists, other=0.0).to(tl.float32)
        tl.store(rows, log_sum, mask=exists)
        tl.store(rows + T, gate, mask=exists)
        tl.store(rows + 2 * T, dots, mask=exists)
        rows += tl.num_programs(1).to(tl.int64) * 3 * T
        if branch == 1:
            tl.store(records + query * 3, log_sum, mask=exists)
            tl.store(records + query * 3 + 1, gate, mask=exists)
            tl.store(records + query * 3 + 2, dots, mask=exists)


def combine(outs: Outputs, gates: Tensor, relative: Tensor) -> Tensor:
    """`[B, T, Hq, Dv]`; `relative [B, T]` is negative for queries that are not real."""
    out, rows, dim = torch.empty_like(outs[1]), outs[1].shape[:3].numel(), outs[1].shape[3]
    combine_kernel[(cdiv(rows, 32),)](
        *outs, gates, relative, out, rows, out.shape[2], D=dim, DP=padded(dim), BM=32, num_warps=4
    )
    return out


def gate_gradient(
    outs: Sequence[Tensor | None], lses: Sequence[Tensor | None], dout: Tensor, gates: Tensor, relative: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gates' gradient, and what the backward pass needs of each query and branch in two orders.

    Args:
        outs: the branches' outputs, `[B, T, Hq, Dv]`; the first may be None, a branch that there is not.
        lses: their log2-sum-exps, `[B, T, Hq]` float32.

    Returns:
        `[B, T, Hq, 3]` in the gates' dtype; log2-sum-exp, gate and `dout . out`, queries side by side,
        `[3, B, Hq, 3, T]` float32; those of the selected branch, `[B, T, Hq, 3]` float32.
    """
    batch, tokens, heads, dim = dout.shape
    first = int(outs[0] is None)
    dgates, records = torch.empty_like(gates), torch.empty_like(gates, dtype=torch.float32)
    rows = records.new_empty(3, batch, heads, 3, tokens)
    gate_gradient_kernel[(cdiv(tokens, 32), batch * heads)](
        *outs, *lses, dout, gates, relative, dgates, rows, records, tokens, heads, D=dim, DP=padded(dim), BM=32,
        FIRST=first, num_warps=4,
    )
    return dgates, rows, records
