"""What the commands share: results shown as tables or JSON, texts read, errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_hf.errors import NsaError


def show(result: dict[str, Any], render: Callable[[dict[str, Any]], Any], as_json: bool) -> None:
    """Prints a result.

    Args:
        result: as JSON can hold it.
        render: makes something of it that rich prints.
        as_json: print it as JSON instead.
    """
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console

    Console().print(render(result))


def read_text(path: Path) -> str:
    """The text in a file, or in standard input where it is "-"; NsaError when it cannot be read."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NsaError(f"cannot read {path} as UTF-8 text: {error}") from error


def report(error: Exception) -> bool:
    """Prints an error in one line, if a user can act upon it.

    Returns:
        False for an error that is a bug of ours, which is not printed.
    """
    if hasattr(error, "format_message"):  # click's, about the command line
        context = getattr(error, "ctx", None)
        hint = f" ({context.command_path} --help shows how)" if context else ""
        print(f"error: {error.format_message()}{hint}", file=sys.stderr)
    elif isinstance(error, (NsaError, OSError)) or type(error).__name__ == "CardError":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    else:
        return False
    return True
