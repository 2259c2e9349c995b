"""What is in a folder's eval.json: the results of `nsa-hf eval`, by suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = 2


def read_suites(path: Path) -> dict[str, Any]:
    """The results by suite; none where there is no file, or none that can be read.

    Args:
        path: of eval.json.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return suites_of(content) if isinstance(content, dict) else {}


def suites_of(content: dict[str, Any]) -> dict[str, Any]:
    """The results by suite of a file's content; format 1 was what `ppl` is now."""
    if "suites" in content:
        return dict(content["suites"])
    return {"ppl": {"recall": [], **{name: value for name, value in content.items() if name != "format"}}}
