"""What trainers should come to, from each document alone: no padding, no packing, none of their code."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tiny_runs import WORDS
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100


def words(generator: random.Random, count: int) -> str:
    """A text of a few letters a word; most are longer than a tiny model's exact range."""
    return " ".join(generator.choice(WORDS) for _ in range(count))


def loss_alone(model: Any, documents: Iterable[dict[str, list[int]]]) -> Tensor:
    """The mean loss of all tokens that are learned.

    Args:
        documents: `input_ids`, and `labels` with -100 where a token is not learned.
    """
    total, count = torch.zeros(()), 0
    for document in documents:
        labels = torch.tensor(document["labels"])[1:]
        logits = model(torch.tensor([document["input_ids"]])).logits[0, :-1]
        total = total + cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        count += int((labels != IGNORED).sum())
    return total / count


def log_probabilities(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Of each token of an answer, [tokens]."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def gradient_norm(model: Any, loss: Tensor) -> float:
    """The norm of a loss's gradient by all parameters, which is what trainers log as `grad_norm`."""
    gradients = torch.autograd.grad(loss, [one for one in model.parameters() if one.requires_grad], allow_unused=True)
    return float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm())
