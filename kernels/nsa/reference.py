"""The specification in PyTorch: any device, any floating dtype, autograd for the gradients, queries in chunks.

Masks instead of gathers: every branch is plain softmax attention under its own boolean mask, so that this file can be
read beside the equations. The arithmetic is float32 (float64 for float64 inputs) whatever the inputs' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from .compression import packed_block_starts
from .index_keys import dequantize_index_keys
from .placement import FULL, Placement
from .sizes import Sizes

# Logits of one branch that a chunk of queries may hold at once, by device; a chunk's memory is a few times that, in
# float32. A CPU is fastest within its caches; a GPU wants few large launches.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 25}


class ReferenceResult(NamedTuple):
    """`out [B, T, Hq, Dv]`, `selection [B, T, Hk, at most topk]` int32 (see `fill_up`), `weights [B, Hq, T, S]` or
    None."""

    out: Tensor
    selection: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class Positions:
    """Where everything stands, in positions of the row (B or 1 rows: 1 where all rows agree).

    `query [B, T]`, `query_start [B, T]`: a query's position and the first one of its row or document.
    `key_start [B, S]`: the first position of a key's row or document.
    `block_first [B, N]`: first token of each entry; `document_block [T]`: index in `k_cmp` of the first
    block of a query's document (packed only).
    """

    query: Tensor
    query_start: Tensor
    key_start: Tensor
    block_first: Tensor
    document_block: Tensor | None


def find_positions(
    tokens: int,
    keys: int,
    blocks: int,
    sizes: Sizes,
    placement: Placement,
    device: torch.device,
) -> Positions:
    """The positions of the queries, keys and entries (see `nsa_attention` for the arguments)."""
    starts, lengths, cu_seqlens = placement.starts, placement.lengths, placement.cu_seqlens
    key = torch.arange(keys, device=device)
    if cu_seqlens is not None:
        borders = cu_seqlens.long()
        start = borders[:-1].repeat_interleave(borders.diff(), output_size=keys)[None]
        block_first, _ = packed_block_starts(cu_seqlens, sizes.kernel_size, sizes.kernel_stride)
        return Positions(key[None], start, start, block_first[None], torch.searchsorted(block_first, start[0]))
    zero = torch.zeros(1, dtype=torch.long, device=device)
    start = zero if starts is None else starts.long()
    end = zero + keys if lengths is None else lengths.long()
    query = (end - tokens)[:, None] + torch.arange(tokens, device=device)
    block_first = start[:, None] + torch.arange(blocks, device=device) * sizes.kernel_stride
    return Positions(query, start[:, None].expand(-1, tokens), start[:, None].expand(-1, keys), block_first, None)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention `[B, Hk, G, T, Dv]`, in which a query that sees nothing gives zero, and no gradient.

    It is PyTorch's fused attention: `weighted(probabilities(...), v)` in less time and memory.

    Args:
        q: `[B, Hk, G, T, Dk]`, already scaled.
        k, v: `[B, Hk, S, Dk]`, `[B, Hk, S, Dv]`.
        visible: bool, broadcasts to `[B, Hk, T, S]`.
    """
    sees, hidden = seen_and_hidden(visible)
    with torch.autocast(q.device.type, enabled=False):
        bias = q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        heads = [scaled_dot_product_attention(head, k, v, attn_mask=bias, scale=1.0) for head in q.unbind(2)]
        out = torch.stack(heads, dim=2)
    return out.masked_fill(~sees.unsqueeze(2), 0)


def probabilities(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """The softmax of `attend`, `[B, Hk, G, T, S]`, zero where nothing is seen."""
    sees, hidden = seen_and_hidden(visible)
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, q.shape[2:4])
        shares = logits.masked_fill(hidden.unsqueeze(2), float("-inf")).softmax(-1)
    return shares.masked_fill(~sees.unsqueeze(2), 0)


def weighted(shares: Tensor, v: Tensor) -> Tensor:
    """The mean `[B, Hk, G, T, Dv]` of values `[B, Hk, S, Dv]` by the shares of `probabilities`."""
    with torch.autocast(v.device.type, enabled=False):
        out = (shares.flatten(2, 3) @ v).unflatten(2, shares.shape[2:4])
    return out.masked_fill(~shares.any(-1, keepdim=True), 0)


