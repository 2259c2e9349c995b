"""Two models on the same texts, one in memory at a time.

A model is run once over every text and then gives way to the next; what stays of it is its final hidden states [T,
hidden], small beside logits, and its head. Logits are made from them a run of positions at a time, so that neither two
models nor two [T, V] tensors are ever held at once.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from nsa_hf.errors import NsaError

from ..files.loading import reading
from ..files.model_folder import VOCABULARIES
from .metrics import NO_LABEL, Accumulator


def token_windows(
    out: Path,
    texts: Sequence[tuple[str, str]],
    length: int,
    documents: int,
    vocabulary: int,
    trust_remote_code: bool = False,
) -> list[tuple[str, Tensor]]:
    """The first `length` tokens (int64 [1, length]) of the first `documents` texts that have as many.

    A checkpoint without a tokenizer gets random tokens instead: they show what was kept as well as a text does, and
    nothing about language.

    Raises:
        NsaError: the texts are too short, or the tokenizer is another model's.
    """
    if not has_tokenizer(out):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(vocabulary, (documents, 1, length), generator=generator)
        return [(f"random tokens {index}", ids) for index, ids in enumerate(drawn)]
    with reading(out):
        tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=trust_remote_code)
    windows: list[tuple[str, Tensor]] = []
    longest = 0
    for name, text in texts:
        if len(windows) == documents:
            break
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length]
        longest = max(longest, ids.shape[1])
        if ids.shape[1] == length:
            check_token_ids(ids, vocabulary)
            windows.append((name, ids))
    if len(windows) < documents:
        raise NsaError(
            f"expected {documents} texts of at least {length} tokens, found {len(windows)} among {len(texts)} (the "
            f"longest looked at has {longest}): give longer texts, or a smaller length or number of documents"
        )
    return windows


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint has a tokenizer beside it."""
    return any(path for pattern in ("tokenizer*", "vocab.*", *VOCABULARIES) for path in folder.glob(pattern))


def check_token_ids(ids: Tensor, vocabulary: int) -> None:
    """Whether a model has an embedding for each of a tokenizer's ids.

    The model itself would stop with an index error, and on a GPU with one of the whole process.

    Raises:
        NsaError: one is beyond its vocabulary.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise NsaError(
            f"the tokenizer gives token {int(ids.max())}, and the model's vocabulary ends at {vocabulary - 1}: "
            "the tokenizer is another model's, so copy the source's tokenizer files into the folder"
        )


def next_tokens(ids: Tensor) -> Tensor:
    """The labels [T] of a text [1, T]: each position's next token, and none at the last."""
    return torch.cat([ids[0, 1:], ids.new_tensor([NO_LABEL])])


class HiddenStates(nn.Module):
    """In place of a model's decoder once that is no longer needed: gives the head the hidden states it is given."""

    def forward(self, *absent: None, inputs_embeds: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        """`inputs_embeds [1, T, hidden]` are the final hidden states; ids that are None may come without a name."""
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


@torch.no_grad()
def final_hidden(
    model: PreTrainedModel, windows: Sequence[tuple[str, Tensor]], what: str, progress: bool
) -> list[Tensor]:
    """The decoder's output [1, T, hidden] for each text; leaves of the model only its head (see HiddenStates)."""
    bar = track(windows, what, disable=not progress, console=Console(stderr=True))
    hidden = [model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state for _, ids in bar]
    setattr(model, model.base_model_prefix, HiddenStates())
    gc.collect()
    return hidden


@torch.no_grad()
def compare_logits(
    comparison: Accumulator,
    labels: Tensor,
    dense: PreTrainedModel,
    reference: Tensor,
    sparse: PreTrainedModel,
    hidden: Tensor,
) -> None:
    """Adds one text to the comparison, a run of positions at a time: heads of both models on their hidden states."""
    for start in range(0, len(labels), comparison.chunk):
        run = slice(start, start + comparison.chunk)
        first, second = (
            model(inputs_embeds=h[:, run]).logits[0] for model, h in ((dense, reference), (sparse, hidden))
        )
        comparison.update(first, second, labels[run], start)
