"""The operation as the specification tells it, one number at a time: what `nsa_attention` is tested against.

Plain loops in float64: one document (or row of the batch) after another, one query, one head. Slow and short on
purpose. Overlaps are found by counting tokens, importances by adding one product at a time. It shares nothing with
`kernels/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Document:
    """A run of tokens that see only each other: a packed document, or what row `row` of the batch really holds."""

    row: int  # of the batch
    first: int  # index in k and v of its first token
    tokens: int  # how many it has
    first_block: int  # index in k_cmp of its first compressed block
    blocks: int  # how many compressed blocks it has


@dataclass(frozen=True)
class Answer:
    """What the oracle says: all float64, selection int32."""

    output: torch.Tensor  # [B, T, Hq, Dv]
    selection: torch.Tensor  # [B, T, Hk, topk], ascending, -1 = unused (after the used ones)
    importance: dict[tuple[int, int, int], list[float]]  # (row, query, KV head) -> one per causal selection block


def count_blocks(tokens: int, kernel_size: int, kernel_stride: int) -> int:
    """How many complete compression blocks fit into so many tokens."""
    return sum(1 for start in range(0, tokens, kernel_stride) if start + kernel_size <= tokens)


def documents(
    batch: int,
    keys: int,
    kernel_size: int,
    kernel_stride: int,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> list[Document]:
    """Who sees whom, and where each one's compressed blocks stand."""
    found: list[Document] = []
    if cu_seqlens is not None:
        first_block = 0
        for first, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
            blocks = count_blocks(end - first, kernel_size, kernel_stride)
            found.append(Document(0, first, end - first, first_block, blocks))
            first_block += blocks
        return found
    for row in range(batch):
        first = starts[row] if starts is not None else 0
        end = lengths[row] if lengths is not None else keys
        found.append(Document(row, first, end - first, 0, count_blocks(end - first, kernel_size, kernel_stride)))
    return found


@cache
def overlap(i: int, j: int, kernel_size: int, kernel_stride: int, block_size: int) -> int:
    """How many tokens the compression block i and the selection block j have in common."""
    compressed = range(i * kernel_stride, i * kernel_stride + kernel_size)
    selected = range(j * block_size, (j + 1) * block_size)
    return sum(1 for token in compressed if token in selected)


def importances(
    probabilities: Sequence[Any], causal_blocks: int, kernel_size: int, kernel_stride: int, block_size: int
) -> list[Any]:
    """Equation 9: what each selection block gets from the visible compressed ones; floats, or exact fractions."""
    return [
        sum(
            p * overlap(i, j, kernel_size, kernel_stride, block_size) / kernel_stride
            for i, p in enumerate(probabilities)
        )
        for j in range(causal_blocks)
    ]


def forced_blocks(causal_blocks: int, init_blocks: int, local_blocks: int) -> set[int]:
    """The first blocks, the query's own and those just before it; its own is the last causal one."""
    own = causal_blocks - 1
    return {j for j in range(causal_blocks) if j < init_blocks or own - j < local_blocks}


def pick(importance: Sequence[Any], topk: int, init_blocks: int, local_blocks: int) -> list[int]:
    """Equations 11 and 12: the forced blocks, then the most important, of equals the first; ascending."""
    chosen = forced_blocks(len(importance), init_blocks, local_blocks)
    while len(chosen) < min(topk, len(importance)):
        rest = [j for j in range(len(importance)) if j not in chosen]
        best = rest[0]
        for j in rest:
            if importance[j] > importance[best]:
                best = j
        chosen.add(best)
    return sorted(chosen)


