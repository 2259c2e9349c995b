"""A converted model behind Transformers' OpenAI-compatible server: `nsa-hf serve OUT --port 8000`.

It is `transformers serve` in a process that knows the sparse classes; every option of that command can be given. Three
things differ: a request that cannot be answered is refused with status 400 and the reason, no answer is longer than the
model's positions, and a server that is stopped by Ctrl-C or SIGTERM leaves with exit code 0.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.utils.import_utils import is_serve_available

import nsa_hf  # noqa: F401 - registers the model classes
from nsa_hf.conversion.files.loading import read_config
from nsa_hf.conversion.tensors import check_weights
from nsa_hf.errors import NsaError
from nsa_hf.generation import PAGED
from nsa_hf.heads import check_next_token

from .chat_template import apply_chat_template
from .exit_codes import INTERRUPTED
from .generate import as_one_text
from .load import check_token_ids, load_tokenizer
from .request_checks import NEEDED, check_request


def serve_model(out: Path, arguments: list[str], listening: Callable[[str], None] | None = None) -> None:
    """Serves until it is interrupted.

    Args:
        out: the converted model's folder; requests name it as their model.
        arguments: further options of `transformers serve`, such as `--host`, `--port`, `--device`, `--dtype`.
        listening: is called with the server's address as soon as it takes requests.

    Raises:
        NsaError: no model is there, or not all of it, its chat template goes wrong, the server's packages are missing,
            or continuous batching is asked for.
    """
    config = read_config(out)
    check_next_token(config, out)
    if "--continuous-batching" in arguments:
        raise NsaError(PAGED)
    if not is_serve_available():
        raise NsaError("the server needs more packages: pip install 'nsa-hf[serve]'")
    if not getattr(config, "quantization_config", None):
        check_weights(out, config)
    tokenizer = load_tokenizer(out, "--trust-remote-code" in arguments)
    if tokenizer.chat_template:
        # The server runs it in its own process for each request: one that never ends would end the service.
        apply_chat_template(tokenizer, [{"role": "user", "content": "hello"}])
    from transformers.cli.transformers import app  # here: it needs the packages just asked for

    adapt_server(listening)
    app(["serve", str(out), *arguments], prog_name="nsa-hf")


def adapt_server(listening: Callable[[str], None] | None = None) -> None:
    """Puts this module's parts into Transformers' server, for good: the process is the server."""
    from transformers.cli.serving import response, server, utils

    stopping = Event()
    utils.BaseHandler._validate_request = checked_first(utils.BaseHandler._validate_request)
    for handler, name in (
        (utils.BaseHandler, "get_processor_inputs_from_messages"),
        (response.ResponseHandler, "_normalize_input"),
    ):
        setattr(handler, name, staticmethod(refusing(getattr(handler, name))))
    utils.GenerateManager = limited(utils.GenerateManager, stopping)
    server.build_server = with_refusals(server.build_server, server.JSONResponse, stopping, listening)


def checked_first(validate: Callable[..., Any]) -> Callable[..., Any]:
    """The server's method `validate`, with `check_request` in front of it."""

    def check_and_validate(self: Any, body: dict[str, Any]) -> Any:
        check_request(body, NEEDED.get(type(self).__name__))
        return validate(self, body)

    return check_and_validate


def refusing(read: Callable[..., Any]) -> Callable[..., Any]:
    """The server's function `read`, where an error about a missing or unfit part of the request becomes a refusal."""

    def read_or_refuse(*args: Any) -> Any:
        try:
            return read(*args)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise NsaError(
                f"the request cannot be read, something in it is missing or of another kind: {error!r}"
            ) from None

    return read_or_refuse


def limited(manager: type, stopping: Event) -> type:
    """The server's class that generates, for one text at a time that ends where the model's positions end.

    Args:
        manager: Transformers' `GenerateManager`.
        stopping: when it is set, texts end with their next token.
    """

    def until_stopped(ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        return torch.full(ids.shape[:1], stopping.is_set(), device=ids.device)

    def limit(model: Any, inputs: Any, config: Any) -> dict[str, Any]:
        limit_answer(model, inputs["input_ids"], config)
        return {**inputs, "stopping_criteria": StoppingCriteriaList([until_stopped])}

    class LimitedManager(manager):
        def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **others: Any) -> Any:
            inputs = limit(model, inputs, gen_config)
            return super().generate_streaming(model, processor, inputs, gen_config, **others)

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, **others: Any
        ) -> Any:
            inputs = limit(model, inputs, gen_config)
            return await super().generate_non_streaming(model, processor, inputs, gen_config, **others)

    return LimitedManager


def limit_answer(model: Any, ids: torch.Tensor, config: Any) -> None:
    """Cuts how much a request lets the model generate to the positions that are left.

    Args:
        ids: the prompt, [1, T].
        config: the request's generation config, which is changed.

    Raises:
        NsaError: the prompt leaves none, is empty, or has tokens that the model does not know.
    """
    check_token_ids(model, ids)
    for generation_config in (config, model.generation_config):
        as_one_text(generation_config)
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


def with_refusals(
    build: Callable[..., Any],
    response: Callable[..., Any],
    stopping: Event,
    listening: Callable[[str], None] | None = None,
) -> Callable[..., Any]:
    """The function that builds the server's application, which then answers a ValueError with status 400.

    Args:
        build: Transformers' `build_server`.
        response: the server's class of JSON responses.
        stopping: is set when the server is to stop (see `stop_without_failure`).
        listening: as of `serve_model`.
    """

    async def refuse(request: Any, error: Exception) -> Any:
        return response({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    def build_with_refusals(*args: Any, **kwargs: Any) -> Any:
        application = build(*args, **kwargs)
        # Transformers' own refusals of settings are ValueErrors, as ours are
        application.add_exception_handler(ValueError, refuse)
        # what runs it, imported by Transformers just before
        server_class = sys.modules["uvicorn"].Server
        stop_without_failure(server_class, stopping)
        if listening is not None:
            say_where(server_class, listening)
        return application

    return build_with_refusals


def say_where(server_class: Any, listening: Callable[[str], None]) -> None:
    """Has a server say its address, with the port that the system chose where it was asked for 0.

    Args:
        server_class: uvicorn's `Server`, which is changed.
        listening: is called with the address.
    """
    startup = server_class.startup

    async def start_and_say(self: Any, *args: Any, **kwargs: Any) -> None:
        await startup(self, *args, **kwargs)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        listening(f"http://{host}:{self.servers[0].sockets[0].getsockname()[1]}/v1")

    server_class.startup = start_and_say


def stop_without_failure(server_class: Any, stopping: Event) -> None:
    """Lets a server that Ctrl-C or SIGTERM stops return from its `run`, after cutting its answers short.

    By itself it would wait for the longest answer and then raise the signal again, which makes a failed process.

    Args:
        server_class: uvicorn's `Server`, which is changed.
        stopping: is set when the first signal comes.
    """
    handle_exit, run = server_class.handle_exit, server_class.run

    def set_and_handle(self: Any, *args: Any) -> None:
        stopping.set()
        handle_exit(self, *args)

    def run_until_stopped(self: Any, *args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run(self, *args, **kwargs)
        except KeyboardInterrupt:
            if self.force_exit:
                # Ctrl-C a second time: a thread is still at work, and Python would wait for it
                os._exit(INTERRUPTED)

    server_class.handle_exit, server_class.run = set_and_handle, run_until_stopped
