"""Layers with a sliding window keep their own attention: in chunks of queries, without T*S numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .errors import NsaError
from .segments import Segments

# Smaller windows are done in chunks of this many queries: fewer, larger calls.
LEAST_CHUNK = 512


def sliding_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int,
    segments: Segments,
    static: tuple[int, int] | None = None,
) -> Tensor:
    """Dense attention of every query to the last `window` tokens, its own counted, of its row or document.

    Args:
        query: `[B, Hq, T, Dk]`, the tokens after the first `segments.past`.
        key, value: `[B, Hk, S, D]`, those of the last S tokens: a cache of such a layer keeps no more than it needs.
        static: of a static cache, the tokens held before these and the position of the first key; what stands behind
            the last token is empty.

    Raises:
        NsaError: the cache has lost keys that the window needs: it was cropped deeper than it recorded.

    Returns:
        `[B, T, Hq, Dv]`. Memory beyond it: a mask of one chunk, at most (chunk + window) * chunk.
    """
    tokens, keys, past = query.shape[2], key.shape[2], segments.past
    behind = past + tokens - keys  # tokens before the first key
    if static is not None:
        if tokens == 1:
            # one graph for all steps: no position is a number on the host, no shape changes
            assert segments.lengths is not None
            position = segments.lengths[:1].long() - 1
            seen = torch.arange(keys, device=query.device) + (position + 1 - keys if static[1] else 0)
            mask = visible(position, seen, window, segments)
            return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
        past, behind = static
    if behind > max(0, past - window + 1):
        raise NsaError(
            f"this cache was cropped to {past} tokens, and of the window of {window} before them it has kept "
            f"{past - behind} only: call cache.activate_past_recording() before the tokens that may be removed, and "
            "cache.reset() to start anew"
        )
    chunk = max(window, LEAST_CHUNK)
    out = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        position = torch.arange(past + start, past + stop, device=query.device)
        # a cache that was reset may hold zeros from before (Transformers 5.17)
        low = max(past + start - window + 1, behind, 0)
        seen = torch.arange(low, past + stop, device=query.device)
        here = slice(low - behind, past + stop - behind)
        hidden = None if len(position) == 1 and segments.starts is None else visible(position, seen, window, segments)
        out.append(
            sdpa_attention_forward(
                module,
                query[:, :, start:stop],
                key[:, :, here],
                value[:, :, here],
                hidden,
                dropout=dropout,
                scaling=scaling,
            )[0]
        )
    return torch.cat(out, dim=1)


def visible(position: Tensor, seen: Tensor, window: int, segments: Segments) -> Tensor:
    """Which keys each query attends to: positions `[T]` and `[S]` to bool `[B or 1, 1, T, S]`."""
    query = position[:, None]
    mask = ((seen >= 0) & (seen <= query) & (seen > query - window))[None, None]
    if segments.starts is not None:
        # padding attends to itself, so that no row of the softmax is empty
        mask = mask & (seen >= segments.starts[:, None, None, None]) | (seen == query)
    if segments.cu_seqlens is not None:
        document, own = (torch.searchsorted(segments.cu_seqlens, x, right=True) for x in (seen, position))
        mask = mask & (document == own[:, None])
    return mask


def dense_weights(
    query: Tensor,
    key: Tensor,
    scaling: float | None,
    window: int | None,
    segments: Segments,
    static: tuple[int, int] | None = None,
) -> Tensor:
    """The weights of a layer that is dense (`window` None) or slides: T*S numbers a head, where asked for.

    Args:
        query, key, window, static: as in `sliding_attention`.

    Returns:
        `[B, Hq, T, S]` in the query's dtype, every row's sum 1.
    """
    tokens, keys = query.shape[2], key.shape[2]
    past: Tensor | int = segments.past
    behind = segments.past + tokens - keys
    if static is not None:
        past, behind = static
    elif segments.lengths is not None:
        past, behind = segments.lengths[0].long() - tokens, 0
    position = torch.arange(tokens, device=query.device) + past
    seen = torch.arange(keys, device=query.device) + behind
    mask = visible(position, seen, behind + keys if window is None else window, segments)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.unflatten(1, (key.shape[1], -1))
    logits = (groups @ key[:, :, None].transpose(-1, -2) * scale).flatten(1, 2)
    return logits.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