def attend(
    query: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], scale: float
) -> tuple[Any, list[float]]:
    """Softmax attention of one query: its output (zero when there is no key) and the probabilities."""
    if not keys:
        return 0.0, []
    logits = [scale * float(np.dot(query, key)) for key in keys]
    weights = [float(np.exp(logit - max(logits))) for logit in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    return sum(p * value for p, value in zip(probabilities, values, strict=True)), probabilities


def index_importances(
    queries: list[np.ndarray], keys: list[np.ndarray], causal_blocks: int, block_size: int
) -> list[float]:
    """What an index says of each block: a head's largest product in it, less its largest in any; the largest head's.

    Args:
        queries: of the index heads of one KV head; keys: of all tokens before the query's own block, which is left 0.
    """
    of_heads = []
    for query in queries:
        products = [float(np.dot(query, key)) for key in keys]
        blocks = [max(products[j * block_size : (j + 1) * block_size]) for j in range(causal_blocks - 1)]
        of_heads.append([block - max(blocks) for block in blocks])
    return [max(scores) for scores in zip(*of_heads, strict=True)] + [0.0]


def nsa_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cmp: torch.Tensor | None,
    v_cmp: torch.Tensor | None,
    gates: torch.Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int = 512,
    k_win: torch.Tensor | None = None,
    v_win: torch.Tensor | None = None,
    q_index: torch.Tensor | None = None,
    k_index: torch.Tensor | None = None,
    k_index_scales: torch.Tensor | None = None,
    index_scale: float | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    selection: torch.Tensor | None = None,
) -> Answer:
    """The arguments of `nsa_attention` and their meaning. A given `selection` is used in place of the oracle's own pick
    (to judge the output of a less exact computation, which may rightly pick otherwise among near-equals)."""
    batch, queries, q_heads, key_dim = q.shape
    _, keys, kv_heads, value_dim = v.shape
    group = q_heads // kv_heads
    scale = key_dim**-0.5 if scale is None else scale
    Q, K, V, G = (x.detach().double().numpy() for x in (q, k, v, gates))
    KC, VC = (None if x is None else x.detach().double().numpy() for x in (k_cmp, v_cmp))
    QI, KI = (None if x is None else x.detach().double().numpy() for x in (q_index, k_index))
    if k_index_scales is not None:
        KI = KI * k_index_scales.double().numpy()[..., None]
    KW, VW = (x.detach().double().numpy() for x in (k if k_win is None else k_win, v if v_win is None else v_win))
    missing_in_window = keys - KW.shape[1]  # the window's tensors hold the last positions only

    output = np.zeros((batch, queries, q_heads, value_dim))
    picked = np.full((batch, queries, kv_heads, topk), -1, dtype=np.int32)
    importance_of: dict[tuple[int, int, int], list[float]] = {}
    row_bounds = [None if x is None else x.tolist() for x in (starts, lengths, cu_seqlens)]
    for document in documents(batch, keys, kernel_size, kernel_stride, *row_bounds):
        b = document.row
        row_end = keys if lengths is None else int(lengths[b])
        for p in range(document.tokens):
            t = document.first + p - (row_end - queries)
            if t < 0:
                continue  # a token of the past, whose query is not asked
            visible = [i for i in range(document.blocks) if i * kernel_stride + kernel_size - 1 <= p]
            slots = [document.first_block + i for i in visible]
            window = [document.first + x - missing_in_window for x in range(max(0, p - window_size + 1), p + 1)]
            for h in range(kv_heads):
                heads = range(h * group, (h + 1) * group)
                # compression, whose probabilities the group adds up
                causal_blocks = p // block_size + 1
                importance = [0.0] * causal_blocks
                for g in heads if KC is not None else ():
                    compressed, probabilities = attend(
                        Q[b, t, g], [KC[b, s, h] for s in slots], [VC[b, s, h] for s in slots], scale
                    )
                    output[b, t, g] += G[b, t, g, 0] * compressed
                    of_head = importances(probabilities, causal_blocks, kernel_size, kernel_stride, block_size)
                    importance = [x + y for x, y in zip(importance, of_head, strict=True)]
                if QI is not None:
                    per_head, key_head = QI.shape[2] // kv_heads, h if KI.shape[2] > 1 else 0
                    asking = [QI[b, t, h * per_head + i] for i in range(per_head)]
                    past = [KI[b, document.first + x, key_head] for x in range((causal_blocks - 1) * block_size)]
                    importance = index_importances(asking, past, causal_blocks, block_size)
                importance_of[b, t, h] = importance
                # selection
                if selection is None:
                    blocks = pick(importance, topk, init_blocks, local_blocks)
                else:
                    blocks = [j for j in selection[b, t, h].tolist() if j >= 0]
                picked[b, t, h, : len(blocks)] = blocks
                chosen = [document.first + x for x in range(p + 1) if x // block_size in blocks]
                for g in heads:
                    selected, _ = attend(Q[b, t, g], [K[b, s, h] for s in chosen], [V[b, s, h] for s in chosen], scale)
                    near, _ = attend(Q[b, t, g], [KW[b, s, h] for s in window], [VW[b, s, h] for s in window], scale)
                    output[b, t, g] += G[b, t, g, 1] * selected + G[b, t, g, 2] * near
    return Answer(torch.from_numpy(output), torch.from_numpy(picked), importance_of)


def compress_oracle(
    x: torch.Tensor,
    phi: Callable[[torch.Tensor], torch.Tensor],
    kernel_size: int,
    kernel_stride: int,
    *,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> dict[tuple[int, int, int], torch.Tensor]:
    """x [B, S, H, D] -> {(row, slot, head): phi of the block's tokens [kernel_size, D]} for every block that exists."""
    batch, keys, heads, _ = x.shape
    found: dict[tuple[int, int, int], torch.Tensor] = {}
    row_bounds = [None if y is None else y.tolist() for y in (starts, lengths, cu_seqlens)]
    for document in documents(batch, keys, kernel_size, kernel_stride, *row_bounds):
        for i in range(document.blocks):
            first = document.first + i * kernel_stride
            for h in range(heads):
                block = x[document.row, first : first + kernel_size, h]
                found[document.row, document.first_block + i, h] = phi(block)
    return found


def mean(block: torch.Tensor) -> torch.Tensor:
    """The average of a block's tokens, [kernel_size, D] -> [D]."""
    return sum(block[1:], start=block[0]) / len(block)
