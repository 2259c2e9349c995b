"""What the commands share: results shown as tables or JSON, texts read, errors in one line."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

from nsa_hf.errors import NsaError

Item = TypeVar("Item")
LINE_EVERY = 60  # seconds
# What to do about errors of the system, by number; our own say it.
ADVICE = {
    errno.ENOSPC: "make room, or name a folder on another disk, and give the same command again",
    errno.EDQUOT: "make room, or name a folder on another disk, and give the same command again",
    errno.EACCES: "name a file or folder that you may use, or change its permissions",
    errno.EROFS: "name a folder that can be written",
    errno.ENOENT: "look at the path; `nsa-hf COMMAND --help` says what each is",
}


def show(result: dict[str, Any], render: Callable[[dict[str, Any]], Any], as_json: bool) -> None:
    """Prints a result.

    Args:
        result: as JSON can hold it.
        render: makes something of it that rich prints.
        as_json: print it as JSON instead.
    """
    if as_json:
        show_json(result)
        return
    from rich.console import Console

    Console().print(render(result))


def show_json(result: dict[str, Any]) -> None:
    """Prints a result as one JSON object."""
    print(json.dumps(result, indent=2))


@contextmanager
def result_alone(as_json: bool) -> Iterator[None]:
    """While a command works: what it says goes to standard error where its result is JSON, which stands alone then."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def track(items: Sequence[Item], words: str | None) -> Iterator[Item]:
    """The items one after another, while standard error says how many are done, how fast, and how long it takes yet.

    Args:
        items: what is worked on.
        words: before the figures; None says nothing. A terminal shows a bar, a file gets a line every minute.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if words is None or not console.is_terminal:
        yield from items if words is None else lines(items, words)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(words, total=len(items), rate="")
        for item in items:
            yield item
            speed = bar.tasks[0].speed
            bar.update(task, advance=1, rate=f"{speed:.2g}/s" if speed else "")


def lines(items: Sequence[Item], words: str) -> Iterator[Item]:
    """`track` where standard error is no terminal."""
    began = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= LINE_EVERY and done < len(items):
            said, rate = now, done / (now - began)
            minutes, seconds = divmod(round((len(items) - done) / rate), 60)
            print(f"{words}: {done} of {len(items)}, {rate:.2g}/s, {minutes}:{seconds:02d} left", file=sys.stderr)


def split(text: str) -> list[str]:
    """The parts of an option's value that has several, with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """An option's value that is several whole numbers; NsaError where it is not, None stays None."""
    try:
        return None if text is None else tuple(int(part) for part in split(text))
    except ValueError as error:
        raise NsaError(f"{option} takes whole numbers with commas between them, got {text!r}") from error


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
        advice = f": {ADVICE[error.errno]}" if isinstance(error, OSError) and error.errno in ADVICE else ""
        print(f"error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
    else:
        return False
    return True
