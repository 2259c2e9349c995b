"""Prompts like RULER's, made here of any text, and the official ones read from JSONL.

The settings have the official names and values; the wording is ours, so figures of the two are not the same thing.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nsa_hf.errors import NsaError

from .answers import Question
from .haystack import KEYS, Haystack

# The tasks that are made here, settings as in RULER's synthetic.yaml. Of needles: the keys that there are, the values
# that each of them has, and the keys that are asked for.
TASKS: dict[str, dict[str, int]] = {
    "niah_multikey_1": {"num_needle_k": 4, "num_needle_v": 1, "num_needle_q": 1},
    "niah_multivalue": {"num_needle_k": 1, "num_needle_v": 4, "num_needle_q": 1},
    "niah_multiquery": {"num_needle_k": 4, "num_needle_v": 1, "num_needle_q": 4},
    "vt": {"num_chains": 1, "num_hops": 4},
    "cwe": {"freq_cw": 30, "freq_ucw": 3, "num_cw": 10},
}
# By the beginning of a task's name, how many tokens are generated.
TOKENS_TO_GENERATE = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


class Row(NamedTuple):
    """A prompt of a task.

    Attributes:
        task: its official name.
        length: tokens that prompt and answer have at most.
        question: the prompt and what a right answer contains.
    """

    task: str
    length: int
    question: Question


def tokens_to_generate(task: str) -> int:
    """How many tokens of an answer are read, as RULER does."""
    return next((count for name, count in TOKENS_TO_GENERATE.items() if task.startswith(name)), 128)


def make_row(task: str, haystack: Haystack, length: int, seed: str) -> Row:
    """A prompt of one of TASKS.

    Args:
        task: its name.
        haystack: the text around what is asked for.
        length: tokens of prompt and answer.
        seed: of everything that is drawn.

    Raises:
        NsaError: the length is too small for the question alone.
    """
    chance, new_tokens = random.Random(f"{task} {length} {seed}"), tokens_to_generate(task)
    makers: dict[str, Callable[..., tuple[list[int], list[str]]]] = {"vt": variable_tracking, "cwe": common_words}
    make = makers.get(task, needles)
    prompt, outputs = make(haystack, length - new_tokens, chance, **TASKS[task])
    return Row(task, length, Question(prompt, outputs, [], new_tokens))


def needles(
    haystack: Haystack, room: int, chance: random.Random, num_needle_k: int, num_needle_v: int, num_needle_q: int
) -> tuple[list[int], list[str]]:
    """Numbers under several keys, of which some are asked for: token ids of the prompt, and the right numbers."""
    keys = chance.sample(KEYS, max(num_needle_k, num_needle_q))
    numbers = {key: [str(chance.randrange(10**6, 10**7)) for _ in range(num_needle_v)] for key in keys}
    lines = [f"One of the special numbers for {key} is {number}." for key in keys for number in numbers[key]]
    chance.shuffle(lines)
    asked = keys[:num_needle_q]
    named = " and ".join(asked) if len(asked) < 3 else f"{', '.join(asked[:-1])} and {asked[-1]}"
    opening = "Special numbers are hidden in the text below. Remember them: they will be asked for.\n"
    closing = f"\nWhat are all the special numbers for {named} in the text? The special numbers for {named} are"
    prompt = haystack.prompt(opening, lines, depths(chance, len(lines)), closing, room)
    return prompt, [number for key in asked for number in numbers[key]]


def variable_tracking(
    haystack: Haystack, room: int, chance: random.Random, num_chains: int, num_hops: int
) -> tuple[list[int], list[str]]:
    """Variables that are given to each other, in chains: those with one chain's value are asked for."""
    chains = [[variable(chance) for _ in range(num_hops + 1)] for _ in range(num_chains)]
    values = [str(chance.randrange(10**4, 10**5)) for _ in chains]
    # in each chain in order, chains mixed
    steps = [
        [f"VAR {chain[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in zip(chain[:-1], chain[1:], strict=True)]
        for chain, value in zip(chains, values, strict=True)
    ]
    order = [index for index, lines in enumerate(steps) for _ in lines]
    chance.shuffle(order)
    lines = [steps[index].pop(0) for index in order]
    opening = "Variables are set in the text below. Follow which of them get which value.\n"
    example = "Example: VAR AAAAA = 123, VAR BBBBB = VAR AAAAA. The variables with the value 123 are AAAAA, BBBBB.\n"
    closing = (
        f"\nWhich {num_hops + 1} variables have the value {values[0]}? The variables with the value {values[0]} are"
    )
    return haystack.prompt(opening + example, lines, depths(chance, len(lines)), closing, room), chains[0]


def common_words(
    haystack: Haystack, room: int, chance: random.Random, freq_cw: int, freq_ucw: int, num_cw: int
) -> tuple[list[int], list[str]]:
    """A numbered list in which some words come much more often than the others: they are asked for."""
    pool = list(haystack.words)
    chance.shuffle(pool)
    common = pool[:num_cw]
    if len(common) < num_cw:
        raise NsaError(f"the text has {len(pool)} words of four to twelve letters, cwe needs {num_cw}: give more text")
    opening = "Below is a numbered list of words. Some of them come more often than the others. Remember them.\n"
    closing = f"\nWhat are the {num_cw} most common words of the list? The {num_cw} most common words are: 1."

    def prompt(count: int) -> list[int]:
        words = common * freq_cw + pool[num_cw : num_cw + count] * freq_ucw
        random.Random(count).shuffle(words)
        listed = " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))
        ids = haystack.tokenizer(opening, verbose=False)["input_ids"]
        return ids + haystack.tokens(listed) + haystack.tokens(closing)

    count = largest(lambda count: len(prompt(count)) <= room, len(pool) - num_cw)
    if count is None:
        raise NsaError(f"prompts of {room} tokens are too short for the words alone: give larger --lengths")
    return prompt(count), common


def largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number up to `most` that fits, by halving; None where 0 does not."""
    if not fits(0):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def depths(chance: random.Random, count: int) -> list[float]:
    """So many places of a haystack, rising."""
    return sorted(chance.random() for _ in range(count))


def variable(chance: random.Random) -> str:
    """A name of five capital letters."""
    return "".join(chance.choices(string.ascii_uppercase, k=5))


def read_rows(path: Path, tokenizer: Any, limit: int | None) -> Iterator[Row]:
    """RULER's own rows: `input`, `outputs`, `length`, and in newer ones `answer_prefix`.

    Args:
        path: a .jsonl, or a folder of such. A task is called like its file, or like its folder where the file is called
            validation.jsonl or test.jsonl.
        tokenizer: Transformers'.
        limit: rows of each file at most.

    Raises:
        NsaError: there are none, or one of them lacks something.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    if not files:
        raise NsaError(f"no RULER data at {path}: expected a .jsonl or a folder with some")
    for file in files:
        task = file.parent.name if file.stem in ("validation", "test") else file.stem
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[:limit], 1):
            try:
                row = json.loads(line)
                prompt, outputs, length = row["input"] + row.get("answer_prefix", ""), row["outputs"], row["length"]
                right = [str(output) for output in ([outputs] if isinstance(outputs, str) else outputs)]
                ids, length = tokenizer(prompt, verbose=False)["input_ids"], int(length)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise NsaError(
                    f"{file}:{number}: expected a row with input, outputs and length, as RULER writes them ({error})"
                ) from error
            yield Row(task, length, Question(ids, right, [], tokens_to_generate(task)))
