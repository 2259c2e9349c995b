"""The batches of a stage: windows of one length each, out of one source or a mixture.

    batches = Batches(streams, lengths=[(2048, 1.0), (8192, 3.0)], batch_size=4, seed=0)
    batch = next(batches)                   # {"input_ids": [16, 2048]}; with packed texts [1, 32768] and "position_ids"
    batches.state                           # where it stands behind that batch; Batches(..., state=state) goes on there

Every process makes the batches of all, and keeps its own, so that they read the same text whatever its length. The next
batches are made while one is trained on.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_hf.conversion.compare.tokens import check_token_ids

from .windows import Window, WindowStream

AHEAD = 4  # batches that are made before they are asked for
Batch = dict[str, Tensor]


class Weighted(NamedTuple):
    """A stream of windows, and the share of the windows that come from it, in relation to the others'."""

    stream: WindowStream
    weight: float


class Batches(Iterator[Batch]):
    """The batches of one process; without end.

    Attributes:
        state: where the text stands behind the last batch, the same in every process, as JSON can hold it.
        waited: seconds for which the next batch was not made yet when it was asked for, all together.
    """

    def __init__(
        self,
        sources: Sequence[Weighted],
        *,
        lengths: Sequence[tuple[int, float]],
        batch_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        vocabulary: int | None = None,
        state: dict[str, Any] | None = None,
    ):
        """Begins to make batches.

        Args:
            sources: where windows come from.
            lengths: of windows, each with the share of the tokens that are read in such windows.
            batch_size: windows of the longest length in a batch; of a shorter one as many as have as many tokens.
            seed: of what is drawn: source and length.
            process, processes: which one this is, of how many.
            vocabulary: tokens that the model has embeddings for; None is not checked.
            state: where to go on; None begins.
        """
        self.sources, self.lengths, self.batch_size, self.seed = sources, lengths, batch_size, seed
        self.process, self.processes, self.vocabulary = process, processes, vocabulary
        self.rounds, self.windows, self.waited = 0, 0, 0.0
        if state is not None:
            self.rounds, self.windows = state["rounds"], state["windows"]
            for (stream, _), at in zip(sources, state["sources"], strict=True):
                stream.restore(at)
        self.state = self.now()
        self.made: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException] = queue.Queue(AHEAD)
        self.ended = threading.Event()
        self.maker = threading.Thread(target=self.make_all, daemon=True)
        self.maker.start()

    def __next__(self) -> Batch:
        asked = time.perf_counter()
        got = self.made.get()
        self.waited += time.perf_counter() - asked
        if isinstance(got, BaseException):
            self.made.put(got)  # for whoever asks again
            raise got
        batch, self.state = got
        return batch

    @property
    def short(self) -> int:
        """Texts that were dropped so far since they are shorter than a window."""
        return sum(source["short"] for source in self.state["sources"])

    def close(self) -> None:
        """Ends the making of batches."""
        self.ended.set()
        while self.maker.is_alive():
            try:
                self.made.get(timeout=0.01)
            except queue.Empty:
                continue

    def make_all(self) -> None:
        """Makes batches until it is ended; what is raised is raised where the next batch is asked for."""
        while not self.ended.is_set():
            try:
                self.made.put((self.make(), self.now()))
            except BaseException as error:  # handed to the other thread, whatever it is
                self.made.put(error)
                return

    def now(self) -> dict[str, Any]:
        """Where the making stands."""
        sources = [stream.state() for stream, _ in self.sources]
        return {"rounds": self.rounds, "windows": self.windows, "sources": sources}

    def make(self) -> Batch:
        """The next batch of this process; those of the others are passed over."""
        length = self.drawn("length", self.rounds, self.lengths)
        self.rounds += 1
        count = self.batch_size * (max(length for length, _ in self.lengths) // length)
        for process in range(self.processes):
            windows = [self.window(length) for _ in range(count)]
            if process == self.process:
                batch = as_batch(windows)
        if self.vocabulary is not None:
            check_token_ids(batch["input_ids"], self.vocabulary)
        return batch

    def window(self, length: int) -> Window:
        """The next window, of whichever source is drawn."""
        stream = self.drawn("source", self.windows, self.sources)
        self.windows += 1
        return stream.take(length)

    def drawn(self, what: str, number: int, choices: Sequence[tuple[Any, float]]) -> Any:
        """The first of one of the pairs in `choices`, by their weights; the same for the same seed and number."""
        if len(choices) == 1:
            return choices[0][0]
        values, weights = zip(*choices, strict=True)
        return random.Random(f"{self.seed} {what} {number}").choices(values, weights)[0]


def as_batch(windows: Sequence[Window]) -> Batch:
    """Windows of one length as tensors.

    Returns:
        `input_ids`, int64 `[B, T]`. Where a window has more than one text, all are one row `[1, B * T]`, the way in
        which models take packed texts, with `position_ids`, int64 `[1, B * T]`, which begin again at 0 with each text.
    """
    rows = torch.tensor([window.ids for window in windows])
    if not any(window.borders for window in windows):
        return {"input_ids": rows}
    positions = [text_positions(window.borders, rows.shape[1]) for window in windows]
    return {"input_ids": rows.reshape(1, -1), "position_ids": torch.cat(positions)[None]}


def text_positions(borders: Sequence[int], length: int) -> Tensor:
    """Positions within the texts of a window, int64 `[length]`."""
    ends = [*borders, length]
    return torch.cat([torch.arange(end - start) for start, end in zip([0, *borders], ends, strict=True)])
