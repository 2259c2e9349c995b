"""What a model answers: greedy generation with the cache, and how likely it holds the right answer to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_hf.conversion.compare.models import final_states, head_of

from .subject import Subject

# Tokens of the prompts that a GPU reads at a time; elsewhere one prompt is.
TOKENS_AT_ONCE = 2**17


class Question(NamedTuple):
    """A prompt, and what a right answer contains.

    Attributes:
        prompt: token ids.
        outputs: the texts that are all in a right answer.
        answer: token ids of the answer that is expected behind the prompt; empty where only generation counts.
        new_tokens: to generate at most.
    """

    prompt: list[int]
    outputs: list[str]
    answer: list[int]
    new_tokens: int


class Answered(NamedTuple):
    """How one question was answered.

    Attributes:
        found: the share of the outputs that the generated text contains, in either case of letters.
        nll: -log of the probability of the expected answer, nats a token; None without one.
        text: what was generated.
    """

    found: float
    nll: float | None
    text: str


def batches(questions: Sequence[Question], device: str) -> list[list[int]]:
    """Which questions are read together, by their places: those alike, as many as the device takes.

    Alike are prompts of one length that may be answered at one length: no answer is longer for its neighbours.
    """
    room = TOKENS_AT_ONCE if device == "cuda" else 0
    groups: list[list[int]] = []
    alike = [(len(question.prompt), question.new_tokens) for question in questions]
    for place in sorted(range(len(questions)), key=alike.__getitem__):
        tokens, _ = alike[place]
        if groups and alike[groups[-1][0]] == alike[place] and tokens * (len(groups[-1]) + 1) <= room:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


@torch.no_grad()
def answer(subject: Subject, way: str, questions: Sequence[Question]) -> list[Answered]:
    """Answers questions with prompts of one length, and answers of one length at most.

    Args:
        subject: the model.
        way: how it runs, one of WAYS.
        questions: read together, alike as those of `batches`.
    """
    with subject.run(way):
        texts = generate(subject, questions)
        nll = likelihoods(subject.model, questions)
    return [
        Answered(contained(question.outputs, text), each, text)
        for question, text, each in zip(questions, texts, nll, strict=True)
    ]


def contained(outputs: Sequence[str], text: str) -> float:
    """The share of `outputs` that are in a text."""
    return sum(output.lower() in text.lower() for output in outputs) / len(outputs)


def generate(subject: Subject, questions: Sequence[Question]) -> list[str]:
    """What the model says to each prompt, the likeliest token each time."""
    tokenizer = subject.tokenizer
    ids = torch.tensor([question.prompt for question in questions], device=subject.model.device)
    output = subject.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=questions[0].new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def likelihoods(model: Any, questions: Sequence[Question]) -> list[float | None]:
    """-log of the probability of each expected answer, nats a token; None for a question without one."""
    most = max(len(question.answer) for question in questions)
    if most == 0:
        return [None] * len(questions)
    # what follows an answer changes nothing before it
    rows = [q.prompt + q.answer + [q.prompt[-1]] * (most - len(q.answer)) for q in questions]
    (states,) = final_states(model, [("", torch.tensor(rows, device=model.device))])
    with head_of(model) as head:
        # [n * most, V]: what is said before each token of the answers
        log_p: Tensor = head(states[:, -most - 1 : -1].flatten(0, 1)[None]).float().log_softmax(-1)
    log_p = log_p.unflatten(0, (len(rows), most)).cpu()
    return [
        float(-log_p[row, range(len(q.answer)), q.answer].mean()) if q.answer else None
        for row, q in enumerate(questions)
    ]
