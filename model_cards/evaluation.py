"""What is in a folder's eval.json: the results of `nsa-hf eval`, by suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nsa_hf.errors import NsaError

FORMAT = 2


def read_suites(path: Path) -> dict[str, Any]:
    """The results by suite; none where there is no file.

    Args:
        path: of eval.json.

    Raises:
        NsaError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return suites_of(content)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise NsaError(f"{path} is damaged ({error}): put it right, or move it away and measure again") from error


def suites_of(content: dict[str, Any]) -> dict[str, Any]:
    """The results by suite of a file's content; format 1 was what `ppl` is now."""
    if "suites" in content:
        return dict(content["suites"])
    return {"ppl": {"recall": [], **{name: value for name, value in content.items() if name != "format"}}}
