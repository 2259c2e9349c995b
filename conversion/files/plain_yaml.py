"""YAML of settings: names and plain values, each name once, without aliases and deep nesting.

(With aliases a short text can be as long as memory, and deep nesting ends Python's stack.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LONGEST = 1 << 20
DEEPEST = 50


def read_plain(path: Path, longest: int = LONGEST) -> Any:
    """What a YAML file holds.

    Args:
        path: of the file.
        longest: characters that it may have; no more are read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8, or as in `load_plain`.
    """
    with path.open(encoding="utf-8") as file:
        return load_plain(file.read(longest + 1), longest)


def load_plain(text: str, longest: int = LONGEST) -> Any:
    """What a YAML text holds.

    Args:
        text: in YAML.
        longest: characters that it may have.

    Raises:
        ValueError: it is no YAML, has aliases, gives a name twice, is longer than `longest` characters or nested deeper
            than DEEPEST, or holds a value that cannot be (the 30th of February).
    """
    if len(text) > longest:
        raise ValueError(f"it has more than {longest:,} characters")
    try:
        return yaml.load(text, PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which stops at the first thing that is not plain."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's; refuses aliases and deep nesting."""
        event = self.peek_event()
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{line}: an alias (*{event.anchor}), in whose place the value itself must stand")
        if self.depth > DEEPEST:
            raise ValueError(f"{line}: nested deeper than {DEEPEST}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As PyYAML's; refuses a name that is given twice."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
            if name.value in seen:
                raise ValueError(f"line {name.start_mark.line + 1}: {name.value[:80]} is given twice")
            seen.add(name.value)
        return node
