"""The held-out text of a run, and what two texts are told apart by."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from nsa_hf.conversion.compare.texts import HELD_OUT, held_out_texts
from nsa_hf.conversion.files.hashes import hash_parts
from nsa_hf.errors import NsaError

from .sources import STANDARD_LIBRARY, HubTexts, open_texts

Window = tuple[str, list[int]]  # name and token ids


def held_out_documents(source: str, count: int, revision: str | None = None) -> list[tuple[str, str]]:
    """The first held-out documents.

    Args:
        source: see sources.py; of 'stdlib' they are the files that are not trained on.
        count: how many.
        revision: as of `open_texts`.

    Returns:
        Name and text of each.

    Raises:
        NsaError: there is no text, or it cannot be read.
    """
    if count < 1:
        raise NsaError(f"at least one held-out document is needed, got {count}")
    if source == STANDARD_LIBRARY:
        return held_out_texts(HELD_OUT[:count])
    texts = open_texts(source, revision=revision)
    if isinstance(texts, HubTexts):
        return texts.first(count)
    return [texts[number] for number in range(min(count, len(texts)))]


def held_out_windows(texts: list[tuple[str, str]], tokenizer: Any, length: int) -> list[Window]:
    """The held-out batch, on which a model before and after training is compared.

    Args:
        texts: name and text of each document.
        tokenizer: Transformers'.
        length: tokens that are taken of each, from its beginning.

    Returns:
        Name and token ids of each.

    Raises:
        NsaError: a text has fewer tokens.
    """
    if length < 2:
        raise NsaError(f"a held-out window has at least 2 tokens, one to predict the other from, got {length}")
    # verbose=False: no warning that a whole document is longer than the model's window
    windows = [(name, tokenizer(text, verbose=False)["input_ids"][:length]) for name, text in texts]
    short = [f"{name} ({len(ids)})" for name, ids in windows if len(ids) < length]
    if short:
        raise NsaError(f"held-out texts need {length} tokens, too short: {', '.join(short)}; take a smaller length")
    return windows


def hash_texts(texts: Iterable[tuple[str, str]]) -> str:
    """One hash of named texts: of the names, the texts, where each ends, and their order."""
    written = (part.encode() for named in texts for part in named)
    return hash_parts(chunk for part in written for chunk in (len(part).to_bytes(8, "little"), part))


def hash_windows(windows: Iterable[Sequence[int]]) -> str:
    """One hash of all windows' token ids."""
    return hash_parts(array("q", ids).tobytes() for ids in windows)
