"""The gated sum of the three branches (eq. 5) and what its backward pass needs of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import load_tile, padded, store_tile


@triton.jit
def combine_kernel(
    out_cmp, out_slc, out_win, gates, relative, out, ROWS, HQ, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr
):
    """`out = sum over the branches of gate * out_branch`; 0 for a query before its document, whatever its gates."""
    index = tl.arange(0, BM)
    start = tl.program_id(0).to(tl.int64) * BM
    exists = start + index < ROWS
    alive = tl.load(relative + (start + index) // HQ, mask=exists, other=-1) >= 0
    acc = tl.zeros([BM, DP], tl.float32)
    for branch in tl.static_range(3):
        source = out_cmp if branch == 0 else out_slc if branch == 1 else out_win
        gate = tl.load(gates + (start + index) * 3 + branch, mask=alive, other=0.0).to(tl.float32)
        acc += gate[:, None] * load_tile(source + start * D, index, D, alive, D, DP).to(tl.float32)
    store_tile(out + start * D, index, D, exists, acc, D, DP)


@triton.jit
def gate_gradient_kernel(
    out_cmp, out_slc, out_win, dout, relative, dgates, correction, ROWS, HQ,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`correction = dout . out_branch`, which is also the gradient of the branch's gate."""
    index = tl.arange(0, BM)
    start = tl.program_id(0).to(tl.int64) * BM
    exists = start + index < ROWS
    alive = tl.load(relative + (start + index) // HQ, mask=exists, other=-1) >= 0
    douts = load_tile(dout + start * D, index, D, alive, D, DP).to(tl.float32)
    for branch in tl.static_range(3):
        source = out_cmp if branch == 0 else out_slc if branch == 1 else out_win
        dots = tl.sum(douts * load_tile(source + start * D, index, D, alive, D, DP).to(tl.float32), 1)
        target = (start + index) * 3 + branch
        tl.store(correction + target, dots, mask=exists)
        tl.store(dgates + target, dots.to(dgates.dtype.element_ty), mask=exists)


def combine(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor, relative: Tensor) -> Tensor:
    """`[B, T, Hq, Dv]`; `relative [B, T]` is negative for queries that are not real."""
    out, rows, dim = torch.empty_like(out_cmp), out_cmp.shape[:3].numel(), out_cmp.shape[3]
    combine_kernel[(triton.cdiv(rows, 32),)](
        out_cmp, out_slc, out_win, gates, relative, out, rows, out.shape[2], D=dim, DP=padded(dim), BM=32, num_warps=4
    )
    return out


def gate_gradient(
    out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, dout: Tensor, gates: Tensor, relative: Tensor
) -> tuple[Tensor, Tensor]:
    """The gates' gradient in their dtype, and the same numbers in float32, `[B, T, Hq, 3]`."""
    dgates, correction = torch.empty_like(gates), torch.empty_like(gates, dtype=torch.float32)
    rows, dim = out_cmp.shape[:3].numel(), out_cmp.shape[3]
    gate_gradient_kernel[(triton.cdiv(rows, 32),)](
        out_cmp, out_slc, out_win, dout, relative, dgates, correction, rows, out_cmp.shape[2], D=dim, DP=padded(dim),
        BM=32, num_warps=4,
    )  # fmt: skip
    return dgates, correction


def rows_by_head(lses: list[Tensor], gates: Tensor, correction: Tensor) -> Tensor:
    """What the backward pass needs of each query and branch, queries side by side: `[3, B, Hq, 3, T]` float32.

    Args:
        lses: log2-sum-exps of the three branches, `[B, T, Hq]`.
        gates, correction: `[B, T, Hq, 3]`, as `gate_gradient` takes and gives them.
    """
    batch, tokens, heads = lses[0].shape
    rows = lses[0].new_empty(3, batch, heads, 3, tokens)
    for branch, lse in enumerate(lses):
        rows[branch, :, :, 0].copy_(lse.transpose(1, 2))
    rows[:, :, :, 1].copy_(gates.permute(3, 0, 2, 1))
    rows[:, :, :, 2].copy_(correction.permute(3, 0, 2, 1))
    return rows
