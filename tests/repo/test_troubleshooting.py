"""Every message that docs/troubleshooting.md quotes is one that the code has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("nsa_hf", "kernels", "conversion", "recipes", "model_cards")
ANY = "\0"  # in a text of the code: what stands between braces


def texts_of_the_code() -> list[str]:
    """Every text in the sources that has some words, with `ANY` for what is put in."""
    texts = set()
    for path in (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(re.sub(r"\{\w*\}", ANY, node.value))
            elif isinstance(node, ast.JoinedStr):
                texts.add("".join(str(part.value) if isinstance(part, ast.Constant) else ANY for part in node.values))
    return [text for text in texts if " " in text]


def quoted() -> list[tuple[str, str]]:
    """The messages of the page's tables, and what stands behind each in its cell."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)`([^|]*)\|", page, flags=re.MULTILINE)


def is_said(message: str, texts: list[str]) -> bool:
    """Whether a text of the code has the message's pieces, in this order, with something put in between them."""
    pieces = [piece.strip() for piece in message.split("...") if piece.strip(" :")]
    return bool(pieces) and any(has_pieces(text, pieces) for text in texts if pieces[0] in text)


def has_pieces(text: str, pieces: list[str]) -> bool:
    """Whether a text has these pieces one behind another, and `ANY` between each two."""
    place = 0
    for number, piece in enumerate(pieces):
        found = text.find(piece, place)
        if found < 0 or (number and ANY not in text[place:found]):
            return False
        place = found + len(piece)
    return True


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return texts_of_the_code()


def test_every_message_on_the_page_is_in_the_code(texts: list[str]) -> None:
    messages = quoted()
    assert len(messages) > 50
    ours = [message for message, behind in messages if "Transformers'" not in behind]
    assert [message for message in ours if not is_said(message, texts)] == []


@pytest.mark.parametrize("message", ["attention_mask has gaps", "the new model ... GB, and its disc has", "...", ""])
def test_a_message_that_is_not_there_is_found_out(message: str, texts: list[str]) -> None:
    assert not is_said(message, texts)
