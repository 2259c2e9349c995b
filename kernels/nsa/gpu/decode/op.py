"""Decoding: few queries a row over a long past, without gradients, in four launches (eqs. 5 and 7 to 12).

With both a compressed branch and an index there are five.

    compressed   splits of the compressed branch, scores of blocks     scores
    or index     the largest products with the keys of each block      index
    selection    scores of all splits and heads, top-k                 select
    selected     splits of the selected blocks and the window          selected
    combination  all splits of all branches, gated                     here

Each launch may begin while the one before it ends (see `begin_next`): nothing else is launched between them, and what
they share is held until the last one. Nothing depends on a value on the host: how much of a cache is filled is read by
the kernels, so that one CUDA graph serves every step. Keys and values are taken as they lie (any strides between
tokens, rows and heads): a cache is never copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operators import define_operator
from ...placement import Placement
from ...sizes import Sizes
from ..common import LOG2E, cdiv, in_chain, next_power_of_2, on_its_card, padded, wait_for_previous
from ..scores.selection import check_limits, count_blocks
from .index import IndexScores, index_maxima
from .scores import GROWING, CompressedScores, compressed_partials, compressed_shape, row_place
from .select import decode_select, select_shape
from .selected import most_tiles, selected_partials, selected_tiles
from .splits import split_count

# Queries a row up to which splits of the keys beat the kernels that take many queries together.
MOST_QUERIES = 16


@triton.jit
def branch_weights(lses, mine, gate):
    """What each of a branch's partial results counts, gate included; 0 for those of others and that saw nothing."""
    lses = tl.where(mine, lses, float("-inf"))
    top = tl.max(lses, 0)
    weights = tl.exp2(lses - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    return weights * (gate / tl.where(total > 0, total, 1.0))


@triton.jit(do_not_specialize=GROWING)
def decode_combine_kernel(
    partial, lse, gates, starts, lengths, out, T, S, HQ, CMP, SPLITS, D: tl.constexpr, DP: tl.constexpr,
    PP: tl.constexpr, DC: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One program: one head of one query. `out = sum over the branches of gate * average`; 0 before the row's start.

    The partial results of the compressed, the selected and the window branch stand one behind another.
    """
    row = tl.program_id(0).to(tl.int64)
    gates += row * 3
    # without a compressed branch its gate may be anything
    gate_cmp = tl.load(gates, mask=CMP > 0, other=0.0)
    gate_slc, gate_win = tl.load(gates + 1), tl.load(gates + 2)
    query = tl.program_id(0) // HQ
    _, first_query = row_place(starts, lengths, query // T, T, S)
    alive = first_query + query % T >= 0

    wait_for_previous(OVERLAP)
    index, cols = tl.arange(0, PP), tl.arange(0, DC)
    exists, place = index < CMP + 2 * SPLITS, index.to(tl.int64) * tl.num_programs(0) + row
    source = partial + place[:, None] * D + cols[None, :]
    # asked for before the weights, on which nothing of it depends
    x = tl.load(source, mask=exists[:, None] & (cols < D)[None, :], other=0.0)
    lses = tl.load(lse + place, mask=exists, other=float("-inf"))
    selected = (index >= CMP) & (index < CMP + SPLITS)
    weights = branch_weights(lses, index < CMP, gate_cmp.to(tl.float32))
    weights += branch_weights(lses, selected, gate_slc.to(tl.float32))
    weights += branch_weights(lses, index >= CMP + SPLITS, gate_win.to(tl.float32))
    seen = (lses > float("-inf")) & alive
    for first in tl.static_range(0, DP, DC):
        if first > 0:
            x = tl.load(source + first, mask=exists[:, None] & (first + cols < D)[None, :], other=0.0)
        acc = tl.sum(tl.where(seen[:, None], weights[:, None] * x, 0.0), 0)
        tl.store(out + row * D + first + cols, acc.to(out.dtype.element_ty), mask=first + cols < D)


def combine(
    partial: Tensor, lse: Tensor, gates: Tensor, placement: Placement, keys: int, cmp: int, splits: int, out: Tensor
) -> None:
    """Fills `out [B, T, Hq, Dv]` from the partial results of the compressed (`cmp`), selected and window branch."""
    _, batch, tokens, heads, dim = partial.shape
    results = next_power_of_2(cmp + 2 * splits)
    columns = max(16, min(padded(dim), 8192 // results))
    decode_combine_kernel[(batch * tokens * heads,)](
        partial, lse, gates, placement.starts, placement.lengths, out, tokens, keys, heads, cmp, splits, D=dim,
        DP=padded(dim), PP=results, DC=columns, num_warps=max(1, min(4, results * columns // 1024)),
        **in_chain(out.device),
    )


@on_its_card
def run_decode(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor | None, v_cmp: Tensor | None, gates: Tensor, k_win: Tensor | None,
    v_win: Tensor | None, q_index: Tensor | None, k_index: Tensor | None, k_index_scales: Tensor | None,
    starts: Tensor | None, lengths: Tensor | None, numbers: list[int], scale: float,
) -> tuple[Tensor, Tensor]:
    """`triton_attention` of a few queries, `numbers` being the sizes.

    The last dimension of every tensor is contiguous. Returns the output `[B, T, Hq, Dv]` and the selection
    `[B, T, Hk, topk]` int32.
    """
    sizes, scale_log2, placement = Sizes(*numbers), scale * LOG2E, Placement(starts, lengths)
    (batch, tokens, heads, _), (keys, kv_heads), dim = q.shape, k.shape[1:3], v.shape[3]
    scoring_heads = heads if q_index is None else q_index.shape[2]
    check_limits(scoring_heads // kv_heads, keys, sizes)
    q, gates = q.contiguous(), gates.contiguous()
    q_index = None if q_index is None else q_index.contiguous()  # here: nothing is launched within the chain
    blocks, chosen = count_blocks(keys, sizes), sizes.topk - sizes.init_blocks - sizes.local_blocks
    chooses = sizes.topk < blocks and chosen > 0

    near = selected_tiles(q, v, heads // kv_heads, sizes)
    head_tiles = cdiv(heads // kv_heads, near["BM"])
    most = most_tiles(sizes, near["BN"], keys, k_win is None)
    splits = split_count(batch * tokens * kv_heads * head_tiles, most, q.device)
    compressed = None if v_cmp is None else compressed_shape(q, v_cmp, blocks, sizes)
    cmp = 0 if compressed is None else compressed.splits
    partial = q.new_empty(cmp + 2 * splits, batch, tokens, heads, dim, dtype=torch.float32)
    lse = q.new_empty(cmp + 2 * splits, batch, tokens, heads, dtype=torch.float32)
    selection = q.new_empty(batch, tokens, kv_heads, sizes.topk, dtype=torch.int32)
    arrived = q.new_empty(batch, tokens, kv_heads, dtype=torch.int32)
    out = q.new_empty(batch, tokens, heads, dim)

    scores: CompressedScores | IndexScores | None = None
    if compressed is not None:
        assert k_cmp is not None and v_cmp is not None
        cut = (compressed, partial, lse, chooses and q_index is None, arrived)
        scores = compressed_partials(q, k_cmp, v_cmp, placement, keys, sizes, scale_log2, *cut)
    if chooses and q_index is not None:
        assert k_index is not None
        scores = index_maxima(q_index, k_index, k_index_scales, kv_heads, placement, sizes, arrived, cmp == 0)
    tile = scores.cells[2] if isinstance(scores, CompressedScores) else 1
    shape = select_shape(scoring_heads // kv_heads, chosen if chooses else 0, blocks, tile)
    first = cmp == 0 and scores is None
    decode_select(scores, placement, keys, sizes, shape, arrived, selection, first)
    selected_partials(
        q, k, v, k_win, v_win, selection, placement, sizes, scale_log2, near, splits, partial[cmp:], lse[cmp:]
    )
    combine(partial, lse, gates, placement, keys, cmp, splits, out)
    return out, selection


def fake_decode(q, k, v, *others):
    """The results of `run_decode`, whatever is in them."""
    sizes = Sizes(*others[-2])
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:2], k.shape[2], sizes.topk, dtype=torch.int32)


decode_op = define_operator("decode", run_decode, fake_decode)


def takes_decode(tensors: list[Tensor | None], tokens: int, placement: Placement) -> bool:
    """Whether these kernels serve a call: few queries, rows that are not packed, no gradient wanted."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return placement.cu_seqlens is None and tokens <= MOST_QUERIES and not wanted


def last_contiguous(x: Tensor | None) -> Tensor | None:
    """Itself, or a copy where the numbers of one head do not lie side by side (no cache has them so)."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
