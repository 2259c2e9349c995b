"""What is in a folder's eval.json: the results of `nsa-hf eval`, by suite."""

from __future__ import annotations

from typing import Any

FORMAT = 2


def suites_of(content: dict[str, Any]) -> dict[str, Any]:
    """The results by suite of a file's content; format 1 was what `ppl` is now."""
    if "suites" in content:
        return dict(content["suites"])
    return {"ppl": {"recall": [], **{name: value for name, value in content.items() if name != "format"}}}
