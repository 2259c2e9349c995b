"""The operation as one node of an exported graph: `torch.export` looks at its shapes only, so a length may vary.

A program that was exported runs where `nsa_hf` is imported, which defines the node; the backend is chosen there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operators import operator_name


@torch.library.custom_op(operator_name("attention"), mutates_args=())
def exported_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    k_win: Tensor | None,
    v_win: Tensor | None,
    q_index: Tensor | None,
    k_index: Tensor | None,
    k_index_scales: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    sizes: list[int],
    scale: float,
    backend: str,
) -> Tensor:
    """`nsa_attention` without gradients and packing; `sizes` in the order of `Sizes`, the others as there."""
    from .attention import nsa_attention
    from .sizes import Sizes

    named: dict[str, Any] = Sizes(*sizes).by_name()
    out = nsa_attention(
        q,
        k,
        v,
        k_cmp,
        v_cmp,
        gates,
        **named,
        k_win=k_win,
        v_win=v_win,
        q_index=q_index,
        k_index=k_index,
        k_index_scales=k_index_scales,
        starts=starts,
        lengths=lengths,
        scale=scale,
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return out


@exported_attention.register_fake
def shape_of_output(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    """An empty output `[B, T, Hq, Dv]`."""
    return q.new_empty(*q.shape[:3], v.shape[3])
