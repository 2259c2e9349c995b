"""The mode of one forward (dense or sparse, which kernels, what is recorded): its layers get it as an argument.

Gradient checkpointing keeps a layer's arguments and runs it again with them in the backward pass, maybe in another
thread. So a layer reads nothing off itself or its config that may have changed meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from nsa_hf.kernels import Sizes


class Recorded:
    """The selections of one forward by layer, int32 `[B, T, Hk, topk]`.

    Not a plain dict, which wrappers of modules would copy on the way to the layers.
    """

    def __init__(self) -> None:
        self.selections: dict[int, Tensor] = {}


@dataclass(frozen=True)
class Mode:
    """What a forward and its recomputation run with.

    Attributes:
        sizes: the config's.
        backend: of `nsa_attention`.
        gate_blend: the share of the paper's gates, with `nsa_gate="blend"`.
        weights: whether attention weights are asked for (`output_attentions`).
        dense: whether the sparse layers run dense.
        dense_layers: collections of layers that run dense even if the others do not.
        recorded: where the selections go; None while nobody records them.
    """

    sizes: Sizes
    backend: str
    gate_blend: float
    weights: bool
    dense: bool
    dense_layers: tuple[frozenset[int], ...]
    recorded: Recorded | None

    def runs_dense(self, layer: int) -> bool:
        """Whether a sparse layer runs dense."""
        if not self.dense_layers:  # no number is looked at: compiled layers, all of them alike, are one
            return self.dense
        return self.dense or any(layer in layers for layers in self.dense_layers)


class PerThread(threading.local):
    """Base of what a module keeps for each thread apart. A copy of the module, pickled or not, starts empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class OpenContexts(PerThread):
    """The `with model.dense_attention()` and `with model.record_selection()` that a thread is inside of.

    Attributes:
        dense: an entry for each `dense_attention()` of all layers.
        dense_layers: the layers of each `dense_attention(layers)`.
        records: the dict of each `record_selection()`.
    """

    def __init__(self) -> None:
        # on the instance: `torch.compile` takes what is on the class for all threads', and does not look again
        self.dense: list[None] = []
        self.dense_layers: list[frozenset[int]] = []
        self.records: list[dict[int, Tensor]] = []

    def of_this_thread(self) -> SimpleNamespace:
        """The lists of this thread, for another thread to use."""
        return SimpleNamespace(dense=self.dense, dense_layers=self.dense_layers, records=self.records)


@contextmanager
def appended(entry: Any, lists: list[list[Any]]) -> Iterator[None]:
    """Appends an entry to each list, and removes it when the block ends. Blocks may end in any order and any thread."""
    for entries in lists:
        entries.append(entry)
    try:
        yield
    finally:
        for entries in lists:
            del entries[next(place for place, other in enumerate(entries) if other is entry)]
