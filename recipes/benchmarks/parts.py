"""The stages of the operation, each callable by itself, and the inputs of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_hf.kernels import MeanCompressor, Placement, Sizes, compress

from .common import INDEX_CHANNELS, Heads

SIZES = Sizes()
Parts = dict[str, Callable[[], object]]


class Inputs(NamedTuple):
    """Arguments of `nsa_attention`, bf16, and a gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor
    dout: Tensor


def make_inputs(heads: Heads, tokens: int, kind: str, device: str = "cuda", seed: int = 0) -> Inputs:
    """Random inputs of one row, the same in every call.

    Args:
        kind: "random": normal numbers. "realistic": queries that change slowly from token to token, so that neighbours
            choose much the same blocks.
    """
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).bfloat16()

    q = normal(1, tokens, heads.query_heads, heads.key_dim)
    if kind == "realistic":
        knots = normal(1, tokens // 64 + 2, heads.query_heads, heads.key_dim)
        place = torch.arange(tokens, device=device) / 64
        left = place.long()
        share = (place - left)[:, None, None].bfloat16()
        q = (1 - share) * knots[:, left] + share * knots[:, left + 1] + 0.2 * q
    k = normal(1, tokens, heads.kv_heads, heads.key_dim)
    v = normal(1, tokens, heads.kv_heads, heads.value_dim)
    mean_k = MeanCompressor(SIZES.kernel_size, heads.key_dim)
    mean_v = MeanCompressor(SIZES.kernel_size, heads.value_dim)
    gates = torch.rand(1, tokens, heads.query_heads, 3, generator=random, device=device).bfloat16()
    return Inputs(
        q,
        k,
        v,
        compress(k, mean_k, SIZES.kernel_stride).contiguous(),
        compress(v, mean_v, SIZES.kernel_stride).contiguous(),
        gates,
        normal(1, tokens, heads.query_heads, heads.value_dim),
    )


class Stages:
    """The two passes of the operation taken apart. The kernels are imported in here, since that needs Triton."""

    def __init__(self, x: Inputs) -> None:
        from nsa_hf.kernels.gpu.common import largest_part
        from nsa_hf.kernels.gpu.layout import Layout, find_layout
        from nsa_hf.kernels.gpu.op import Saved, cut_selection, forward_op

        self.x, self.scale = x, x.q.shape[-1] ** -0.5
        numbers = SIZES.as_list()
        _, self.selection, *saved = forward_op(*x[:6], *(None,) * 7, numbers, self.scale)
        self.saved = Saved(*saved)
        self.find_layout = lambda: find_layout(x.q, x.k, x.v, x.k.shape[1], SIZES, Placement())
        largest = largest_part(x.q, x.v.shape[-1])
        self.layout = Layout.of(self.saved.queries, self.saved.parts, SIZES.block_size, largest, False)
        self.chunks = cut_selection(x.q, x.k, x.v, SIZES, self.saved.parts.shape[-1])

    def forward(self) -> Parts:
        """The stages of the forward pass by name."""
        from nsa_hf.kernels.gpu.common import LOG2E
        from nsa_hf.kernels.gpu.interval import interval_forward
        from nsa_hf.kernels.gpu.op import attend_near, attend_selected
        from nsa_hf.kernels.gpu.scores.compressed import CompressedInputs, select_by_compressed

        x, saved, layout, scale = self.x, self.saved, self.layout, self.scale * LOG2E
        means = [(tensor, MeanCompressor(SIZES.kernel_size, tensor.shape[-1])) for tensor in (x.k, x.v)]
        cmp = (x.q, x.k_cmp, x.v_cmp, *layout.compressed, scale)
        scored = CompressedInputs(x.q, x.k_cmp, saved.lse_cmp, x.k.shape[1], scale)

        near = (x.q, x.k, x.v, x.k, x.v, layout, SIZES, scale)
        _, _, *local = attend_near(*near)
        out_slc, lse_slc = local
        outs = (saved.out_cmp, out_slc, saved.out_win)
        selected = (x.q, x.k, x.v, self.selection, layout, SIZES, scale, outs, lse_slc, x.gates)
        return {
            "compression": lambda: [compress(tensor, mean, SIZES.kernel_stride) for tensor, mean in means],
            "layout": self.find_layout,
            "attention": lambda: interval_forward(*cmp, long_runs=True),
            "scores + top-k": lambda: select_by_compressed(scored, layout, SIZES),
            "window and local blocks": lambda: attend_near(*near),
            "other selected blocks, combination": lambda: attend_selected(*selected),
        }

    def index(self) -> Parts:
        """What an index has in the place of the compressed branch and its scores."""
        from nsa_hf.kernels.gpu.scores.index import IndexInputs, select_by_index

        q_index, k_index = (x[..., :INDEX_CHANNELS].contiguous() for x in (self.x.q, self.x.k))
        scored = IndexInputs(q_index, k_index, self.x.k.shape[2])
        return {"index scores + top-k": lambda: select_by_index(scored, self.layout, SIZES)}

    def backward(self) -> Parts:
        """The stages of the backward pass by name."""
        from nsa_hf.kernels.gpu.common import LOG2E
        from nsa_hf.kernels.gpu.gates import gate_gradient
        from nsa_hf.kernels.gpu.gather import gather_queries
        from nsa_hf.kernels.gpu.interval_backward import find_borders, interval_dkv, interval_dq
        from nsa_hf.kernels.gpu.op import BOTH, CMP
        from nsa_hf.kernels.gpu.selected import selected_backward

        x, saved, layout, chunks = self.x, self.saved, self.layout, self.chunks
        scales = (self.scale, self.scale * LOG2E)
        outs = (saved[:3], saved[3:6], x.dout, x.gates, layout.relative)
        _, rows, records = gate_gradient(*outs)
        cmp = (x.q, x.k_cmp, x.v_cmp, layout.runs[CMP], x.dout, rows[CMP], *scales)
        near = (x.q, x.k, x.v, layout.runs[BOTH], x.dout, rows[BOTH], *scales)
        dq, dk, dv = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in x[:3])
        dq_out = torch.empty_like(x.q)
        bf16 = torch.bfloat16
        borders = find_borders(x.q, x.v, layout, x.k.shape[1])
        parts: Parts = {
            "backward, gates": lambda: gate_gradient(*outs),
            "backward, compressed dq": lambda: interval_dq(*cmp, dq, add=False),
            "backward, compressed dk dv": lambda: interval_dkv(*cmp, borders[CMP], dtype=bf16, few_keys=True),
            "backward, window and local blocks dq": lambda: interval_dq(*near, dq, add=True),
            "backward, window and local blocks dk dv": lambda: interval_dkv(
                *near, borders[BOTH], dtype=bf16, add=(dk, dv)
            ),
        }
        if chunks:
            gather = gather_queries(self.selection, layout, SIZES, chunks)
            parts["backward, selection"] = lambda: selected_backward(
                x.q, x.k, x.v, gather, layout, SIZES, x.dout, records, *scales, dq, dq_out, dk, dv
            )
        return parts
