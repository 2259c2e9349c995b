"""Gradient checkpointing that chooses blocks once.

A layer that is computed again in the backward pass takes what it chose the first time: 4 * Hk * topk bytes a token, for
8 key heads at 64k 32 MiB a layer, where scoring blocks again takes a quarter of attention's time in such a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Run(threading.local):
    """The run of a checkpointed function that a thread is in.

    Attributes:
        kept: the selections of the function's earlier runs, in the order in which it makes them; None outside of one.
        next: which of them comes next.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor] | None = None
        self.next = 0


current = Run()


def choosing_once(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing function, as `torch.utils.checkpoint.checkpoint`, whose functions choose blocks once.

        >>> choosing_once(torch.utils.checkpoint.checkpoint)(torch.exp, torch.zeros(1), use_reentrant=False)
        tensor([1.])

    What the Triton kernels choose is kept, on the GPU, until the backward pass has been through the function; with
    `use_reentrant=True` as long as there is a loss to go back from. A function within another one that is computed
    again too chooses once each time. Within `torch.compile` it is the checkpointing function itself: there the compiler
    decides what is computed again.
    """
    return partial(checkpoint_once, checkpoint)


def checkpoint_once(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`checkpoint(function, *args, **kwargs)`, as `choosing_once` says."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, **kwargs)
    kept: list[Tensor] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        with run_with(kept):
            return function(*args, **kwargs)

    return checkpoint(run, *args, **kwargs)


@contextmanager
def run_with(kept: list[Tensor]) -> Iterator[None]:
    """Within it blocks are chosen as `kept` says, and what goes beyond that is added to it."""
    outer = current.kept, current.next
    current.kept, current.next = kept, 0
    try:
        yield
    finally:
        current.kept, current.next = outer


def chosen_before(shape: tuple[int, ...]) -> Tensor | None:
    """The next selection of the earlier runs, None where there is none. For operators, as is `keep_chosen`: compiled
    code around them must not see that their numbers come from elsewhere the second time.

    Raises:
        RuntimeError: it has another shape.
    """
    if current.kept is None or current.next >= len(current.kept) or in_graph(selection := current.kept[current.next]):
        return None
    current.next += 1
    if selection.shape != shape:
        raise RuntimeError(
            f"a layer that is computed again has a selection of shape {list(shape)}, and had one of "
            f"{list(selection.shape)} in its first run: it must do the same in both"
        )
    return selection.clone()


def keep_chosen(selection: Tensor) -> None:
    """Keeps a selection for the next runs. A copy: compiled code writes into what operators return, once it is used.

    Of a CUDA graph nothing is kept or taken: it would have this run's numbers in each.
    """
    if current.kept is not None and not in_graph(selection):
        current.kept.append(selection.clone())
        current.next = len(current.kept)


def in_graph(x: Tensor) -> bool:
    """Whether what is done with a tensor now is captured as a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
