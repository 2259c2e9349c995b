"""`nsa_attention(backend="triton")`: the kernels put together, forward and backward, as PyTorch custom operators.

    compressed   runs of entries (eqs. 7, 8)                          interval
    selection    scores, forced blocks, top-k (eqs. 8 to 12)          scores
    selected     local blocks as runs of keys, the others gathered    interval, gather, selected
                 or, for large groups, one query after another        query_major
    window       runs of the last w keys; the local blocks' at once   interval
    combination  the gated sum (eq. 5)                                gates

A few queries a row without gradients, as in decoding, have kernels of their own (`decode`).

Custom operators with declared shapes (`torch.compile` takes them as they are); every pass gives the same bits for the
same inputs. What the backward pass keeps: the inputs, the selection and what `Saved` names.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..index_keys import dequantize_index_keys
from ..operators import define_operator
from ..placement import FULL, Placement
from ..recomputation import chosen_before, keep_chosen
from ..sizes import Sizes
from .common import LOG2E, largest_part, on_its_card
from .decode.op import decode_op, last_contiguous, takes_decode
from .gates import Outputs, combine, gate_gradient
from .gather import Chunks, Gather, count_slots, gather_queries
from .interval import interval_forward
from .interval_backward import find_borders, interval_dkv, interval_dq
from .launch import remembered
from .layout import Layout, count_parts, find_layout, part_shape
from .query_major import query_major_forward, takes_query_major
from .scores.compressed import CompressedInputs, select_by_compressed
from .scores.index import IndexInputs, select_by_index
from .selected import find_chunks, selected_backward, selected_forward

# Of what stands by branch; BOTH: local blocks and window, which are taken at once where they have the same keys.
CMP, SLC, WIN, BOTH = slice(0, 1), slice(1, 2), slice(2, 3), slice(1, 3)
WIDEST_HEAD = 256


class Saved(NamedTuple):
    """What the backward pass takes over from the forward pass.

    Outputs of the branches `[B, T, Hq, Dv]`, their log2-sum-exps `[B, T, Hq]` float32, the layout (`find_layout`), and
    the picks of each part (`Gather`; empty where the forward pass does without).
    """

    out_cmp: Tensor
    out_slc: Tensor
    out_win: Tensor
    lse_cmp: Tensor
    lse_slc: Tensor
    lse_win: Tensor
    queries: Tensor
    parts: Tensor
    order: Tensor
    offsets: Tensor


def cut_selection(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes, parts: int) -> Chunks | None:
    """How the queries are cut for the blocks that are not local; None: there are no such blocks."""
    per_block = part_shape(sizes.block_size, largest_part(q, v.shape[-1]))[1]
    slots = count_slots(sizes, per_block, k.shape[1])
    return find_chunks(q, v, parts, slots) if slots else None


def attend_near(
    q: Tensor, k: Tensor, v: Tensor, near_k: Tensor, near_v: Tensor, layout: Layout, sizes: Sizes, scale_log2: float
) -> tuple[Tensor, ...]:
    """The window over `near_k` and `near_v`, and the local blocks, in one pass where these lie in the window.

    Returns:
        Output `[B, T, Hq, Dv]` in q's dtype and log2-sum-exp `[B, T, Hq]` float32; those of the local blocks behind.
    """
    window = partial(interval_forward, q, near_k, near_v, *layout.window, scale_log2)
    if near_k is k and sizes.local_blocks * sizes.block_size <= sizes.window_size:
        return window(near=layout.local[0])
    return *window(), *interval_forward(q, k, v, *layout.local, scale_log2)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor, layout: Layout, sizes: Sizes, scale_log2: float,
    outs: Outputs, lse: Tensor, gates: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the selected blocks that are not local to those (eq. 12), whichever scorer chose them: to the second of the
    branches' outputs `outs`, and its `lse`.

    Returns:
        The gated sum of the branches, and the picks of each part (`order` and `offsets` of `Gather`; empty where they
        are not needed).
    """
    if takes_query_major(q, k):
        query_major_forward(q, k, v, selection, layout, sizes, scale_log2, outs[1], lse)
    elif chunks := cut_selection(q, k, v, sizes, layout.part_first.shape[-1]):
        gather = gather_queries(selection, layout, sizes, chunks)
        out = selected_forward(q, k, v, gather, layout, sizes, scale_log2, outs, lse, gates)
        return out, gather.order, gather.offsets
    return combine(outs, gates, layout.relative), selection.new_empty(0), selection.new_empty(0)


