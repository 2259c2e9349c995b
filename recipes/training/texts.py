"""The text of a run: what each stage's steps read, and the held-out text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from nsa_hf.errors import NsaError

from ..load import load_tokenizer
from .config import RunConfig
from .data import (
    Window,
    hash_texts,
    hash_windows,
    held_out_documents,
    held_out_windows,
    load_documents,
    training_windows,
)
from .stages import Stage

if TYPE_CHECKING:
    from datasets import Dataset

SEED_STEP = 7919  # between two stages' seeds, so that a stage does not read what the one before has read


class StageText(NamedTuple):
    """The text of a stage.

    Attributes:
        documents: columns `name` and `text`.
        windows: what the steps read of it, in order, columns `input_ids` and `name`.
    """

    documents: Dataset
    windows: Dataset


class Texts(NamedTuple):
    """The text of a run.

    Attributes:
        stages: of each stage.
        held_out_documents: name and text of each held-out document.
        held_out_windows: name and token ids of what is read of each.
    """

    stages: list[StageText]
    held_out_documents: list[tuple[str, str]]
    held_out_windows: list[Window]

    def fingerprint(self) -> dict[str, str]:
        """The part of the run's fingerprint (see folder.py) that follows from its text: hashes of it and its tokens."""
        distinct = {id(stage.documents): stage.documents for stage in self.stages}.values()
        named_texts = chain.from_iterable(zip(d["name"], d["text"], strict=True) for d in distinct)
        windows = chain.from_iterable(stage.windows["input_ids"] for stage in self.stages)
        return {
            "training_text": hash_texts(named_texts),
            "held_out_text": hash_texts(self.held_out_documents),
            "tokens": hash_windows(chain(windows, (ids for _, ids in self.held_out_windows))),
        }


def read_texts(config: RunConfig, stages: Sequence[Stage], processes: int) -> Texts:
    """Reads and tokenises all that the run will read.

    Args:
        config: settled (see stages.py).
        stages: of it.
        processes: that train together.

    Raises:
        NsaError: text is missing or too short.
    """
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    held_out = held_out_documents(config.held_out, config.held_out_documents)
    held_out_ids = held_out_windows(held_out, tokenizer, config.held_out_length)
    documents: dict[str, Dataset] = {}
    read = []
    for stage in stages:
        key = json.dumps(stage.config.data)
        if key not in documents:
            documents[key] = load_documents(stage.config.data)  # type: ignore[arg-type]
        read.append(StageText(documents[key], stage_windows(documents[key], tokenizer, stage, config.seed, processes)))
    return Texts(read, held_out, held_out_ids)


def stage_windows(documents: Dataset, tokenizer: Any, stage: Stage, seed: int, processes: int) -> Dataset:
    """The windows that a stage reads.

    Args:
        seed: of the run.
        processes: that train together.
    """
    config = stage.config
    if not isinstance(config.length, int) or config.pack:
        raise NsaError("mixtures of lengths and packed windows are not there yet: give one length, and pack=false")
    count = config.steps * config.accumulate * config.batch_size * processes
    stage_seed = (seed + SEED_STEP * (stage.number - 1)) % 2**32
    return training_windows(documents, tokenizer, length=config.length, count=count, seed=stage_seed)
