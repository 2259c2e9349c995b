"""Texts as token ids, for models that are compared on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from nsa_hf.errors import NsaError

from ..files.loading import reading
from ..files.model_folder import VOCABULARIES
from .metrics import NO_LABEL

# The beginning of one text: its name and its token ids, int64 [1, T].
Window = tuple[str, Tensor]


def token_windows(
    folder: Path,
    texts: Sequence[tuple[str, str]],
    length: int,
    documents: int,
    vocabulary: int,
    trust_remote_code: bool = False,
) -> list[Window]:
    """The first tokens of the first texts that are long enough.

    A checkpoint without a tokenizer gets random tokens instead: they show what was kept as well as a text does, and
    nothing about language.

    Args:
        folder: holds the tokenizer.
        texts: (name, text) pairs.
        length: tokens of each window.
        documents: number of windows.
        vocabulary: ids that the model has an embedding for.
        trust_remote_code: run the code that the tokenizer brings.

    Raises:
        NsaError: fewer texts than `documents` are long enough, or the tokenizer is another model's.
    """
    if not has_tokenizer(folder):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(vocabulary, (documents, 1, length), generator=generator)
        return [(f"random tokens {index}", ids) for index, ids in enumerate(drawn)]
    windows = longest_windows(folder, texts, length, documents, vocabulary, trust_remote_code)
    longest = max((ids.shape[1] for _, ids in windows), default=0)
    found = len(windows) if longest == length else 0
    if found < documents:
        raise NsaError(
            f"expected {documents} texts of at least {length} tokens, found {found} among {len(texts)} (the "
            f"longest looked at has {longest}): give longer texts, or a smaller length or number of documents"
        )
    return windows


def longest_windows(
    folder: Path,
    texts: Iterable[tuple[str, str]],
    length: int,
    documents: int,
    vocabulary: int,
    trust_remote_code: bool = False,
) -> list[Window]:
    """The first tokens of the first texts that are long enough, as far as there are such; else all of the longest text.

    Args:
        folder: holds the tokenizer.
        texts: (name, text) pairs.
        length: tokens of each window.
        documents: number of windows at most.
        vocabulary: ids that the model has an embedding for.
        trust_remote_code: run the code that the tokenizer brings.

    Raises:
        NsaError: the tokenizer cannot be read, or is another model's.
    """
    with reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    encoded = (
        (name, tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length]) for name, text in texts
    )
    windows: list[Window] = []
    longest: list[Window] = []
    for name, ids in encoded:
        if ids.shape[1] == length:
            windows.append((name, ids))
            if len(windows) == documents:
                break
        elif not longest or ids.shape[1] > longest[0][1].shape[1]:
            longest = [(name, ids)]
    windows = windows or longest
    for _, ids in windows:
        check_token_ids(ids, vocabulary)
    return windows


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint has a tokenizer beside it."""
    return any(path for pattern in ("tokenizer*", "vocab.*", *VOCABULARIES) for path in folder.glob(pattern))


def check_token_ids(ids: Tensor, vocabulary: int) -> None:
    """Makes sure that a model has an embedding for each of a tokenizer's ids.

    The model itself would stop with an index error, and on a GPU with one that ends the whole process.

    Args:
        ids: of any shape, integers.
        vocabulary: the number of embeddings.

    Raises:
        NsaError: an id is beyond the vocabulary.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise NsaError(
            f"the tokenizer gives token {int(ids.max())}, and the model's vocabulary ends at {vocabulary - 1}: "
            "the tokenizer is another model's, so copy the source's tokenizer files into the folder"
        )


def next_tokens(ids: Tensor) -> Tensor:
    """The labels [T] of a text [1, T]: at each position the next token, and NO_LABEL at the last."""
    return torch.cat([ids[0, 1:], ids.new_tensor([NO_LABEL])])