@remembered
def select_and_attend(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor | None, v_cmp: Tensor | None, gates: Tensor, k_win: Tensor | None,
    v_win: Tensor | None, q_index: Tensor | None, k_index: Tensor | None, cu_seqlens: Tensor | None,
    starts: Tensor | None, lengths: Tensor | None, numbers: list[int], scale: float, selection: Tensor | None,
) -> list[Tensor]:
    """Returns output, what `Saved` names, and the selection unless it is given."""
    sizes, scale_log2 = Sizes(*numbers), scale * LOG2E
    near_k, near_v = (k, v) if k_win is None or v_win is None else (k_win, v_win)
    placement = Placement(starts, lengths, cu_seqlens)
    queries, parts = find_layout(q, k, v, near_k.shape[1], sizes, placement)
    layout = Layout.of(queries, parts, sizes.block_size, largest_part(q, v.shape[-1]), cu_seqlens is not None)

    out_cmp = lse_cmp = None
    if k_cmp is not None and v_cmp is not None:
        out_cmp, lse_cmp = interval_forward(q, k_cmp, v_cmp, *layout.compressed, scale_log2, long_runs=True)
    made: list[Tensor] = []
    if selection is None:
        if q_index is not None and k_index is not None:
            selection = select_by_index(IndexInputs(q_index, k_index, k.shape[2]), layout, sizes)
        else:
            assert k_cmp is not None and lse_cmp is not None
            inputs = CompressedInputs(q, k_cmp, lse_cmp, k.shape[1], scale_log2)
            selection = select_by_compressed(inputs, layout, sizes)
        made.append(selection)
    out_win, lse_win, out_slc, lse_slc = attend_near(q, k, v, near_k, near_v, layout, sizes, scale_log2)
    outs = (out_cmp, out_slc, out_win)
    out, *picks = attend_selected(q, k, v, selection, layout, sizes, scale_log2, outs, lse_slc, gates)
    if out_cmp is None or lse_cmp is None:
        out_cmp, lse_cmp = gates.new_empty(0), gates.new_empty(0)
    return [out, *Saved(out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win, queries, parts, *picks), *made]


@on_its_card
def run_forward(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor | None, v_cmp: Tensor | None, gates: Tensor, k_win: Tensor | None,
    v_win: Tensor | None, q_index: Tensor | None, k_index: Tensor | None, cu_seqlens: Tensor | None,
    starts: Tensor | None, lengths: Tensor | None, numbers: list[int], scale: float,
) -> list[Tensor]:
    """`triton_attention`, `numbers` being the sizes. Returns output, selection, and what `Saved` names."""
    selection = chosen_before((*q.shape[:2], k.shape[2], Sizes(*numbers).topk))
    out, *saved = select_and_attend(
        q, k, v, k_cmp, v_cmp, gates, k_win, v_win, q_index, k_index, cu_seqlens, starts, lengths, numbers, scale,
        selection,
    )
    if selection is None:
        selection = saved.pop()
        keep_chosen(selection)
    return [out, selection, *saved]


