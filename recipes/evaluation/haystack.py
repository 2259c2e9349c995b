"""Haystacks: real text with one sentence, or several, that the question behind it asks for.

The prompt has exactly as many tokens as are asked for, the expected answer and what is generated included.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from nsa_hf.errors import NsaError

from .answers import Question

KEYS = (
    "Amber", "Birch", "Cedar", "Delta", "Ember", "Falcon", "Garnet", "Harbor", "Indigo", "Juniper", "Kestrel", "Lagoon",
    "Maple", "Nectar", "Opal", "Prairie", "Quartz", "Raven", "Saffron", "Timber", "Umber", "Velvet", "Willow", "Zephyr",
)  # fmt: skip
SPARE = 8  # tokens that may be generated beyond the expected answer


class Haystack:
    """The tokens of a long text, which begins anew where it is too short, and its words."""

    def __init__(self, tokenizer: Any, texts: Sequence[tuple[str, str]]):
        """Reads the texts.

        Args:
            tokenizer: Transformers'.
            texts: name and text of each.

        Raises:
            NsaError: there are no tokens in them.
        """
        self.tokenizer = tokenizer
        self.ids = [token for _, text in texts for token in self.tokens(text + "\n")]
        self.words = words_of(texts)
        if not self.ids:
            raise NsaError("the texts are empty: a haystack is made of them")

    def tokens(self, text: str) -> list[int]:
        """The tokens of some text of a prompt, nothing put before them or behind."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def hay(self, count: int, start: int) -> list[int]:
        """So many tokens from a place of the text on."""
        return [self.ids[(start + place) % len(self.ids)] for place in range(count)]

    def prompt(self, opening: str, needles: Sequence[str], depths: Sequence[float], closing: str, room: int) -> list:
        """A prompt of `room` tokens.

        Args:
            opening: its first words, behind what the tokenizer begins a text with.
            needles: sentences, each in a line of its own.
            depths: where each of them stands in the hay, from 0 (before it) to 1 (behind it), rising.
            closing: its last words.
            room: tokens.

        Raises:
            NsaError: the prompt has more tokens without any hay.
        """
        first = self.tokenizer(opening, verbose=False)["input_ids"]
        lines = [self.tokens(f"\n{needle}\n") for needle in needles]
        last = self.tokens(closing)
        length = room - len(first) - sum(map(len, lines)) - len(last)
        if length < 0:
            raise NsaError(f"prompts of {room} tokens are too short for the question alone: give larger --lengths")
        hay = self.hay(length, random.Random(f"{needles}").randrange(len(self.ids)))
        ids, begin = list(first), 0
        for line, depth in zip(lines, depths, strict=True):
            end = round(depth * length)
            ids += hay[begin:end] + line
            begin = end
        return ids + hay[begin:] + last


def words_of(texts: Sequence[tuple[str, str]]) -> list[str]:
    """The distinct words of texts, four to twelve small letters, sorted."""
    return sorted({word for _, text in texts for word in re.findall(r"\b[a-z]{4,12}\b", text)})


def single(haystack: Haystack, length: int, depth: float, seed: str) -> Question:
    """A question for one number that stands at `depth`.

    Args:
        haystack: what surrounds it.
        length: tokens of prompt and answer.
        depth: from 0 to 1.
        seed: of the number and its name.
    """
    chance = random.Random(f"single {seed}")
    key, number = chance.choice(KEYS), str(chance.randrange(10**6, 10**7))
    needles = [f"The special number for {key} is {number}."]
    closing = f"\nWhat is the special number for {key}? The special number for {key} is"
    return question(haystack, length, needles, [depth], closing, f" {number}", [number])


def multiple(haystack: Haystack, length: int, depth: float, seed: str, count: int = 4) -> Question:
    """A question for several numbers: the first stands at `depth`, the others from there to the end, evenly.

    Args:
        haystack, length, depth, seed: as for `single`.
        count: of the numbers.
    """
    chance = random.Random(f"multiple {seed}")
    key, numbers = chance.choice(KEYS), [str(chance.randrange(10**6, 10**7)) for _ in range(count)]
    needles = [f"One of the special numbers for {key} is {number}." for number in numbers]
    depths = [depth + (1 - depth) * index / count for index in range(count)]
    closing = f"\nWhat are all {count} special numbers for {key}? The {count} special numbers for {key} are"
    return question(haystack, length, needles, depths, closing, " " + ", ".join(numbers), numbers)


def question(
    haystack: Haystack,
    length: int,
    needles: Sequence[str],
    depths: Sequence[float],
    closing: str,
    answer: str,
    outputs: list[str],
) -> Question:
    """A question whose prompt leaves room for the answer within `length` tokens."""
    expected = haystack.tokens(answer)
    new_tokens = len(expected) + SPARE
    opening = "Special numbers are hidden in the text below. Remember them: they will be asked for.\n"
    prompt = haystack.prompt(opening, needles, depths, closing, length - new_tokens)
    return Question(prompt, outputs, expected, new_tokens)
