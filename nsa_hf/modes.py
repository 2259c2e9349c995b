"""The mode of one forward (dense or sparse, which kernels, what is recorded): its layers get it as an argument.

Gradient checkpointing keeps a layer's arguments and runs it again with them in the backward pass, maybe in another
thread. So a layer reads nothing off itself or its config that may have changed meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_hf.kernels import Sizes

from .segments import Segments


class Attended(NamedTuple):
    """What a sparse layer has attended with, without gradients.

    Attributes:
        query, key: `[B, H, T or S, D]`, after RoPE.
        compressed_key: what the compressed keys are made of; the key itself but for keys per branch.
        scale: of the logits.
        segments: which positions belong to which row or document.
    """

    query: Tensor
    key: Tensor
    compressed_key: Tensor
    scale: float
    segments: Segments


class Recorder(NamedTuple):
    """A `record_attention()`: what it makes of each layer's `Attended`, and the dict that gets it, by layer."""

    keep: Callable[[Attended], Any]
    kept: dict[int, Any]


class Recorded:
    """What is recorded of one forward, by layer.

    Not plain dicts, which wrappers of modules would copy on the way to the layers.

    Attributes:
        selections: int32 `[B, T, Hk, topk]`; None where nobody records them.
        recorders: of what was attended with.
        kept: what each of them keeps.
    """

    def __init__(self, selections: bool, recorders: Sequence[Recorder]) -> None:
        self.selections: dict[int, Tensor] | None = {} if selections else None
        self.recorders = tuple(recorders)
        self.kept: list[dict[int, Any]] = [{} for _ in recorders]

    def note_attended(self, layer: int, attended: Attended) -> None:
        """Keeps of a layer's what each recorder does, and no more: it is as large as the text."""
        with torch.no_grad():
            for recorder, kept in zip(self.recorders, self.kept, strict=True):
                kept[layer] = recorder.keep(attended)

    def end(self) -> None:
        """Hands over what is kept, and ends it, so that a recomputation in the backward pass records nothing."""
        for recorder, kept in zip(self.recorders, self.kept, strict=True):
            recorder.kept.update(kept)
        self.selections, self.recorders, self.kept = None, (), []


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
        recorded: where what is recorded goes; None while nobody records.
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
    """The `with model.dense_attention()`, `record_selection()` and `record_attention()` that a thread is inside of.

    Attributes:
        dense: an entry for each `dense_attention()` of all layers.
        dense_layers: the layers of each `dense_attention(layers)`.
        records: the dict of each `record_selection()`.
        recorders: of each `record_attention()`.
    """

    def __init__(self) -> None:
        # on the instance: `torch.compile` takes what is on the class for all threads', and does not look again
        self.dense: list[None] = []
        self.dense_layers: list[frozenset[int]] = []
        self.records: list[dict[int, Tensor]] = []
        self.recorders: list[Recorder] = []

    def of_this_thread(self) -> SimpleNamespace:
        """The lists of this thread, for another thread to use."""
        return SimpleNamespace(
            dense=self.dense, dense_layers=self.dense_layers, records=self.records, recorders=self.recorders
        )


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
