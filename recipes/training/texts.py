"""The text of a run: what each stage's steps read, and the held-out text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nsa_hf.conversion.files.hashes import hash_parts

from ..load import load_tokenizer
from .batches import Batches, Weighted
from .config import RunConfig
from .data import Window, hash_texts, hash_windows, held_out_documents, held_out_windows
from .sources import ON_THE_HUB, HubTexts, open_texts
from .stages import Stage
from .windows import Parts, WindowStream, parts_of

# Between two stages' seeds: each stage reads its texts from the first on, in an order of its own. What the stage before
# has read of the same sources comes again.
SEED_STEP = 7919


class StageText(NamedTuple):
    """The text of a stage.

    Attributes:
        config: the stage's settings, settled.
        tokenizer: Transformers'.
        seed: of what is read, and in which order.
        sources: the texts of each source, with its weight.
    """

    config: RunConfig
    tokenizer: Any
    seed: int
    sources: list[tuple[Parts, float]]

    @property
    def lengths(self) -> list[tuple[int, float]]:
        """The lengths of windows, with their weights."""
        length = self.config.length
        return [(length, 1.0)] if isinstance(length, int) else [(entry["length"], entry["weight"]) for entry in length]

    def streams(self) -> list[Weighted]:
        """The windows of each source, from the first on."""
        return [
            Weighted(WindowStream(parts, self.tokenizer, pack=self.config.pack, seed=self.seed), weight)
            for parts, weight in self.sources
        ]

    def batches(self, process: int, processes: int, vocabulary: int, state: dict[str, Any] | None = None) -> Batches:
        """What one process reads in this stage.

        Args:
            process, processes: which one it is, of how many.
            vocabulary: tokens that the model has embeddings for.
            state: of the batches, where a run goes on.
        """
        return Batches(
            self.streams(),
            lengths=self.lengths,
            batch_size=self.config.batch_size,
            seed=self.seed,
            process=process,
            processes=processes,
            vocabulary=vocabulary,
            state=state,
        )

    def first_windows(self) -> list[list[int]]:
        """The first windows of each source.

        Raises:
            NsaError: no text in one is long enough.
        """
        return [stream.take(length).ids for stream, _ in self.streams() for length, _ in self.lengths]


class Texts(NamedTuple):
    """The text of a run.

    Attributes:
        stages: of each stage.
        hashes: of the training text and of its tokens, see `fingerprint`.
        held_out_documents: name and text of each held-out document.
        held_out_windows: name and token ids of what is read of each.
    """

    stages: list[StageText]
    hashes: dict[str, str]
    held_out_documents: list[tuple[str, str]]
    held_out_windows: list[Window]

    def fingerprint(self) -> dict[str, str]:
        """The part of the run's fingerprint (see folder.py) that follows from its text: hashes of it and its tokens."""
        return {**self.hashes, "held_out_text": hash_texts(self.held_out_documents)}


def revisions_of(config: RunConfig, stages: Sequence[Stage], noted: Mapping[str, str]) -> dict[str, str]:
    """The commit of each data set of the Hub that a run reads, by its source.

    Args:
        config: settled (see stages.py).
        stages: of it.
        noted: those that the run began with, which it goes on with whatever was uploaded since.

    Raises:
        NsaError: one is not there, or the Hub cannot be reached.
    """
    sources = [config.held_out, *(entry["source"] for stage in stages for entry in sources_of(stage.config))]
    on_hub = [source for source in dict.fromkeys(sources) if source.startswith(ON_THE_HUB)]
    return {source: noted.get(source) or HubTexts(source).revision for source in on_hub}


def read_texts(config: RunConfig, stages: Sequence[Stage], revisions: Mapping[str, str]) -> Texts:
    """Opens all that the run will read, and reads its beginning.

    Args:
        config: settled (see stages.py).
        stages: of it.
        revisions: see `revisions_of`.

    Raises:
        NsaError: text is missing or too short.
    """
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    held_out = held_out_documents(config.held_out, config.held_out_documents, revisions.get(config.held_out))
    held_out_ids = held_out_windows(held_out, tokenizer, config.held_out_length)
    opened: dict[str, Parts] = {}
    longest = max(stage.config.longest for stage in stages)
    read = []
    for stage in stages:
        entries = sources_of(stage.config)
        for entry in entries:
            source, column = entry["source"], entry.get("text_column")
            if (key := json.dumps([source, column])) not in opened:
                opened[key] = parts_of(open_texts(source, column or "text", revisions.get(source)), longest)
            entry["parts"] = opened[key]
        seed = (config.seed + SEED_STEP * (stage.number - 1)) % 2**32
        read.append(StageText(stage.config, tokenizer, seed, [(entry["parts"], entry["weight"]) for entry in entries]))
    windows = [ids for stage in read for ids in stage.first_windows()]
    tokens = hash_windows([*windows, *(ids for _, ids in held_out_ids)])
    hashes = {
        "training_text": hash_parts(parts.hash.encode() for parts in opened.values()),
        # of the tokens that come later, the text and the vocabulary decide
        "tokens": hash_parts([tokens.encode(), vocabulary(tokenizer)]),
    }
    return Texts(read, hashes, held_out, held_out_ids)


def sources_of(config: RunConfig) -> list[dict[str, Any]]:
    """The sources of a stage as entries with "source", "weight", and "text_column" where it was given."""
    return [{"source": config.data, "weight": 1.0}] if isinstance(config.data, str) else [dict(e) for e in config.data]


def vocabulary(tokenizer: Any) -> bytes:
    """All of a tokenizer's tokens with their ids."""
    return json.dumps(sorted(tokenizer.get_vocab().items())).encode()
