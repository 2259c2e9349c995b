"""Checks of the arguments of `nsa_attention`: what was expected, what came, what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from .compression import packed_block_starts
from .sizes import Sizes, n_blocks

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, sizes: Sizes,
    k_win: Tensor | None, v_win: Tensor | None, cu_seqlens: Tensor | None, starts: Tensor | None,
    lengths: Tensor | None,
) -> None:  # fmt: skip
    """Shapes and dtypes always; values of index tensors on the CPU only, and not within `torch.compile`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a combination of arguments, or the content of `cu_seqlens`, `starts`, `lengths` is wrong.
    """
    check_tensors(q, k, v, gates)
    batch, tokens, _, key_dim = q.shape
    keys, kv_heads, value_dim = k.shape[1], k.shape[2], v.shape[3]
    for name, x, dim in (("k_cmp", k_cmp, key_dim), ("v_cmp", v_cmp, value_dim)):
        check_dtype(name, x, q)
        if x.dim() != 4 or x.shape[0] != batch or x.shape[2:] != (kv_heads, dim):
            raise ValueError(f"{name} must be [B, N, Hk, D] = [{batch}, N, {kv_heads}, {dim}], got {list(x.shape)}")
    if k_cmp.shape[1] != v_cmp.shape[1]:
        raise ValueError(f"k_cmp and v_cmp must hold the same blocks, got {k_cmp.shape[1]} and {v_cmp.shape[1]}")
    if cu_seqlens is not None:
        check_packed(cu_seqlens, batch, tokens, keys, starts, lengths)
    for name, index in (("starts", starts), ("lengths", lengths)):
        if index is not None:
            check_index(name, index, (batch,), q)
    check_values(keys, starts, lengths)
    check_block_count(k_cmp.shape[1], keys, sizes, cu_seqlens, starts, lengths)
    check_window(q, k, v, k_win, v_win, sizes, lengths)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("gates", gates)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (see the docstring), got shape {list(x.shape)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    check_dtype("k", k, q)
    check_dtype("v", v, q)
    batch, tokens, heads, key_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if tokens < 1:
        raise ValueError("q must hold at least one token, got T = 0")
    if k.shape[0] != batch or k.shape[3] != key_dim:
        raise ValueError(f"k must be [B, S, Hk, Dk] with B = {batch} and Dk = {key_dim} as in q, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [B, S, Hk, Dv] with k's {list(k.shape[:3])}, got {list(v.shape)}")
    if heads % kv_heads:
        raise ValueError(f"the query heads must be a multiple of the KV heads, got Hq = {heads} and Hk = {kv_heads}")
    if tokens > keys:
        raise ValueError(
            f"the queries are the last T positions of the keys, so T must be at most S, got T = {tokens} and "
            f"S = {keys}: give the keys of the whole text"
        )
    if gates.shape != (batch, tokens, heads, 3):
        raise ValueError(
            f"gates must be [B, T, Hq, 3] = [{batch}, {tokens}, {heads}, 3] (compressed, selected, window), "
            f"got {list(gates.shape)}"
        )
    if gates.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"gates must be in q's dtype {q.dtype} or float32, got {gates.dtype}")
    check_device("gates", gates, q)


def check_dtype(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    check_device(name, x, q)


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def check_index(name: str, index: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {index.dtype}")
    if index.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(index.shape)}")
    check_device(name, index, q)


def readable(index: Tensor) -> bool:
    """Whether the values may be looked at: a GPU would be waited for, and a graph cannot branch on them."""
    return index.device.type == "cpu" and not torch.compiler.is_compiling()


def check_packed(
    cu_seqlens: Tensor, batch: int, tokens: int, keys: int, starts: Tensor | None, lengths: Tensor | None
) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape [documents + 1], got {list(cu_seqlens.shape)}")
    if batch != 1 or tokens != keys:
        raise ValueError(f"cu_seqlens goes with B = 1 and T = S, got B = {batch}, T = {tokens}, S = {keys}")
    if starts is not None or lengths is not None:
        raise ValueError("cu_seqlens goes with neither starts nor lengths: give one or the other")
    if readable(cu_seqlens):
        borders = cu_seqlens.tolist()
        rises = all(low < high for low, high in zip(borders[:-1], borders[1:], strict=True))
        if borders[0] != 0 or borders[-1] != keys or not rises:
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {keys}, got {borders}")


def check_values(keys: int, starts: Tensor | None, lengths: Tensor | None) -> None:
    if lengths is not None and readable(lengths) and len(lengths):
        if lengths.min() < 0 or lengths.max() > keys:
            raise ValueError(f"lengths must be within 0 .. S = {keys}, got {lengths.tolist()}")
    if starts is not None and readable(starts) and len(starts):
        if starts.min() < 0 or starts.max() > keys:
            raise ValueError(f"starts must be within 0 .. S = {keys}, got {starts.tolist()}")


def check_block_count(
    blocks: int, keys: int, sizes: Sizes, cu_seqlens: Tensor | None, starts: Tensor | None, lengths: Tensor | None
) -> None:
    whole = n_blocks(keys, sizes.kernel_size, sizes.kernel_stride)
    if cu_seqlens is None and starts is None and lengths is None:
        if blocks != whole:
            raise ValueError(f"k_cmp must hold the {whole} complete blocks of {keys} tokens, got {blocks}")
    elif cu_seqlens is not None:
        if readable(cu_seqlens):
            packed = len(packed_block_starts(cu_seqlens, sizes.kernel_size, sizes.kernel_stride)[0])
            if blocks != packed:
                raise ValueError(f"k_cmp must hold the {packed} complete blocks of all documents, got {blocks}")
    elif all(index is None or readable(index) for index in (starts, lengths)):
        real = (torch.tensor([keys]) if lengths is None else lengths.long()) - (0 if starts is None else starts.long())
        most = n_blocks(int(real.max()), sizes.kernel_size, sizes.kernel_stride) if len(real) else 0
        if blocks < most:
            raise ValueError(f"k_cmp must hold at least the {most} complete blocks of the longest row, got {blocks}")


def check_window(
    q: Tensor, k: Tensor, v: Tensor, k_win: Tensor | None, v_win: Tensor | None, sizes: Sizes, lengths: Tensor | None
) -> None:
    if k_win is None and v_win is None:
        return
    if k_win is None or v_win is None:
        raise ValueError("k_win and v_win go together: give both, or neither to share k and v")
    for name, x, like in (("k_win", k_win, k), ("v_win", v_win, v)):
        check_dtype(name, x, q)
        if x.dim() != 4 or x.shape[0] != like.shape[0] or x.shape[2:] != like.shape[2:]:
            raise ValueError(
                f"{name} must be [B, Sw, Hk, D] with the other sizes of {list(like.shape)}, got {list(x.shape)}"
            )
    if k_win.shape[1] != v_win.shape[1]:
        raise ValueError(f"k_win and v_win must have the same length, got {k_win.shape[1]} and {v_win.shape[1]}")
    keys, held = k.shape[1], k_win.shape[1]
    least = keys if lengths is not None else min(keys, sizes.window_size + q.shape[1] - 1)
    if not least <= held <= keys:
        rule = "S (with lengths)" if lengths is not None else "min(S, window_size + T - 1) .. S"
        raise ValueError(f"k_win and v_win must hold {rule} = {least} .. {keys} positions, got {held}")
