"""The value of one setting: read from a command line, checked against its type, shown in a message."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nsa_hf.errors import NsaError

# Types of settings that are lists, or one value in the place of a list.
Sources = str | list[dict[str, Any]]
Lengths = int | list[dict[str, Any]]
Names = list[str]
Blocks = int | str
StageList = list[dict[str, Any]]

# What an entry of a mixture has; its weight is 1 where none is written, and texts are in the column `text`.
SOURCE_KEYS, LENGTH_KEYS = ("source", "weight", "text_column"), ("length", "weight")
# What YAML 1.1 makes of the words yes and no (it also reads 1e-5 as text).
WORDS = {True: "yes", False: "no"}
PLAIN: dict[str, tuple[type, str]] = {
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
    "float": (float, "a number"),
}


def parse_value(key: str, kind: str, text: str) -> Any:
    """The value of a setting that an override has as text; NsaError when it cannot be read.

    Args:
        key: the setting's name, for messages.
        kind: its type, as RunConfig declares it.
        text: behind the "=".
    """
    # here: with its package come PyTorch and Transformers, for which --help does not wait
    from nsa_hf.conversion.files.plain_yaml import load_plain

    if kind == "str" or (kind == "Sources" and not text.lstrip().startswith("[")):
        return text
    try:
        return load_plain(text)
    except ValueError as error:
        raise NsaError(f"cannot read the value of {key}={shortened(text)!r}: {shortened(str(error))}") from error


def check_value(key: str, kind: str, value: Any) -> Any:
    """A setting's value as its type; NsaError when it is of another type.

    Args:
        key: the setting's name, for messages.
        kind: its type, as RunConfig declares it.
        value: as YAML gives it.
    """
    if kind in CHECKS:
        return CHECKS[kind](key, value)
    if key in ("mixed_precision", "compile") and isinstance(value, bool):
        return WORDS[value]
    if kind == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
        except OverflowError:
            return math.inf
    expected, name = PLAIN[kind]
    if expected is type(value):
        return value
    raise NsaError(f"{key} must be {name}, got {shown(value)}")


def check_rate(key: str, value: Any) -> float | None:
    """A number, or None."""
    return None if value is None else check_value(key, "float", value)


def check_names(key: str, value: Any) -> list[str]:
    """Texts; one alone may stand without brackets."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise NsaError(f"{key} must be a list of names like [a, b], got {shown(value)}")
    return names


def check_blocks(key: str, value: Any) -> Blocks:
    """A number of blocks, or 'all'."""
    if value == "all" or type(value) is int:
        return value
    raise NsaError(f"{key} must be a whole number or 'all', got {shown(value)}")


def check_sources(key: str, value: Any) -> Sources:
    """A text, or a mixture of such with weights."""
    return value if isinstance(value, str) else check_mixture(key, value, SOURCE_KEYS, "str")


def check_lengths(key: str, value: Any) -> Lengths:
    """A whole number, or a mixture of such with weights."""
    return value if type(value) is int else check_mixture(key, value, LENGTH_KEYS, "int")


def check_mixture(key: str, value: Any, keys: tuple[str, ...], kind: str) -> list[dict[str, Any]]:
    """The entries of a mixture, each with its weight; NsaError names the entry that is wrong.

    Args:
        key: the setting's name, for messages.
        value: as YAML gives it.
        keys: what an entry may have: first the name of what is mixed, which it must have.
        kind: the type of what is mixed.
    """
    what, example = keys[0], f"[{{{keys[0]}: ..., weight: 1}}, ...]"
    if not isinstance(value, list) or not value:
        raise NsaError(f"{key} must be {PLAIN[kind][1]} or a list like {example}, got {shown(value)}")
    entries = []
    for number, entry in enumerate(value, 1):
        place = f"{key}, entry {number}"
        if not isinstance(entry, dict) or what not in entry:
            raise NsaError(f"{place}: expected {{{what}: ..., weight: 1}}, got {shown(entry)}")
        if unknown := [name for name in entry if name not in keys]:
            raise NsaError(f"{place}: unknown {shown(unknown[0])}; an entry has {' and '.join(keys)}")
        weight = check_value(f"{place}: weight", "float", entry.get("weight", 1))
        if not 0 < weight < math.inf:
            raise NsaError(f"{place}: weight must be above 0, got {weight}")
        if "text_column" in entry:
            check_value(f"{place}: text_column", "str", entry["text_column"])
        entries.append({**entry, what: check_value(f"{place}: {what}", kind, entry[what]), "weight": weight})
    return entries


def check_stages(key: str, value: Any) -> StageList:
    """A list of mappings; what is in them is for config.py to check."""
    if not isinstance(value, list) or not all(isinstance(stage, dict) for stage in value):
        raise NsaError(f"{key} must be a list, of each stage the settings that differ in it, got {shown(value)}")
    return value


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "float | None": check_rate,
    "Names": check_names,
    "Blocks": check_blocks,
    "Sources": check_sources,
    "Lengths": check_lengths,
    "StageList": check_stages,
}


def shown(value: Any) -> str:
    """A value as a message shows it; of a very long number its size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return shortened(repr(value))


def shortened(text: str, most: int = 200) -> str:
    """A text in one line, cut behind `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."
