"""Decoding: few queries a row over a long past, without gradients, in four launches (eqs. 5 and 7 to 12).

    compressed   splits of the compressed branch, scores of blocks     scores
    selection    scores of all splits and heads, top-k                 select
    selected     splits of the selected blocks and the window          selected
    combination  all splits of all branches, gated                     here

Each launch may begin while the one before it ends (see `begin_next`): nothing else is launched between them, and what
they share is held until the last one. Nothing depends on a value on the host: how much of a cache is filled is read by
the kernels, so that one CUDA graph serves every step. Keys and values are taken as they lie (any strides between
tokens, rows and heads): a cache is never copied.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...placement import Placement
from ...sizes import Sizes
from ..common import LOG2E, cdiv, following, next_power_of_2, padded, wait_for_previous
from ..scores.selection import check_limits
from .scores import GROWING, cell_shape, compressed_partials, compressed_tiles, row_place
from .select import decode_select, select_shape
from .selected import most_tiles, selected_partials, selected_tiles

# Queries a row up to which splits of the keys beat the kernels that take many queries together.
MOST_QUERIES = 16
MOST_SPLITS = 64
# Programs that a processor holds at a time, and what beginning one costs, in tiles.
RESIDENT = 1
START = 2.0


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
    gate_cmp, gate_slc, gate_win = tl.load(gates), tl.load(gates + 1), tl.load(gates + 2)
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


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card; asked once a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def split_count(programs: int, tiles: int, device: torch.device) -> int:
    """How many programs share the tiles of one: few rounds of full cards, and no more partial results than needed.

    Args:
        programs: what there is without splits.
        tiles: tiles that each of them walks over, at most.
    """
    return fewest_rounds(programs, tiles, processors(device) * RESIDENT, MOST_SPLITS, START)


@cache
def fewest_rounds(programs: int, tiles: int, at_once: int, most: int, start: float) -> int:
    """The number of splits, at most `most`, with which the last program ends first; beginning costs `start` tiles."""
    candidates = range(1, max(1, min(tiles, most)) + 1)
    return min(candidates, key=lambda n: -(-programs * n // at_once) * (-(-tiles // n) + start))


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
        **following(out.device),
    )


@torch.library.custom_op("nsa_hf::decode", mutates_args=())
def decode_op(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_win: Tensor | None,
    v_win: Tensor | None, starts: Tensor | None, lengths: Tensor | None, numbers: list[int], scale: float,
) -> tuple[Tensor, Tensor]:
    """`triton_attention` of a few queries as an operator; `numbers` are the sizes.

    The last dimension of every tensor is contiguous. Returns the output `[B, T, Hq, Dv]` and the selection
    `[B, T, Hk, topk]` int32.
    """
    sizes, scale_log2 = Sizes(*numbers), scale * LOG2E
    (batch, tokens, heads, _), (keys, kv_heads), dim = q.shape, k.shape[1:3], v.shape[3]
    check_limits(heads // kv_heads, keys, sizes)
    q, gates = q.contiguous(), gates.contiguous()
    blocks = (keys - 1) // sizes.block_size + 1
    chooses = sizes.topk < blocks and sizes.topk > sizes.init_blocks + sizes.local_blocks

    tiles = compressed_tiles(q, v, tokens * (heads // kv_heads))
    cell, cells = cell_shape(sizes, tiles["BN"])
    tile = tiles["BN"] // cell
    row_tiles = cdiv(tokens * (heads // kv_heads), tiles["BM"])
    cmp = split_count(batch * kv_heads * row_tiles, cdiv(blocks * cells, tile), q.device)
    near = selected_tiles(q, v, heads // kv_heads, sizes)
    head_tiles = cdiv(heads // kv_heads, near["BM"])
    most = most_tiles(sizes, near["BN"], keys, k_win is None)
    splits = split_count(batch * tokens * kv_heads * head_tiles, most, q.device)

    float32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    partial = torch.empty(cmp + 2 * splits, batch, tokens, heads, dim, **float32)
    lse = torch.empty(cmp + 2 * splits, batch, tokens, heads, **float32)
    chosen = sizes.topk - sizes.init_blocks - sizes.local_blocks if chooses else 0
    shape = select_shape(heads // kv_heads, chosen, blocks, tile)
    chunks = cdiv(blocks, shape["BJ"]) if chooses else 1
    places = (batch, tokens, kv_heads)
    importance = torch.empty(*places, chunks, shape["BJ"], dtype=torch.int32, device=q.device)
    selection = torch.empty(*places, sizes.topk, dtype=torch.int32, device=q.device)
    arrived = torch.empty(places, dtype=torch.int32, device=q.device)
    scores = None
    if chooses:
        all_tiles, rows = cdiv(blocks * cells, tile), tokens * (heads // kv_heads)
        # float32 for 16-bit inputs too: in float16 blocks that nearly tie change places, in 24 bits it is slower
        shapes = ((all_tiles, rows, tile), (all_tiles, rows), (all_tiles, rows))
        scores = tuple(torch.empty(batch * kv_heads, *shape, **float32) for shape in shapes)
    out = q.new_empty(batch, tokens, heads, dim)

    placement = Placement(starts, lengths)
    compressed_partials(q, k_cmp, v_cmp, placement, keys, sizes, scale_log2, tiles, cmp, partial, lse, scores, arrived)
    cell_sizes = (cell, cells, tile)
    decode_select(lse, cmp, placement, keys, sizes, cell_sizes, scores, shape, importance, arrived, selection)
    selected_partials(
        q, k, v, k_win, v_win, selection, placement, sizes, scale_log2, near, splits, partial[cmp:], lse[cmp:]
    )
    combine(partial, lse, gates, placement, keys, cmp, splits, out)
    return out, selection


@decode_op.register_fake
def _(q, k, v, k_cmp, v_cmp, gates, k_win, v_win, starts, lengths, numbers, scale):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(*q.shape[:2], k.shape[2], Sizes(*numbers).topk, dtype=torch.int32)


def takes_decode(tensors: list[Tensor | None], tokens: int, placement: Placement) -> bool:
    """Whether these kernels serve a call: few queries, rows that are not packed, no gradient wanted."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return placement.cu_seqlens is None and tokens <= MOST_QUERIES and not wanted


def last_contiguous(x: Tensor | None) -> Tensor | None:
    """Itself, or a copy where the numbers of one head do not lie side by side (no cache has them so)."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
