"""`nsa_attention(backend="triton")`: the kernels put together, forward and backward, as PyTorch custom operators.

    compressed   runs of compressed blocks (eqs. 7, 8)                triton_interval
    selection    scores, forced blocks, top-k (eqs. 8 to 12)          triton_select
    selected     local blocks as runs of keys, the others gathered    triton_interval, triton_gather, triton_selected
                 or, for large groups, one query after another        triton_query_major
    window       runs of the last w keys                              triton_interval
    combination  the gated sum (eq. 5)                                triton_gates

Custom operators with declared shapes (`torch.compile` takes them as they are); every pass gives the same bits for the
same inputs. What the backward pass keeps: the inputs, three branch outputs, three log-sum-exps and the selection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sizes import Sizes
from .triton_common import LOG2E, largest_part
from .triton_gates import combine, gate_gradient, rows_by_head
from .triton_gather import count_slots
from .triton_interval import interval_forward
from .triton_interval_backward import Second, interval_dkv, interval_dq
from .triton_layout import Layout, find_layout
from .triton_query_major import query_major_forward, takes_query_major
from .triton_select import select
from .triton_selected import selected_backward, selected_forward

CMP, SLC, WIN = 0, 1, 2
WIDEST_HEAD = 256


class Saved(NamedTuple):
    """Outputs of the branches `[B, T, Hq, Dv]` and their log2-sum-exps `[B, T, Hq]` float32."""

    out_cmp: Tensor
    out_slc: Tensor
    out_win: Tensor
    lse_cmp: Tensor
    lse_slc: Tensor
    lse_win: Tensor


def layout_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sizes,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> Layout:
    part = largest_part(q, v.shape[-1])
    return find_layout(q.shape[0], q.shape[1], k.shape[1], sizes, cu_seqlens, starts, lengths, q.device, part)


@torch.library.custom_op("nsa_hf::forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_win: Tensor | None,
    v_win: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor | None, lengths: Tensor | None,
    sizes: list[int], scale: float,
) -> list[Tensor]:  # fmt: skip
    """Output, selection, and what `Saved` names."""
    size, scale_log2 = Sizes(*sizes), scale * LOG2E
    layout = layout_of(q, k, v, size, cu_seqlens, starts, lengths)
    near_k, near_v = (k, v) if k_win is None or v_win is None else (k_win, v_win)

    out_cmp, lse_cmp = interval_forward(q, k_cmp, v_cmp, layout.cmp_low, layout.cmp_high, scale_log2, long_runs=True)
    selection = select(q, k_cmp, lse_cmp, layout, size, k.shape[1], scale_log2)
    if takes_query_major(q, k):
        out_slc, lse_slc = query_major_forward(q, k, v, selection, layout, size, scale_log2)
    else:
        out_slc, lse_slc = interval_forward(q, k, v, *layout.local(size), scale_log2)
        slots = count_slots(size, layout, k.shape[1])
        if slots:
            selected_forward(q, k, v, selection, layout, size, slots, scale_log2, out_slc, lse_slc)
    window = layout.window(size.window_size, k.shape[1] - near_k.shape[1])
    out_win, lse_win = interval_forward(q, near_k, near_v, *window, scale_log2)
    out = combine(out_cmp, out_slc, out_win, gates, layout.relative)
    return [out, selection, out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win]


@forward_op.register_fake
def _(q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cu_seqlens, starts, lengths, sizes, scale):
    batch, tokens, heads, _ = q.shape
    outs = [q.new_empty(batch, tokens, heads, v.shape[-1]) for _ in range(4)]
    lses = [q.new_empty(batch, tokens, heads, dtype=torch.float32) for _ in range(3)]
    selection = q.new_empty(batch, tokens, k.shape[2], Sizes(*sizes).topk, dtype=torch.int32)
    return [outs[0], selection, *outs[1:], *lses]


@torch.library.custom_op("nsa_hf::backward", mutates_args=())
def backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_win: Tensor | None,
    v_win: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor | None, lengths: Tensor | None,
    selection: Tensor, saved: list[Tensor], sizes: list[int], scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v, k_cmp, v_cmp, gates and, where given, k_win, v_win."""
    size, scale_log2, branch = Sizes(*sizes), scale * LOG2E, Saved(*saved)
    layout = layout_of(q, k, v, size, cu_seqlens, starts, lengths)
    near_k, near_v = (k, v) if k_win is None or v_win is None else (k_win, v_win)
    dgates, correction = gate_gradient(branch.out_cmp, branch.out_slc, branch.out_win, dout, gates, layout.relative)
    rows = rows_by_head([branch.lse_cmp, branch.lse_slc, branch.lse_win], gates, correction)
    scales = (scale, scale_log2)
    cmp = (layout.cmp_low, layout.cmp_high, dout, rows[CMP], *scales)
    local_low, local_high = layout.local(size)
    local = (local_low, local_high, dout, rows[SLC], *scales)
    win = (*layout.window(size.window_size, k.shape[1] - near_k.shape[1]), dout, rows[WIN], *scales)
    # over the same keys, the local blocks' runs and the window's end together: both for little more than one
    both = Second(local_low, rows[SLC]) if k_win is None else None

    dq = torch.empty_like(q, dtype=torch.float32)
    interval_dq(q, k_cmp, v_cmp, *cmp, dq, add=False)
    interval_dq(q, near_k, near_v, *win, dq, add=True, second=both)
    if both is None:
        interval_dq(q, k, v, *local, dq, add=True)
    dk_cmp, dv_cmp = interval_dkv(q, k_cmp, v_cmp, *cmp, dtype=q.dtype, few_keys=True)

    slots = count_slots(size, layout, k.shape[1])
    dk_dv, summed = None, torch.empty_like(q)
    if slots:
        dk_dv = selected_backward(
            q, k, v, selection, layout, size, slots, dout, branch.lse_slc, gates, correction, scale, scale_log2, dq,
            summed,
        )  # fmt: skip
    else:
        summed.copy_(dq)
    del dq
    if k_win is not None:
        dk, dv = interval_dkv(q, k, v, *local, dtype=q.dtype, add=dk_dv)
        dk_win, dv_win = interval_dkv(q, near_k, near_v, *win, dtype=q.dtype)
        return [summed, dk, dv, dk_cmp, dv_cmp, dgates, dk_win, dv_win]
    dk_dv = interval_dkv(q, k, v, *local, dtype=torch.float32, add=dk_dv)
    dk, dv = interval_dkv(q, k, v, *win, dtype=q.dtype, add=dk_dv)
    return [summed, dk, dv, dk_cmp, dv_cmp, dgates]


