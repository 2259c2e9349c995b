"""How values are written into a card's Markdown: numbers, names, and texts of others, which are escaped."""

from __future__ import annotations

import json
import re
from typing import Any


class Markdown(str):
    """Text that goes into the card as it is; everything else is escaped."""


def escaped(value: Any) -> Any:
    """A value as the card shows it. Names, licenses and texts come from others and must not be read as Markdown."""
    if isinstance(value, Markdown | int | float):
        return value
    line = re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(printable(str(value)).split()))
    return re.sub(r"^([#+=~-])", r"\\\1", line)


def printable(text: str) -> str:
    """A text with spaces for control characters, and for those that turn the direction of writing."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def code(value: Any) -> str:
    """A name as code, or as escaped text where it has a backtick or a table's bar, which would end the code."""
    text = " ".join(printable(str(value)).split())
    return Markdown(escaped(text) if not text or set(text) & set("`|") else f"`{text}`")


def number(value: Any, form: str) -> str:
    """A number by a format specification; a dash for one that was not measured."""
    return Markdown("–" if value is None else figure(value, form))


def figure(value: float, form: str) -> str:
    """A number by a format specification; what is shown as zero has no sign."""
    text = format(value, form)
    return text if re.search(r"[1-9a-z]", text) else text.lstrip("+-")


def scientific(value: float | None) -> str:
    """A number as 4.32e-03; one that is rounding only, as the KL of equal models is, as "under 1e-07"."""
    return Markdown("under 1e-07") if value is not None and abs(value) < 1e-7 else number(value, ".2e")


def rise(row: dict[str, Any]) -> str:
    """By how much a row's perplexity is above dense's, with its standard error over the texts where there is one."""
    error = row.get("rise_error")
    return Markdown(number(row.get("rise"), "+.2%") + ("" if error is None else f" ± {error:.2%}"))


def few(names: list[str], most: int = 3) -> str:
    """Names as code, and of many only the first."""
    shown = ", ".join(map(code, names[:most]))
    return Markdown(shown if len(names) <= most else f"{shown} and {len(names) - most} more")


def block(text: str) -> str:
    """A text as an indented code block, which no text can end."""
    return Markdown("\n".join(f"    {line}" for line in text.strip("\n").splitlines()) or "    (nothing)")


# The filters of the template, by name.
FILTERS = {
    "integer": lambda value: number(value, ",d"),
    "fixed": lambda value, digits: number(value, f",.{digits}f"),
    "scientific": scientific,
    "percent": lambda value: number(value, ".2%"),
    "rise": rise,
    "plain": lambda value: number(value, "g"),
    "span": lambda row: Markdown(f"{row['from']:,}–{row['to']:,}"),
    "code": code,
    "codes": lambda names: Markdown(", ".join(map(code, names))),
    "few": few,
    "quoted": lambda text: Markdown(json.dumps(text, ensure_ascii=False)),
    "versions": lambda versions: ", ".join(f"{name} {version}" for name, version in versions.items()),
    "block": block,
}
