"""Attention of the layers whose family gives them a sliding window: in chunks of queries, without T*S numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nsa_hf.kernels import is_exporting

from .errors import NsaError
from .segments import Segments

# Queries of a chunk at least: with small windows, fewer and larger calls.
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
    dropped = past + tokens - keys  # tokens before the first key, which the cache has not kept
    if static is not None and tokens == 1:
        mask = static_step_mask(keys, static[1] > 0, window, segments)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
    if static is not None:
        past, dropped = static
    if dropped > max(0, past - window + 1):
        raise NsaError(
            f"this cache was cropped to {past} tokens, and of the window of {window} before them it has kept "
            f"{past - dropped} only: call cache.activate_past_recording() before the tokens that may be removed, and "
            "cache.reset() to start anew"
        )
    chunk = max(window, LEAST_CHUNK)
    out = []
    # the graph of any length has one chunk
    for start in (0,) if is_exporting() else range(0, tokens, chunk):
        stop = tokens if is_exporting() else min(start + chunk, tokens)
        position = torch.arange(past + start, past + stop, device=query.device)
        # a cache that was reset may hold zeros from before (Transformers 5.17)
        low = max(past + start - window + 1, dropped, 0)
        keys_at = torch.arange(low, past + stop, device=query.device)
        here = slice(low - dropped, past + stop - dropped)
        chunk_mask = (
            None if len(position) == 1 and segments.starts is None else visible(position, keys_at, window, segments)
        )
        out.append(
            sdpa_attention_forward(
                module,
                query[:, :, start:stop],
                key[:, :, here],
                value[:, :, here],
                chunk_mask,
                dropout=dropout,
                scaling=scaling,
            )[0]
        )
    return torch.cat(out, dim=1)


def static_step_mask(keys: int, is_full: bool, window: int, segments: Segments) -> Tensor:
    """Which keys of a static cache one new token attends to, bool `[B or 1, 1, 1, keys]`.

    One graph does for all steps: no position is a number on the host, and no shape changes.

    Args:
        keys: places of the cache.
        is_full: whether the new token has taken the place of an older one; the last key is its own then.
    """
    assert segments.lengths is not None
    position = segments.lengths[:1].long() - 1
    keys_at = torch.arange(keys, device=position.device) + (position + 1 - keys if is_full else 0)
    return visible(position, keys_at, window, segments)


def visible(position: Tensor, keys_at: Tensor, window: int, segments: Segments) -> Tensor:
    """Which keys each query attends to, bool `[B or 1, 1, T, S]`.

    Args:
        position: of the queries, `[T]`.
        keys_at: positions of the keys, `[S]`; negative ones are not there.
    """
    query = position[:, None]
    mask = ((keys_at >= 0) & (keys_at <= query) & (keys_at > query - window))[None, None]
    if segments.starts is not None:
        # padding attends to itself, so that no row of the softmax is empty
        mask = mask & (keys_at >= segments.starts[:, None, None, None]) | (keys_at == query)
    if segments.cu_seqlens is not None:
        key_document, query_document = (
            torch.searchsorted(segments.cu_seqlens, positions, right=True) for positions in (keys_at, position)
        )
        mask = mask & (key_document == query_document[:, None])
    return mask


def dense_weights(
    query: Tensor,
    key: Tensor,
    scaling: float | None,
    window: int | None,
    segments: Segments,
    static: tuple[int, int] | None = None,
) -> Tensor:
    """The attention weights of a dense layer (`window` None) or a sliding one: T*S numbers a head.

    Args:
        query, key, window, static: as in `sliding_attention`.

    Returns:
        `[B, Hq, T, S]` in the query's dtype, every row's sum 1.
    """
    tokens, keys = query.shape[2], key.shape[2]
    past: Tensor | int = segments.past
    dropped = segments.past + tokens - keys
    if static is not None:
        past, dropped = static
    elif segments.lengths is not None:
        past, dropped = segments.lengths[0].long() - tokens, 0
    position = torch.arange(tokens, device=query.device) + past
    keys_at = torch.arange(keys, device=query.device) + dropped
    mask = visible(position, keys_at, dropped + keys if window is None else window, segments)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.unflatten(1, (key.shape[1], -1))
    logits = (grouped @ key[:, :, None].transpose(-1, -2) * scale).flatten(1, 2)
    return logits.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """The output `[B, T, Hq, Dv]` of weights `[B, Hq, T, S]` and values `[B, Hk, S, Dv]`: its gradients reach both."""
    out = weights.unflatten(1, (value.shape[1], -1)) @ value[:, :, None]
    return out.flatten(1, 2).transpose(1, 2).contiguous()