def seen_and_hidden(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries see anything, `[..., T, 1]`, and what is hidden from each.

    A query that sees nothing sees everything there, so that no softmax is empty; its result is set to zero after it.
    """
    sees = visible.any(-1, keepdim=True)
    return sees, ~(visible | ~sees)


def compressed_importance(
    p_cmp: Tensor, positions: Positions, queries: tuple[int, int], blocks: int, sizes: Sizes
) -> Tensor:
    """Importance `[B, Hk, T, blocks]` from the compressed branch's probabilities `[B, Hk, G, T, N]` (eqs. 9 and 10)."""
    score = p_cmp.sum(2)
    if positions.document_block is not None:
        local = positions.document_block[queries[0] : queries[1], None] + torch.arange(
            score.shape[-1], device=score.device
        )
        inside = local < score.shape[-1]
        local = local.clamp(max=max(score.shape[-1] - 1, 0)).expand_as(score)
        score = score.gather(-1, local).masked_fill(~inside, 0) if score.shape[-1] else score
    return block_importance(score, blocks, sizes)


def index_importance(
    q_index: Tensor, k_index: Tensor, key_block: Tensor, inside: Tensor, own: Tensor, blocks: int
) -> Tensor:
    """Importance `[B, Hk, T, blocks]` of the blocks before a query's own, from an index (see `nsa_attention`).

    Args:
        q_index: `[B, Hk, Gi, T, c]`; k_index: `[B, Hj, S, c]`.
        key_block: `[B, S]`, a key's block, counted from its row's or document's start.
        inside: bool `[B, T, S]`, the keys of a query's own row or document up to itself.
        own: `[B, T]`, a query's own block.
    """
    logits = (q_index.flatten(2, 3) @ k_index.transpose(-1, -2)).unflatten(2, q_index.shape[2:4])
    past = inside & (key_block[:, None, :] < own[..., None])
    logits = logits.masked_fill(~past[:, None, None], float("-inf"))
    largest = logits.new_full((*logits.shape[:-1], blocks), float("-inf"))
    largest.scatter_reduce_(-1, key_block[:, None, None, None, :].expand_as(logits), logits, "amax")
    return (largest - largest.amax(-1, keepdim=True)).amax(2)


def block_importance(p_cmp: Tensor, blocks: int, sizes: Sizes) -> Tensor:
    """Importance of the selection blocks from the probabilities of the compressed ones (eq. 9).

    `importance[j] = sum_i p_cmp[i] * overlap(i, j) / d`, where `overlap` counts the tokens that entry `i`
    and selection block `j` share. The terms are added in the same order for every `j`, so that ties stay ties.

    Args:
        p_cmp: `[..., N]`, block `i` of the query's own row or document at index `i`.
        blocks: how many selection blocks.

    Returns:
        `[..., blocks]`.
    """
    size, stride, ratio = sizes.kernel_size, sizes.kernel_stride, sizes.block_size // sizes.kernel_stride
    before = size // stride - 1
    # index j*ratio + m of the padded row is entry j*ratio + m - before
    after = max(0, blocks * ratio - p_cmp.shape[-1])
    padded = torch.nn.functional.pad(p_cmp, (before, after))
    importance = p_cmp.new_zeros(*p_cmp.shape[:-1], blocks)
    for m in range(before + ratio):
        offset = (m - before) * stride
        overlap = min(offset + size, sizes.block_size) - max(offset, 0)
        importance += padded[..., m::ratio][..., :blocks] * (overlap / stride)
    return importance


def select_blocks(importance: Tensor, own: Tensor, sizes: Sizes) -> Tensor:
    """The blocks each query attends to (eqs. 11 and 12): forced ones, then the most important, ties to the lower index.

    Args:
        importance: `[B, Hk, T, Ns]`, already summed over the heads of a group (eq. 10).
        own: int64 `[B, T]`, the query's own block; negative for a query outside its row.

    Returns:
        int64 `[B, Hk, T, topk]`, ascending, unused places -1 at the end.
    """
    blocks = importance.shape[-1]
    block = torch.arange(blocks, device=importance.device)
    own = own[:, None, :, None]
    causal = block <= own
    forced = causal & ((block < sizes.init_blocks) | (block > own - sizes.local_blocks))
    score = importance.masked_fill(forced, float("inf")).masked_fill(~causal, float("-inf"))
    score, picked = score.sort(dim=-1, descending=True, stable=True)
    picked = picked.masked_fill(score == float("-inf"), blocks)[..., : sizes.topk].sort(dim=-1).values
    picked = torch.nn.functional.pad(picked, (0, sizes.topk - picked.shape[-1]), value=blocks)
    return picked.masked_fill(picked == blocks, -1)


def fill_up(selection: Tensor, topk: int) -> Tensor:
    """A selection `[B, T, Hk, at most topk]` with unused places, -1, up to `topk`."""
    missing = topk - selection.shape[-1]
    return torch.nn.functional.pad(selection, (0, missing), value=-1) if missing else selection


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    *,
    sizes: Sizes,
    scale: float,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    q_index: Tensor | None = None,
    k_index: Tensor | None = None,
    k_index_scales: Tensor | None = None,
    placement: Placement = FULL,
    return_weights: bool = False,
    chunk: int | None = None,
) -> ReferenceResult:
    """`nsa_attention` as the specification has it; arguments as there, already checked.

        >>> q, k, v = (torch.randn(1, 256, heads, 16) for heads in (4, 2, 2))  # [B, T, H, D]
        >>> k_cmp, v_cmp = (compress(x, MeanCompressor(32, 16), kernel_stride=16) for x in (k, v))
        >>> gates = torch.ones(1, 256, 4, 3)  # compressed, selected, window
        >>> reference_attention(q, k, v, k_cmp, v_cmp, gates, sizes=Sizes(topk=3), scale=0.25).out.shape
        torch.Size([1, 256, 4, 16])

    Args:
        placement: `starts`, `lengths` and `cu_seqlens` as one value.
        return_weights: also the selected branch's probabilities, `[B, Hq, T, S]`: T*S numbers a head.
        chunk: queries at a time; None chooses by memory.
    """
    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    sizes = sizes.within(keys)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    blocks = 0 if k_cmp is None else k_cmp.shape[1]
    positions = find_positions(tokens, keys, blocks, sizes, placement, q.device)
    if k_index is not None and k_index_scales is not None:
        k_index = dequantize_index_keys(k_index, k_index_scales, work)
    lengths, cu_seqlens = placement.lengths, placement.cu_seqlens
    if placement.starts is not None or lengths is not None:
        q, k, v, k_cmp, v_cmp, gates, k_win, v_win, q_index, k_index = without_garbage(
            positions, sizes, lengths, q, k, v, k_cmp, v_cmp, gates, k_win, v_win, q_index, k_index
        )

    def by_head(x: Tensor) -> Tensor:
        return x.to(work).transpose(1, 2).contiguous()

    # [B, T, Hq, D] -> [B, Hk, G, T, D], the others [B, Hk, S, D]
    grouped = (by_head(q) * scale).unflatten(1, (kv_heads, heads // kv_heads))
    tensors = [None if x is None else by_head(x) for x in (k, v, k_cmp, v_cmp)]
    tensors += tensors[:2] if k_win is None or v_win is None else [by_head(k_win), by_head(v_win)]
    gate = by_head(gates).unflatten(1, (kv_heads, heads // kv_heads))
    index_queries, index_keys = None, None
    if q_index is not None and k_index is not None:
        index_queries = by_head(q_index.detach()).unflatten(1, (kv_heads, q_index.shape[2] // kv_heads))
        index_keys = by_head(k_index.detach())

    if chunk is None:
        chunk = max(16, CHUNK_LOGITS.get(q.device.type, 1 << 22) // max(1, batch * heads * keys))
    borders = None if cu_seqlens is None else cu_seqlens.tolist()
    results = []
    for first in range(0, tokens, chunk):
        last = min(first + chunk, tokens)
        # No query of the chunk sees a key outside [low, high): a row's queries end at S or before.
        low = 0 if borders is None else max(border for border in borders if border <= first)
        high = keys - tokens + last
        window_low = 0 if lengths is not None else max(low, keys - tokens + first - sizes.window_size + 1)

        one = partial(
            attend_chunk,
            positions=positions,
            sizes=sizes,
            queries=(first, last),
            seen=(low, high),
            window_low=window_low,
            keys=keys,
            return_weights=return_weights,
        )
        index = (None if index_queries is None else index_queries[..., first:last, :], index_keys)
        inputs = (grouped[..., first:last, :], gate[..., first:last, :], *tensors, *index)
        if torch.is_grad_enabled() and tokens > chunk:
            # the probabilities of one chunk at a time, in the backward pass too
            results.append(checkpoint(one, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(one(*inputs))

    out = torch.cat([result[0] for result in results], dim=3)
    selection = torch.cat([result[1] for result in results], dim=2)
    weights = torch.cat([result[2] for result in results], dim=3).flatten(1, 2) if return_weights else None
    if weights is not None:
        # made of what is returned, so that gradients of the output reach it
        out = out + gate[..., 1:2] * weighted(weights.unflatten(1, (kv_heads, -1)), by_head(v))
    return ReferenceResult(
        out.flatten(1, 2).transpose(1, 2).contiguous().to(q.dtype),
        selection.transpose(1, 2).contiguous().to(torch.int32),
        weights,
    )


def attend_chunk(
    q: Tensor,
    gate: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    k_win: Tensor,
    v_win: Tensor,
    q_index: Tensor | None,
    k_index: Tensor | None,
    *,
    positions: Positions,
    sizes: Sizes,
    queries: tuple[int, int],
    seen: tuple[int, int],
    window_low: int,
    keys: int,
    return_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three branches and their gated sum (eq. 5) for the queries `[first, last)`.

    Args:
        q: `[B, Hk, G, T, Dk]`, scaled; gate: `[B, Hk, G, T, 3]`; the others `[B, Hk, S, D]`, all keys.
        q_index: `[B, Hk, Gi, T, c]` of these queries; k_index: `[B, Hj, S, c]`.

    Returns:
        Output `[B, Hk, G, T, Dv]`, selection `[B, Hk, T, topk]`, weights `[B, Hk, G, T, S]` or None. With weights the
        output is without the selected branch, which is made of them.
    """
    position = positions.query[:, queries[0] : queries[1], None]
    start = positions.query_start[:, queries[0] : queries[1], None]
    own = (position - start).squeeze(-1) // sizes.block_size
    key = torch.arange(*seen, device=q.device)

    # compressed: block i is visible when its last token is at or before the query (eqs. 7 and 8)
    out_cmp, p_cmp = None, None
    if k_cmp is not None and v_cmp is not None:
        first = positions.block_first[:, None, :]
        visible = (first >= start) & (first + sizes.kernel_size - 1 <= position)
        p_cmp = probabilities(q, k_cmp, visible[:, None])
        out_cmp = weighted(p_cmp, v_cmp)

    # selected: blocks scored and picked, their tokens attended to
    with torch.no_grad():
        blocks = (seen[1] - seen[0] - 1) // sizes.block_size + 1
        key_block = (key - positions.key_start[:, seen[0] : seen[1]]).clamp(min=0) // sizes.block_size
        inside = (key >= start) & (key <= position)
        if q_index is not None and k_index is not None:
            importance = index_importance(q_index, k_index[:, :, seen[0] : seen[1]], key_block, inside, own, blocks)
        else:
            assert p_cmp is not None
            importance = compressed_importance(p_cmp, positions, queries, blocks, sizes)
        selection = select_blocks(importance, own, sizes)
        picked = torch.zeros(*selection.shape[:-1], blocks + 1, dtype=torch.bool, device=q.device)
        picked.scatter_(-1, selection.masked_fill(selection < 0, blocks), True)
        index = key_block[:, None, None, :].expand(q.shape[0], q.shape[1], q.shape[3], -1)
        tokens = picked.expand(q.shape[0], -1, -1, -1).gather(-1, index) & inside[:, None]
    span = slice(*seen)
    p_slc = probabilities(q, k[:, :, span], tokens) if return_weights else None

    # window: the last w tokens, the query's own counted; `k_win` holds the last Sw positions
    offset = keys - k_win.shape[2]
    window_low = max(window_low, offset)
    key = torch.arange(window_low, seen[1], device=q.device)
    inside = (key >= start) & (key <= position) & (key > position - sizes.window_size)
    near = slice(window_low - offset, seen[1] - offset)
    out = gate[..., 2:3] * attend(q, k_win[:, :, near], v_win[:, :, near], inside[:, None])
    if p_slc is None:
        out = gate[..., 1:2] * attend(q, k[:, :, span], v[:, :, span], tokens) + out
    if out_cmp is not None:
        out = gate[..., 0:1] * out_cmp + out
    weights = None if p_slc is None else torch.nn.functional.pad(p_slc, (seen[0], keys - seen[1]))
    return out, selection, weights


def without_garbage(
    positions: Positions,
    sizes: Sizes,
    lengths: Tensor | None,
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
) -> tuple[Any, ...]:
    """Zeroes what stands outside the rows' real tokens and behind their own blocks: it may be anything, NaN too.

    A mask on the logits is not enough: in the products of the backward pass, zero times NaN is NaN.
    """
    keys = k.shape[1]
    key = torch.arange(keys, device=k.device)
    end = keys if lengths is None else lengths.long()[:, None]
    empty_key = (key < positions.key_start) | (key >= end)
    empty_block = positions.block_first + sizes.kernel_size > end
    empty_query = positions.query < positions.query_start

    def clean(x: Tensor | None, empty: Tensor) -> Tensor | None:
        return None if x is None else x.masked_fill(empty[..., None, None], 0)

    if k_win is not None and v_win is not None:
        k_win, v_win = (clean(x, empty_key[:, keys - x.shape[1] :]) for x in (k_win, v_win))
    return (
        clean(q, empty_query),
        clean(k, empty_key),
        clean(v, empty_key),
        clean(k_cmp, empty_block),
        clean(v_cmp, empty_block),
        clean(gates, empty_query),
        k_win,
        v_win,
        clean(q_index, empty_query),
        clean(k_index, empty_key),
    )
