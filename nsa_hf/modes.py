"""What one forward is run with, dense or sparse for one: worked out once, and handed to the layers as an argument.

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
    """The selections of one forward by layer, int32 `[B, T, Hk, topk]`. No dict: wrappers of modules copy those."""

    def __init__(self) -> None:
        self.selections: dict[int, Tensor] = {}


@dataclass(frozen=True)
class Mode:
    """What a forward and its recomputation are run with.

    Args:
        sizes: the config's.
        backend: of `nsa_attention`.
        gate_blend: the share of the paper's gates, with `nsa_gate="blend"`.
        weights: whether attention weights are asked for (`output_attentions`).
        dense: whether the sparse layers run dense.
        recorded: where the selections go; None while nobody records them.
    """

    sizes: Sizes
    backend: str
    gate_blend: float
    weights: bool
    dense: bool
    recorded: Recorded | None


class PerThread(threading.local):
    """What a module has for every thread by itself; a copy of the module begins anew."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class OpenContexts(PerThread):
    """The `with model.dense_attention()` and `with model.record_selection()` that a thread is inside of.

    Attributes:
        dense: an entry for each of the first.
        records: the dict of each of the others.
    """

    def __init__(self) -> None:
        # on the instance: `torch.compile` takes what is on the class for all threads', and does not look again
        self.dense: list[None] = []
        self.records: list[dict[int, Tensor]] = []

    def of_this_thread(self) -> SimpleNamespace:
        """This thread's, for another one to go on with."""
        return SimpleNamespace(dense=self.dense, records=self.records)


@contextmanager
def added(entry: Any, lists: list[list[Any]]) -> Iterator[None]:
    """Adds an entry to each list for the length of the block; such blocks may end in any order, and in any thread."""
    for one in lists:
        one.append(entry)
    try:
        yield
    finally:
        for one in lists:
            del one[next(place for place, held in enumerate(one) if held is entry)]
