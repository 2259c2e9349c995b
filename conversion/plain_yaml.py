"""YAML of settings: names and plain values, without what makes a short text long (aliases) or deep."""

from __future__ import annotations

from typing import Any

import yaml

LONGEST = 1 << 20
DEEPEST = 50


def load_plain(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ValueError: it is no YAML, has aliases, is longer than LONGEST characters or nested deeper than DEEPEST, or
            holds a value that cannot be (the 30th of February).
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters: expected at most {LONGEST:,}")
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has an alias (*{event.anchor}): write the value itself")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"it is nested deeper than {DEEPEST}")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
