"""Checks of the arguments of `nsa_attention`: what was expected, what came, what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from .placement import Placement
from .sizes import Sizes, n_blocks

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDEST_INDEX = 256  # channels of an index
LARGEST = torch.finfo(torch.float32).max


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    sizes: Sizes,
    k_win: Tensor | None,
    v_win: Tensor | None,
    q_index: Tensor | None,
    k_index: Tensor | None,
    k_index_scales: Tensor | None,
    placement: Placement,
) -> None:
    """Shapes and dtypes always; values of index tensors on the CPU only, and not within `torch.compile`.

    Raises:
        TypeError: something is no tensor, or a dtype is wrong.
        ValueError: a shape, a combination of arguments, or the content of `cu_seqlens`, `starts`, `lengths` is wrong.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("gates", gates)):
        check_tensor(name, x)
    check_tensors(q, k, v, gates)
    batch, tokens = q.shape[:2]
    keys = k.shape[1]
    check_placement(q, batch, tokens, keys, placement)
    check_index_tensors(q, k, q_index, k_index, k_index_scales)
    if k_cmp is None and v_cmp is None:
        if q_index is None:
            raise ValueError(
                "k_cmp and v_cmp may be None, which is no compressed branch, only where blocks are chosen by an index: "
                "give q_index and k_index, or what `compress` makes of k and v"
            )
    else:
        check_compressed(q, k, v, k_cmp, v_cmp)
        assert k_cmp is not None
        check_block_count(k_cmp.shape[1], keys, sizes, placement)
    check_window(q, k, v, k_win, v_win, sizes, placement.lengths)


def check_compressed(q: Tensor, k: Tensor, v: Tensor, k_cmp: object, v_cmp: object) -> None:
    """The compressed keys and values: like k and v, and as many of both."""
    batch, kv_heads = q.shape[0], k.shape[2]
    for name, x, dim in (("k_cmp", k_cmp, k.shape[3]), ("v_cmp", v_cmp, v.shape[3])):
        check_tensor(name, x)
        assert isinstance(x, Tensor)
        check_like(name, x, q)
        if x.dim() != 4 or x.shape[0] != batch or x.shape[2:] != (kv_heads, dim):
            raise ValueError(f"{name} must be [B, N, Hk, D] = [{batch}, N, {kv_heads}, {dim}], got {list(x.shape)}")
    assert isinstance(k_cmp, Tensor) and isinstance(v_cmp, Tensor)
    if k_cmp.shape[1] != v_cmp.shape[1]:
        raise ValueError(f"k_cmp and v_cmp must hold the same blocks, got {k_cmp.shape[1]} and {v_cmp.shape[1]}")


def check_index_tensors(
    q: Tensor, k: Tensor, q_index: Tensor | None, k_index: Tensor | None, k_index_scales: Tensor | None
) -> None:
    """The index's queries and keys: both or neither, their shapes and heads; scales with keys in 8 bits."""
    if q_index is None and k_index is None and k_index_scales is None:
        return
    if q_index is None or k_index is None:
        raise ValueError("q_index and k_index go together: give both, or neither to choose blocks by compressed keys")
    for name, x, like, letters in (("q_index", q_index, q, "[B, T, Hi, c]"), ("k_index", k_index, k, "[B, S, Hj, c]")):
        check_tensor(name, x)
        if x.dim() != 4 or x.shape[:2] != like.shape[:2] or not 1 <= x.shape[3] <= WIDEST_INDEX:
            raise ValueError(
                f"{name} must be {letters} with {list(like.shape[:2])} first and c within 1 .. {WIDEST_INDEX}, got "
                f"{list(x.shape)}"
            )
    check_like("q_index", q_index, q)
    if k_index_scales is None:
        if k_index.dtype == torch.int8:
            raise ValueError("an int8 k_index needs k_index_scales: give what quantize_index_keys makes of the keys")
        check_like("k_index", k_index, q)
    else:
        check_device("k_index", k_index, q)
        check_index_scales(k_index, k_index_scales)
    kv_heads = k.shape[2]
    if q_index.shape[3] != k_index.shape[3]:
        raise ValueError(
            f"q_index and k_index must have as many channels, got {q_index.shape[3]} and {k_index.shape[3]}"
        )
    if not q_index.shape[2] or q_index.shape[2] % kv_heads:
        raise ValueError(
            f"q_index must have a multiple of the {kv_heads} KV heads: one query a head of q, or one a KV head, got "
            f"{q_index.shape[2]} heads"
        )
    if k_index.shape[2] not in (1, kv_heads):
        raise ValueError(f"k_index must have the {kv_heads} KV heads, or one head for all, got {k_index.shape[2]}")


def check_index_scales(k_index: Tensor, scales: Tensor) -> None:
    """The scales of an index's keys in 8 bits."""
    check_tensor("k_index_scales", scales)
    if k_index.dtype != torch.int8:
        raise TypeError(f"k_index_scales goes with an int8 k_index, got {k_index.dtype}")
    if scales.dtype != torch.bfloat16:
        raise TypeError(f"k_index_scales must be bfloat16, got {scales.dtype}")
    if scales.shape != k_index.shape[:3]:
        raise ValueError(f"k_index_scales must be [B, S, Hj] = {list(k_index.shape[:3])}, got {list(scales.shape)}")
    check_device("k_index", k_index, scales)


