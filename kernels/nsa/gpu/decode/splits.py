"""How many programs share the past of a query."""

from __future__ import annotations

from functools import cache

import torch

from ..common import processors

MOST_SPLITS = 64
# What beginning a program costs, in tiles.
START = 2.0


def split_count(programs: int, tiles: int, device: torch.device, resident: int = 1) -> int:
    """How many programs share the tiles of one: few rounds of full cards, and no more partial results than needed.

    Args:
        programs: what there is without splits.
        tiles: tiles that each of them walks over, at most.
        resident: programs that a processor holds at a time.
    """
    return fewest_rounds(programs, tiles, processors(device) * resident, MOST_SPLITS, START)


@cache
def fewest_rounds(programs: int, tiles: int, at_once: int, most: int, start: float) -> int:
    """The number of splits, at most `most`, with which the last program ends first; beginning costs `start` tiles."""
    candidates = range(1, max(1, min(tiles, most)) + 1)
    return min(candidates, key=lambda n: -(-programs * n // at_once) * (-(-tiles // n) + start))