def fake_forward(
    q, k, v, k_cmp, v_cmp, gates, k_win, v_win, q_index, k_index, cu_seqlens, starts, lengths, numbers, scale
):
    """The results of `run_forward`, whatever is in them."""
    sizes, (batch, tokens, heads, _) = Sizes(*numbers), q.shape
    outs = [q.new_empty(batch, tokens, heads, v.shape[-1]) for _ in range(4)]
    lses = [q.new_empty(batch, tokens, heads, dtype=torch.float32) for _ in range(3)]
    if k_cmp is None:
        outs[1], lses[0] = gates.new_empty(0), gates.new_empty(0)
    index = partial(q.new_empty, dtype=torch.int32)
    placement = Placement(starts, lengths, cu_seqlens)
    parts = count_parts(k.shape[1], placement, sizes.block_size, largest_part(q, v.shape[-1]))
    chunks = None if takes_query_major(q, k) else cut_selection(q, k, v, sizes, parts)
    order, offsets = (index(chunks.picks), index(chunks.lanes, parts + 1)) if chunks else (index(0), index(0))
    selection = index(batch, tokens, k.shape[2], sizes.topk)
    layout = (index(9, batch, tokens), index(2, batch, parts))
    return [outs[0], selection, *outs[1:], *lses, *layout, order, offsets]


forward_op = define_operator("forward", run_forward, fake_forward)


@on_its_card
@remembered
def run_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor | None, v_cmp: Tensor | None, gates: Tensor,
    k_win: Tensor | None, v_win: Tensor | None, packed: bool, selection: Tensor, saved: list[Tensor],
    numbers: list[int], scale: float,
) -> list[Tensor]:
    """The gradients of q, k, v, gates and, where given, k_cmp, v_cmp, and then k_win, v_win."""
    sizes, scale_log2, forward = Sizes(*numbers), scale * LOG2E, Saved(*saved)
    near_k, near_v = (k, v) if k_win is None or v_win is None else (k_win, v_win)
    layout = Layout.of(forward.queries, forward.parts, sizes.block_size, largest_part(q, v.shape[-1]), packed)
    outs, lses = ([None if k_cmp is None else x[0], *x[1:]] for x in (forward[:3], forward[3:6]))
    dgates, rows, records = gate_gradient(outs, lses, dout, gates, layout.relative)
    borders = find_borders(q, v, layout, max(x.shape[1] for x in (k, k_cmp) if x is not None))

    def branches(of: slice) -> tuple[Tensor, Tensor, Tensor, float, float]:
        return layout.runs[of], dout, rows[of], scale, scale_log2

    dq = torch.empty_like(q, dtype=torch.float32)
    compressed: list[Tensor] = []
    if k_cmp is not None and v_cmp is not None:
        interval_dq(q, k_cmp, v_cmp, *branches(CMP), dq, add=False)
        compressed += interval_dkv(q, k_cmp, v_cmp, *branches(CMP), borders[CMP], dtype=q.dtype, few_keys=True)
    if k_win is None:
        interval_dq(q, k, v, *branches(BOTH), dq, add=k_cmp is not None)
    else:
        interval_dq(q, near_k, near_v, *branches(WIN), dq, add=k_cmp is not None)
        interval_dq(q, k, v, *branches(SLC), dq, add=True)

    summed, others = torch.empty_like(q), None
    if chunks := cut_selection(q, k, v, sizes, forward.parts.shape[-1]):
        gather = Gather(forward.order, forward.offsets, chunks)
        if not forward.offsets.numel():
            gather = gather_queries(selection, layout, sizes, chunks)
        zeros = k.new_zeros(k.numel() + v.numel(), dtype=torch.float32)  # one launch for both
        others = zeros[: k.numel()].view_as(k), zeros[k.numel() :].view_as(v)
        selected_backward(q, k, v, gather, layout, sizes, dout, records, scale, scale_log2, dq, summed, *others)
    else:
        summed.copy_(dq)
    del dq
    if k_win is None:
        near = interval_dkv(q, k, v, *branches(BOTH), borders[BOTH], dtype=q.dtype, add=others)
        return [summed, *near, dgates, *compressed]
    local = interval_dkv(q, k, v, *branches(SLC), borders[SLC], dtype=q.dtype, add=others)
    window = interval_dkv(q, near_k, near_v, *branches(WIN), borders[WIN], dtype=q.dtype)
    return [summed, *local, dgates, *compressed, *window]


def fake_backward(dout, q, k, v, k_cmp, v_cmp, gates, k_win, v_win, *rest):
    """The results of `run_backward`, whatever is in them."""
    return [torch.empty_like(x) for x in (q, k, v, gates, k_cmp, v_cmp, k_win, v_win) if x is not None]


