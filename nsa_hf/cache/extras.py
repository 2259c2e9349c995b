"""What the cache of a sparse layer holds beside keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from ..index import Index

# The tensors of a cache layer: compressed entries `[B, N, Hk, D]`, the index's keys and scales (see `IndexKeys`).
COMPRESSED = ("compressed_keys", "compressed_values")
INDEX = ("index_keys", "index_scales")


@dataclass(frozen=True)
class Extras:
    """What the cache of a sparse layer holds beside keys and values.

    Attributes:
        entry_sizes: kernel_size and kernel_stride of the entries [l, d]; None without a compressed branch.
        index: the layer's; None where blocks are scored by the entries.
        independent: whether the branches have keys and values of their own.
    """

    entry_sizes: tuple[int, int] | None = None
    index: Index | None = None
    independent: bool = False
