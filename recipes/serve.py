"""A converted model behind Transformers' OpenAI-compatible server: `nsa-hf serve OUT --port 8000`.

It is `transformers serve` in a process that knows the sparse classes; every option of that command can be given. What
it leaves to chance is settled here: a request that cannot be answered is refused with status 400 and the reason, no
answer is longer than the model's positions, and a server that is asked to stop has not failed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import torch
from transformers.utils.import_utils import is_serve_available

import nsa_hf  # noqa: F401 - registers the model classes
from nsa_hf.conversion.files.loading import read_config
from nsa_hf.conversion.layout import check_weights
from nsa_hf.errors import NsaError
from nsa_hf.generation import PAGED

from .chat_template import apply_chat_template
from .exit_codes import INTERRUPTED
from .generate import SEEDS, TEMPERATURES, as_one_text
from .load import check_token_ids, load_tokenizer

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
# What each of the server's handlers makes an answer to.
NEEDED = {"ChatCompletionHandler": "messages", "CompletionHandler": "prompt", "ResponseHandler": "input"}


def serve(out: Path, arguments: list[str]) -> None:
    """Serves until it is interrupted.

    Args:
        out: the converted model's folder; requests name it as their model.
        arguments: further options of `transformers serve`, such as `--host`, `--port`, `--device`, `--dtype`.

    Raises:
        NsaError: no model is there, or not all of it, its chat template goes wrong, the server's packages are missing,
            or continuous batching is asked for.
    """
    config = read_config(out)
    if "--continuous-batching" in arguments:
        raise NsaError(PAGED)
    if not is_serve_available():
        raise NsaError("the server needs more packages: pip install 'nsa-hf[serve]'")
    if not getattr(config, "quantization_config", None):
        check_weights(out, config)
    tokenizer = load_tokenizer(out, "--trust-remote-code" in arguments)
    if tokenizer.chat_template:
        # it runs in the server's own process for each request: one that never ends would be the end of the server
        apply_chat_template(tokenizer, [{"role": "user", "content": "hello"}])
    from transformers.cli.transformers import app  # here: it needs what was just asked for

    settle()
    app(["serve", str(out), *arguments], prog_name="nsa-hf")


def settle() -> None:
    """Puts our parts into Transformers' server, for good: this process is the server."""
    from transformers import StoppingCriteriaList
    from transformers.cli.serving import response, server, utils

    validate, build = utils.BaseHandler._validate_request, server.build_server
    stopping = Event()

    def validate_request(self: Any, body: dict[str, Any]) -> Any:
        check_request(body, NEEDED.get(type(self).__name__))
        return validate(self, body)

    def until_stopped(ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        return torch.full(ids.shape[:1], stopping.is_set(), device=ids.device)

    def fitted(model: Any, inputs: Any, config: Any) -> dict[str, Any]:
        fit(model, inputs["input_ids"], config)
        return {**inputs, "stopping_criteria": StoppingCriteriaList([until_stopped])}

    class WithinTheModel(utils.GenerateManager):
        """Generates one text, no longer than the model has positions, and no further when the server stops."""

        def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **others: Any) -> Any:
            inputs = fitted(model, inputs, gen_config)
            return super().generate_streaming(model, processor, inputs, gen_config, **others)

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, **others: Any
        ) -> Any:
            inputs = fitted(model, inputs, gen_config)
            return await super().generate_non_streaming(model, processor, inputs, gen_config, **others)

    async def refuse(request: Any, error: Exception) -> Any:
        content = {"error": {"message": str(error), "type": "invalid_request_error"}}
        return server.JSONResponse(content, status_code=400)

    def build_server(*args: Any, **kwargs: Any) -> Any:
        application = build(*args, **kwargs)
        # Transformers' own refusals of settings are ValueErrors, as ours are
        application.add_exception_handler(ValueError, refuse)
        # what runs it, imported by Transformers just before
        stop_well(sys.modules["uvicorn"].Server, stopping)
        return application

    utils.BaseHandler._validate_request = validate_request
    for handler, name in (
        (utils.BaseHandler, "get_processor_inputs_from_messages"),
        (response.ResponseHandler, "_normalize_input"),
    ):
        setattr(handler, name, staticmethod(understood(getattr(handler, name))))
    utils.GenerateManager = WithinTheModel
    server.build_server = build_server


def understood(read: Callable[..., Any]) -> Callable[..., Any]:
    """The server's `read`, for which what a request lacks, or has of another kind, is the request's fault."""

    def read_or_refuse(*args: Any) -> Any:
        try:
            return read(*args)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise NsaError(
                f"the request cannot be read, something in it is missing or of another kind: {error!r}"
            ) from None

    return read_or_refuse


def stop_well(server_class: Any, stopping: Event) -> None:
    """Lets a server that Ctrl-C or SIGTERM stops return from `run`, its answers cut short by `stopping`.

    By itself it would wait for the longest answer, and raise the signal again behind it: a failed process.
    """
    handle_exit, run = server_class.handle_exit, server_class.run

    def handle_and_tell(self: Any, *args: Any) -> None:
        stopping.set()
        handle_exit(self, *args)

    def run_until_stopped(self: Any, *args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run(self, *args, **kwargs)
        except KeyboardInterrupt:
            if self.force_exit:
                # Ctrl-C a second time: a thread is still at work, behind which Python would not end in order
                os._exit(INTERRUPTED)

    server_class.handle_exit, server_class.run = handle_and_tell, run_until_stopped


def check_request(body: Mapping[str, Any], needed: str | None = None) -> None:
    """Whether the server can answer a request at all, which must have `needed`; ValueError with what is wrong in it."""
    json.dumps(body, ensure_ascii=False).encode()  # halves of characters, which JSON can hold
    check_numbers(body)
    if 0 < (body.get("temperature") or 0) < TEMPERATURES[0]:
        raise NsaError(f"temperature must be 0 (the likeliest token) or at least 1e-6, got {body['temperature']}")
    if body.get("n") not in (None, 1):
        raise NsaError(f"n must be 1, one answer to a request, got {body['n']!r}")
    stop = body.get("stop")
    stops = stop if isinstance(stop, list) else [stop]
    if stop is not None and not all(isinstance(one, str) and one for one in stops):
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


def fit(model: Any, ids: Any, config: Any) -> None:
    """Cuts how much a request lets the model generate to the positions that are left.

    Raises:
        NsaError: the prompt leaves none, is empty, or has tokens that the model does not know.
    """
    check_token_ids(model, ids)
    for one in (config, model.generation_config):
        as_one_text(one)
    tokens = ids.shape[-1]
    if tokens == 0:
        raise NsaError("the prompt is empty: give at least one token")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    if tokens >= limit:
        raise NsaError(f"the prompt has {tokens} tokens, and the model takes {limit}: shorten it")
    if config.max_new_tokens is not None:
        config.max_new_tokens = min(config.max_new_tokens, limit - tokens)
    elif config.max_length is not None:
        config.max_length = min(config.max_length, limit)