backward_op = define_operator("backward", run_backward, fake_backward)


class Attention(torch.autograd.Function):
    """The two operators as one function of the inputs.

    PyTorch can be told an operator's gradient, but with so many arguments that costs .2 ms of the host's time.
    """

    @staticmethod
    def forward(ctx, *inputs):
        """Output and selection; `inputs` are those of `forward_op`. Keeps what the backward pass needs."""
        *tensors, _, _, cu_seqlens, _, _, ctx.numbers, ctx.scale = inputs
        out, selection, *saved = forward_op(*inputs)
        ctx.packed = cu_seqlens is not None
        ctx.mark_non_differentiable(selection)
        ctx.set_materialize_grads(False)  # no zeros for it
        ctx.save_for_backward(*tensors, selection, *saved)
        return out, selection

    @staticmethod
    @once_differentiable  # a second derivative is an error, and not nothing
    def backward(ctx, dout, _):
        """The gradients of the inputs, None for those that have none."""
        if dout is None:
            return (None,) * 15
        q, k, v, k_cmp, v_cmp, gates, k_win, v_win, selection, *saved = ctx.saved_tensors  # once, or it is recomputed
        tensors = (q, k, v, k_cmp, v_cmp, gates, k_win, v_win)
        dq, dk, dv, dgates, *others = backward_op(
            dout.contiguous(), *tensors, ctx.packed, selection, saved, ctx.numbers, ctx.scale
        )
        rest = iter(others)
        dk_cmp, dv_cmp, dk_win, dv_win = (None if x is None else next(rest) for x in (k_cmp, v_cmp, k_win, v_win))
        return (dq, dk, dv, dk_cmp, dv_cmp, dgates, dk_win, dv_win, *(None,) * 7)


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor | None, v_cmp: Tensor | None, gates: Tensor, *, sizes: Sizes,
    scale: float, k_win: Tensor | None = None, v_win: Tensor | None = None, q_index: Tensor | None = None,
    k_index: Tensor | None = None, k_index_scales: Tensor | None = None, placement: Placement = FULL,
) -> tuple[Tensor, Tensor]:
    """`nsa_attention` by the Triton kernels; arguments as there, already checked. Returns the output and the selection
    `[B, T, Hk, at most topk]`.

    Raises:
        TypeError: float64, which the matrix units do not take.
        ValueError: heads wider than 256, a card older than compute capability 8.0, a kernel that does not fit on it,
            and the limits that the scorers and `gather_queries` name.
    """
    if q.dtype == torch.float64:
        raise TypeError("backend='triton' takes float16, bfloat16 or float32, got float64: use backend='reference'")
    widest = max(q.shape[-1], v.shape[-1])
    if widest > WIDEST_HEAD:
        raise ValueError(
            f"backend='triton' takes heads of at most {WIDEST_HEAD} numbers, got Dk = {q.shape[-1]} and "
            f"Dv = {v.shape[-1]}: use backend='reference'"
        )
    sizes = sizes.within(k.shape[1])
    numbers = sizes.as_list()  # the operators' schemas take neither `Sizes` nor `Placement`
    starts, lengths, cu_seqlens = placement.starts, placement.lengths, placement.cu_seqlens
    inputs = [q, k, v, k_cmp, v_cmp, gates, k_win, v_win]
    q_index, k_index = (None if x is None else x.detach() for x in (q_index, k_index))
    if takes_decode(inputs, q.shape[1], placement):
        past = map(last_contiguous, (*inputs, q_index, k_index))
        rows = map(last_contiguous, (starts, lengths))
        return decode_op(*past, k_index_scales, *rows, numbers, float(scale))
    if k_index is not None and k_index_scales is not None:
        k_index = dequantize_index_keys(k_index, k_index_scales, q.dtype)
    others = (q_index, k_index, cu_seqlens, starts, lengths)
    tensors = [None if x is None else x.contiguous() for x in (*inputs, *others)]
    return Attention.apply(*tensors, numbers, float(scale))
