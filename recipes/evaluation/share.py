"""Texts shared out among the processes of a run, and what each found put together again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed


class Share(NamedTuple):
    """Every `step`-th batch from number `first` on: what one of `step` processes reads."""

    first: int = 0
    step: int = 1

    def numbers(self, total: int) -> range:
        """The numbers of this process's batches, of `total`.

        They are as many in each process, as a model in parts needs all of them for each forward pass: the last may be
        `total` and more, which is to be worked on like any other, and dropped.
        """
        return range(self.first, -(-total // self.step) * self.step, self.step)

    def together(self, found: dict[int, Any]) -> dict[int, Any]:
        """What all processes found, by the number of the batch; pickled on the way. The same in each of them."""
        if self.step == 1:
            return found
        parts: list[dict[int, Any]] = [{} for _ in range(self.step)]
        torch.distributed.all_gather_object(parts, found)
        return dict(sorted((number, value) for part in parts for number, value in part.items()))
