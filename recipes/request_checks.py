"""Which requests `nsa-hf serve` can answer; the others are refused with what is wrong in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from nsa_hf.errors import NsaError

from .generate import SEEDS, TEMPERATURES

# Names of how long an answer may be, in requests and in the generation config that one can hold.
MOST_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "max_length")
# The least and the largest value of a request's numbers; all may be absent or null.
NUMBERS = {
    **dict.fromkeys(MOST_TOKENS, (1, math.inf)),
    "temperature": (0, TEMPERATURES[1]),
    "top_p": (0, 1),
    "frequency_penalty": (-0.99, 100),
    "seed": SEEDS,
}
WHOLE = (*MOST_TOKENS, "seed")
# The field of a request that holds what is to be answered, by the server's handler of it.
NEEDED = {"ChatCompletionHandler": "messages", "CompletionHandler": "prompt", "ResponseHandler": "input"}


def check_request(body: Mapping[str, Any], needed: str | None = None) -> None:
    """Whether the server can answer a request.

    Args:
        body: the request, as JSON had it.
        needed: the field that must not be empty, one of NEEDED's.

    Raises:
        ValueError: what is wrong in it.
    """
    json.dumps(body, ensure_ascii=False).encode()  # UnicodeEncodeError for half a character, which JSON can hold
    check_numbers(body)
    if 0 < (body.get("temperature") or 0) < TEMPERATURES[0]:
        raise NsaError(f"temperature must be 0 (the likeliest token) or at least 1e-6, got {body['temperature']}")
    if body.get("n") not in (None, 1):
        raise NsaError(f"n must be 1, one answer to a request, got {body['n']!r}")
    stop = body.get("stop")
    stops = stop if isinstance(stop, list) else [stop]
    if stop is not None and not all(isinstance(text, str) and text for text in stops):
        raise NsaError(f"stop must be text or a list of texts, none of them empty, got {stop!r}")
    if not isinstance(body.get("chat_template_kwargs") or {}, dict):
        raise NsaError(f"chat_template_kwargs must be an object, got {body['chat_template_kwargs']!r}")
    config = body.get("generation_config")
    if config is not None and not (isinstance(config, str) and isinstance(json.loads(config), dict)):
        raise NsaError(f"generation_config must be an object, written as JSON in a text, got {config!r}")
    check_numbers(json.loads(config or "{}"))
    if needed is not None and not body.get(needed):
        raise NsaError(f"{needed} is empty or missing: there is nothing to answer")
    if needed == "messages":
        check_messages(body["messages"])


def check_numbers(body: Mapping[str, Any]) -> None:
    """Whether each of a request's NUMBERS has a value within its bounds; NsaError says which has not."""
    for name, (least, largest) in NUMBERS.items():
        value = body.get(name)
        kinds = int if name in WHOLE else (int, float)
        if value is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= largest:
            kind = "a whole number" if name in WHOLE else "a number"
            most = "" if largest == math.inf else f" and at most {largest}"
            raise NsaError(f"{name} must be {kind} of at least {least}{most}, got {value!r}")


def check_messages(messages: Any) -> None:
    """Whether a conversation is a list of turns of text; NsaError says what is not."""
    if not isinstance(messages, list):
        raise NsaError(f"messages must be a list of turns, got {messages!r}")
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise NsaError(f"a turn of messages must be an object with 'role' and 'content', got {turn!r}")
        content = turn.get("content")
        parts = content if isinstance(content, list) else []
        texts = [isinstance(part, dict) and isinstance(part.get("text"), str) and "type" in part for part in parts]
        if not isinstance(content, str | list | None) or not all(texts):
            raise NsaError(
                f"a turn's content must be text, or a list of parts with 'type' and 'text' (these models take nothing "
                f"else), got {content!r}"
            )
