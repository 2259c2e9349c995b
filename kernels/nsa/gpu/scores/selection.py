"""What both scorers begin with: the limits of the kernels, and the tensor that they fill."""

from __future__ import annotations

import torch
from torch import Tensor

from ...sizes import Sizes

MOST_CHOSEN = 256
MOST_HEADS = 128


def check_limits(group: int, keys: int, sizes: Sizes) -> None:
    """Whether the kernels take so many heads and blocks.

    Args:
        group: heads that share a KV head.
        keys: of a row.

    Raises:
        ValueError: more heads share a KV head, or more blocks are to be chosen, than the kernels take.
    """
    chosen = sizes.topk - sizes.init_blocks - sizes.local_blocks
    if sizes.topk * sizes.block_size < keys and chosen > MOST_CHOSEN:
        raise ValueError(
            f"backend='triton' chooses at most {MOST_CHOSEN} blocks by importance, got topk - init_blocks - "
            f"local_blocks = {chosen}: use larger blocks, or backend='reference'"
        )
    if group > MOST_HEADS:
        raise ValueError(
            f"backend='triton' takes at most {MOST_HEADS} query heads a KV head, got {group}: use backend='reference'"
        )


def count_blocks(keys: int, sizes: Sizes) -> int:
    """How many blocks a row of so many keys has."""
    return (keys - 1) // sizes.block_size + 1


def new_selection(queries: Tensor, kv_heads: int, keys: int, sizes: Sizes) -> tuple[Tensor, int]:
    """The selection `[B, T, Hk, topk]` int32 of queries `[B, T, H, D]`, and how many places a kernel writes of each.

    Behind the number of blocks no place is ever used: those are -1 from the start.
    """
    topk = min(sizes.topk, count_blocks(keys, sizes))
    shape = (*queries.shape[:2], kv_heads, sizes.topk)
    if topk < sizes.topk:
        return queries.new_full(shape, -1, dtype=torch.int32), topk
    return queries.new_empty(shape, dtype=torch.int32), topk