@backward_op.register_fake
def _(dout, q, k, v, k_cmp, v_cmp, gates, k_win, v_win, *rest):
    inputs = [q, k, v, k_cmp, v_cmp, gates, *([] if k_win is None else [k_win, v_win])]
    return [torch.empty_like(x) for x in inputs]


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.sizes, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output[1:])


def backward(ctx, grads):
    *tensors, selection, o1, o2, o3, l1, l2, l3 = ctx.saved_tensors
    dout = grads[0].contiguous()
    found = backward_op(dout, *tensors, selection, [o1, o2, o3, l1, l2, l3], ctx.sizes, ctx.scale)
    own_window = found[6:] if len(found) > 6 else [None, None]
    return (*found[:6], *own_window, None, None, None, None, None)


forward_op.register_autograd(backward, setup_context=setup_context)


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, *, sizes: Sizes, scale: float,
    k_win: Tensor | None = None, v_win: Tensor | None = None, cu_seqlens: Tensor | None = None,
    starts: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`nsa_attention` by the Triton kernels; arguments as there, already checked. Returns output and selection.

    Raises:
        TypeError: float64, which the matrix units do not take.
        ValueError: heads wider than 256, a card older than compute capability 8.0, and the limits that `select` and
            `gather_queries` name.
    """
    if q.dtype == torch.float64:
        raise TypeError("backend='triton' takes float16, bfloat16 or float32, got float64: use backend='reference'")
    widest = max(q.shape[-1], v.shape[-1])
    if widest > WIDEST_HEAD:
        raise ValueError(
            f"backend='triton' takes heads of at most {WIDEST_HEAD} numbers, got Dk = {q.shape[-1]} and "
            f"Dv = {v.shape[-1]}: use backend='reference'"
        )
    tensors = [
        None if x is None else x.contiguous()
        for x in (q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cu_seqlens, starts, lengths)
    ]
    numbers = [
        sizes.kernel_size, sizes.kernel_stride, sizes.block_size, sizes.topk, sizes.init_blocks, sizes.local_blocks,
        sizes.window_size,
    ]  # fmt: skip
    out, selection, *_ = forward_op(*tensors, numbers, float(scale))
    return out, selection