def check_tensor(name: str, x: object) -> None:
    """A tensor, and not a sparse one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {x.layout}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> None:
    """The shapes and dtypes of q, k, v and gates, and whether they fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v), ("gates", gates)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (see the docstring), got shape {list(x.shape)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    check_like("k", k, q)
    check_like("v", v, q)
    batch, tokens, heads, key_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    if not (heads and key_dim and kv_heads and v.shape[3]):
        name, x = ("q", q) if not (heads and key_dim) else ("k", k) if not kv_heads else ("v", v)
        raise ValueError(f"{name} must have at least one head of at least one number, got {list(x.shape)}")
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


def check_like(name: str, x: Tensor, q: Tensor) -> None:
    """q's dtype and device."""
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    check_device(name, x, q)


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """The device of `like`."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the same device as the other tensors, {like.device}, got {x.device}")


def check_index(name: str, index: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """An int32 tensor of that shape, on the device of `like`."""
    check_tensor(name, index)
    if index.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {index.dtype}")
    if index.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(index.shape)}")
    check_device(name, index, like)


def readable(index: Tensor) -> bool:
    """Whether the values may be looked at: a GPU would be waited for, a graph cannot branch on them, and other kinds of
    tensors (fake ones) may have none."""
    return not torch.compiler.is_compiling() and index.device.type == "cpu" and type(index) is Tensor


def check_placement(
    like: Tensor,
    batch: int,
    tokens: int,
    keys: int,
    placement: Placement,
) -> None:
    """What says where rows and documents stand, for `tokens` queries on `keys` keys.

    Raises:
        TypeError, ValueError: as in `check_arguments`.
    """
    starts, lengths, cu_seqlens = placement.starts, placement.lengths, placement.cu_seqlens
    if cu_seqlens is not None:
        check_packed(like, batch, tokens, keys, cu_seqlens)
        if starts is not None or lengths is not None:
            raise ValueError("cu_seqlens goes with neither starts nor lengths: give one or the other")
    for name, index in (("starts", starts), ("lengths", lengths)):
        if index is not None:
            check_index(name, index, (batch,), like)
            if batch and readable(index) and (index.min() < 0 or index.max() > keys):
                raise ValueError(f"{name} must be within 0 .. S = {keys}, got {index.tolist()}")


def check_packed(like: Tensor, batch: int, tokens: int, keys: int, cu_seqlens: Tensor) -> None:
    """Borders of documents that fill the only row."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape [documents + 1], got {list(cu_seqlens.shape)}")
    check_index("cu_seqlens", cu_seqlens, cu_seqlens.shape, like)
    if batch != 1 or tokens != keys:
        raise ValueError(f"cu_seqlens goes with B = 1 and T = S, got B = {batch}, T = {tokens}, S = {keys}")
    if readable(cu_seqlens):
        borders = cu_seqlens.tolist()
        rises = all(low < high for low, high in zip(borders[:-1], borders[1:], strict=True))
        if borders[0] != 0 or borders[-1] != keys or not rises:
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {keys}, got {borders}")


def check_scale(scale: object, name: str = "scale") -> None:
    """Whether it is a scale of logits, or None for the default.

    Raises:
        TypeError: neither a number nor None.
        ValueError: not positive, or not finite in float32, in which logits are computed.
    """
    if scale is None:
        return
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"{name} must be a number, or None for 1 / sqrt(Dk), got {scale!r}")
    if not 0 < scale <= LARGEST:
        raise ValueError(f"{name} must be positive and finite, or None for 1 / sqrt(Dk), got {scale}")


def check_block_count(blocks: int, keys: int, sizes: Sizes, placement: Placement) -> None:
    """As many entries as the rows or documents have."""
    starts, lengths, cu_seqlens = placement.starts, placement.lengths, placement.cu_seqlens
    whole = n_blocks(keys, sizes.kernel_size, sizes.kernel_stride)
    if placement.is_full:
        if blocks != whole:
            raise ValueError(f"k_cmp must hold the {whole} complete blocks of {keys} tokens, got {blocks}")
    elif cu_seqlens is not None:
        if readable(cu_seqlens):
            documents = cu_seqlens.diff().tolist()
            packed = sum(n_blocks(tokens, sizes.kernel_size, sizes.kernel_stride) for tokens in documents)
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
    """The window's own keys and values: both or neither, and as many positions as its queries may see."""
    if k_win is None and v_win is None:
        return
    if k_win is None or v_win is None:
        raise ValueError("k_win and v_win go together: give both, or neither to share k and v")
    for name, x, like in (("k_win", k_win, k), ("v_win", v_win, v)):
        check_tensor(name, x)
        check_like(name, x, q)
        if x.dim() != 4 or x.shape[0] != like.shape[0] or x.shape[2:] != like.shape[2:]:
            raise ValueError(
                f"{name} must be [B, Sw, Hk, D] with the other sizes of {list(like.shape)}, got {list(x.shape)}"
            )
    if k_win.shape[1] != v_win.shape[1]:
        raise ValueError(f"k_win and v_win must have the same length, got {k_win.shape[1]} and {v_win.shape[1]}")
    keys, window_keys = k.shape[1], k_win.shape[1]
    least = keys if lengths is not None else min(keys, sizes.window_size + q.shape[1] - 1)
    if not least <= window_keys <= keys:
        rule = "S (with lengths)" if lengths is not None else "min(S, window_size + T - 1) .. S"
        raise ValueError(f"k_win and v_win must hold {rule} = {least} .. {keys} positions, got {window_keys}")
