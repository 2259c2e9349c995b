"""A conversation as text, by a tokenizer's chat template, which runs in a process of its own.

A template is a program that came with the model: it may raise, never end, or write without end. Its process has limited
time and memory, and is ended when they are used up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from nsa_hf.errors import NsaError

SECONDS = 30  # the process takes one to start, a template some milliseconds
MEMORY = 4 << 30  # bytes
CHARACTERS = 10_000_000  # that a template may write more than the conversation has


def apply_chat_template(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The conversation as text behind which the answer comes, as the tokenizer's own `apply_chat_template` writes it.

    Args:
        tokenizer: Transformers'.
        messages: turns, each with "role" and "content".

    Raises:
        NsaError: there is no template, or it raises, does not end or writes too much; says which.
    """
    if not tokenizer.chat_template:
        raise NsaError("the tokenizer has no chat template: leave --chat out")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        raise NsaError(f"the tokenizer's chat template cannot be chosen: {error}") from error
    request = json.dumps({**tokenizer.special_tokens_map, "chat_template": template, "conversations": [messages]})
    # the modules that this process imports, and none that lie in the current folder
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=SECONDS, env=places)
    except subprocess.TimeoutExpired:
        raise template_error(f"does not end (within {SECONDS} seconds)") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise template_error(f"cannot be run: {lines[-1][:500]}")
    text, problem = json.loads(done.stdout)
    if problem is not None:
        raise template_error(problem)
    return str(text)


def template_error(problem: str) -> NsaError:
    """The error of a template that cannot be used."""
    return NsaError(
        f"the tokenizer's chat template {problem}: mend chat_template in the model's folder, or do without it"
    )


def render(request: str) -> tuple[str | None, str | None]:
    """Runs a template; to be called in the process of its own.

    Args:
        request: JSON with the template, the conversation and the tokenizer's special tokens.

    Returns:
        The text and None, or None and what is wrong.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory()
    try:
        (text,), _ = render_jinja_template(**json.loads(request), add_generation_prompt=True)
    except MemoryError:
        return None, f"takes more than {MEMORY >> 30} GiB of memory"
    except Exception as error:  # the template's, whatever it is
        return None, f"fails with {type(error).__name__}: {error}"[:500]
    if len(text) > CHARACTERS + len(request):
        return None, f"makes {len(text):,} characters of a conversation of {len(request):,}"
    return text, None


def limit_memory() -> None:
    """Limits this process's memory to MEMORY, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # a system that has no such limit, or a lower one already


if __name__ == "__main__":
    print(json.dumps(render(sys.stdin.read())))
