"""Which texts say the same: the runs of 13 words that they share.

runs = word_runs(text)                  # a hash for each run of 13 words
share = shared(runs, sorted_runs)       # how many of them another text has as well
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np

WORDS = 13
WORD = re.compile(r"[a-z0-9_]+")


@lru_cache(maxsize=1 << 20)
def word_hash(word: str) -> int:
    """A word's hash, of 64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def word_runs(text: str) -> np.ndarray:
    """A hash of every run of 13 words, uint64 `[words - 12]`, sorted and each once; letters' case counts not."""
    words = np.fromiter(map(word_hash, WORD.findall(text.lower())), dtype=np.uint64)
    if len(words) < WORDS:
        return np.empty(0, np.uint64)
    runs = np.zeros(len(words) - WORDS + 1, np.uint64)
    for place in range(WORDS):
        # an odd factor loses no bit
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + words[place : place + len(runs)]
    return np.unique(runs)


def known(runs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of `runs` are among `others` (both uint64 and sorted): bool `[runs]`."""
    if not len(others):
        return np.zeros(len(runs), bool)
    places = np.minimum(np.searchsorted(others, runs), len(others) - 1)
    return others[places] == runs


def shared(runs: np.ndarray, others: np.ndarray) -> float:
    """The share of `runs` that are among `others`, 0 where there are none."""
    return float(known(runs, others).mean()) if len(runs) else 0.0
