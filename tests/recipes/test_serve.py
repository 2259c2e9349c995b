"""`transformers serve` with a converted model, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, tiny_dense_model
from tiny_runs import converted
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from nsa_hf.errors import NsaError
from nsa_hf.recipes.request_checks import check_request
from nsa_hf.recipes.serve import adapt_server, limit_answer, serve_model, stop_without_failure

POSITIONS = 160
TURN = [{"role": "user", "content": "tell me about the words of it, and of them, and of those " * 2}]


@pytest.fixture(scope="module")
def nsa_dir(tiny_sizes, tmp_path_factory):
    """A model that answers in letters: other bytes would be streamed only when a character is complete."""
    dense, tokenizer = tiny_dense_model(max_position_embeddings=POSITIONS), byte_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    dense.model.embed_tokens.weight.data[letters] *= 4
    folder = tmp_path_factory.mktemp("served")
    dense.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return converted(folder / "dense", folder / "nsa", tiny_sizes)


# Ours, and Transformers' own in a process that has not imported nsa_hf: the model's folder says where its code is.
COMMANDS = {
    "nsa-hf serve": ["-m", "nsa_hf.recipes.cli", "serve"],
    "transformers serve": [
        "-c",
        "from transformers.cli.transformers import app; app()",
        "serve",
        "--trust-remote-code",
    ],
}


@pytest.fixture(scope="module", params=COMMANDS)
def client(request, nsa_dir, tmp_path_factory):
    import openai

    ours = request.param == "nsa-hf serve"
    port = 0 if ours else free_port()
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [sys.executable, *COMMANDS[request.param], str(nsa_dir), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32", *["--json"] * ours],
            stdout=subprocess.PIPE if ours else output,
            stderr=output,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        url = said_by(server, nsa_dir) if ours else f"http://127.0.0.1:{port}/v1"
        wait_for(server, int(url.rpartition(":")[2].removesuffix("/v1")), log)
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    finally:
        server.send_signal(signal.SIGINT)
        code, rest = server.wait(timeout=30), server.stdout.read() if ours else ""
        assert (code == 0 or not ours) and rest == "", log.read_text()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def said_by(server: subprocess.Popen, nsa_dir) -> str:
    """The address on the one line that `--json` prints."""
    said = json.loads(server.stdout.readline() or "{}")
    assert said.keys() == {"model", "url"} and said["model"] == str(nsa_dir), said
    return said["url"]


def wait_for(server: subprocess.Popen, port: int, log) -> None:
    for _ in range(240):
        with socket.socket() as ready:
            if ready.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, log.read_text()
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def expected(nsa_dir) -> str:
    """The greedy answer, by `generate()` in this process."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(nsa_dir).eval(), byte_tokenizer()
    ids = tokenizer.apply_chat_template(TURN, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert ids.input_ids.shape[1] > 100, "beyond what the selection covers"
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert text.isalpha() and len(text) == 12
    return text


@pytest.mark.parametrize("stream", [False, True])
def test_an_openai_client_gets_the_models_greedy_answer(stream, client, nsa_dir, expected):
    answer = client.chat.completions.create(
        model=str(nsa_dir), messages=TURN, max_tokens=12, temperature=0, stream=stream
    )
    if stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices]
        assert len([piece for piece in pieces if piece]) > 1
        text = "".join(pieces)
    else:
        assert answer.usage.completion_tokens <= 12
        text = answer.choices[0].message.content
    assert text == expected


OURS = pytest.mark.parametrize("client", ["nsa-hf serve"], indirect=True)


@OURS
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_where_the_models_positions_do(stream, client, nsa_dir):
    answer = client.chat.completions.create(model=str(nsa_dir), messages=TURN, max_tokens=10**9, stream=stream)
    *_, last = answer if stream else [answer]
    assert last.usage.total_tokens == POSITIONS
    assert last.choices[0].finish_reason == "length"


@OURS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages is empty or missing"),
        ({"messages": [{"content": "no role"}]}, "a turn of messages must be an object with 'role'"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"temperature": -1}, "temperature must be a number of at least 0 and at most 1000000.0, got -1"),
        ({"logit_bias": {"no token": 1}}, "invalid literal for int"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "cannot be read.*'arguments'"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "cannot be read.*not iterable"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "and the model takes 160: shorten it"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_a_bad_request(stream, change, message, client, nsa_dir):
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": str(nsa_dir), "messages": TURN, "stream": stream, **change})


@OURS
@pytest.mark.parametrize("turns", [[{"role": "user", "content": 5}], [5], [*TURN, {"type": "function_call"}]])
def test_turns_of_the_other_interface_that_cannot_be_read(turns, client, nsa_dir):
    import openai

    with pytest.raises(openai.BadRequestError, match="cannot be read"):
        client.responses.create(model=str(nsa_dir), input=turns)


def test_the_pipeline_generates(nsa_dir, expected):
    answer = pipeline("text-generation", model=str(nsa_dir), device="cpu")(
        TURN, max_new_tokens=12, do_sample=False, return_full_text=False
    )
    assert answer == [{"generated_text": expected}]


def test_what_cannot_be_served_is_refused(nsa_dir, tmp_path):
    with pytest.raises(NsaError, match=r"holds a dense model \(llama\)"):
        serve_model(nsa_dir.parent / "dense", [])
    with pytest.raises(NsaError, match="holds no model"):
        serve_model(tmp_path, [])
    with pytest.raises(NsaError, match="none does not exist"):
        serve_model(tmp_path / "none", [])
    with pytest.raises(NsaError, match="does not support continuous batching"):
        serve_model(nsa_dir, ["--continuous-batching"])


def test_a_template_that_goes_wrong_is_not_served(nsa_dir, tmp_path):
    folder = shutil.copytree(nsa_dir, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(NsaError, match="chat template fails with TemplateError: no"):
        serve_model(folder, [])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": "many"}, "max_tokens must be a whole number of at least 1, got 'many'"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens must be a whole number"),
        ({"max_output_tokens": True}, "max_output_tokens must be a whole number"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": "hot"}, "got 'hot'"),
        ({"temperature": 1e-300}, "temperature must be 0"),
        ({"top_p": 2}, "top_p must be a number of at least 0 and at most 1, got 2"),
        ({"frequency_penalty": -1}, "frequency_penalty must be"),
        ({"seed": 2**70}, "seed must be"),
        ({"n": 4}, "n must be 1"),
        ({"stop": ["a", ""]}, "stop must be text"),
        ({"stop": 5}, "stop must be text"),
        ({"messages": "hello"}, "messages must be a list of turns, got 'hello'"),
        ({"messages": ["hello"]}, "got 'hello'"),
        ({"messages": [{"role": "user", "content": ["text"]}]}, "content must be text, or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "parts with 'type' and 'text'"),
        ({"messages": [{"role": "user", "content": 5}]}, "content must be text, or a list of parts"),
        ({"messages": None}, "messages is empty or missing"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs must be an object, got 5"),
        ({"generation_config": "[1]"}, "generation_config must be an object"),
        ({"generation_config": {}}, "generation_config must be an object"),
        ({"generation_config": '{"max_new_tokens": "many"}'}, "max_new_tokens must be a whole number of at least 1"),
        ({"generation_config": '{"temperature": -1}'}, "temperature must be a number of at least 0"),
    ],
)
def test_what_a_request_may_not_ask_for(body, message):
    check_request({"messages": TURN}, "messages")
    with pytest.raises(NsaError, match=message):
        check_request({"messages": TURN, **body}, "messages")


def test_half_a_character_is_a_bad_request():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        check_request({"prompt": "\ud83d"}, "prompt")


def test_what_every_request_may_ask_for():
    numbers = {"max_tokens": 10**12, "temperature": 0, "top_p": 1.0, "seed": -5, "n": 1, "stop": ["a"]}
    check_request(
        {"messages": [*TURN, {"role": "assistant", "content": None, "tool_calls": []}], **numbers}, "messages"
    )
    check_request(dict.fromkeys((*numbers, "frequency_penalty")))
    with pytest.raises(NsaError, match="prompt is empty or missing"):
        check_request({"prompt": ""}, "prompt")


def test_a_request_is_cut_to_the_positions_that_are_left(tiny_nsa_model):
    model = tiny_nsa_model()
    config = GenerationConfig(max_new_tokens=10**9, num_beams=4, return_dict_in_generate=True)
    model.generation_config.num_beams = 3
    limit_answer(model, torch.ones(1, 4000, dtype=torch.long), config)
    assert (config.max_new_tokens, config.num_beams, config.return_dict_in_generate) == (96, None, None)
    assert model.generation_config.num_beams is None
    limit_answer(model, torch.ones(1, 4095, dtype=torch.long), config)
    assert config.max_new_tokens == 1
    limit_answer(model, torch.ones(1, 4000, dtype=torch.long), total := GenerationConfig(max_length=10**9))
    assert (total.max_new_tokens, total.max_length) == (None, 4096)
    for ids, message in [
        (torch.ones(1, 4096, dtype=torch.long), "has 4096 tokens, and the model takes 4096"),
        (torch.ones(1, 0), "the prompt is empty"),
        (torch.full((1, 3), 256), "gives token 256"),
    ]:
        with pytest.raises(NsaError, match=message):
            limit_answer(model, ids, config)


def test_a_server_that_stops_cuts_its_answers_short(tiny_nsa_model, monkeypatch):
    """Else it would wait for the longest of them."""
    from transformers.cli.serving import server, utils

    # what is put in for good is taken out again
    for owner, name in [(utils.BaseHandler, "_validate_request"), (utils, "GenerateManager")]:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    application = SimpleNamespace(add_exception_handler=lambda *_: None)
    monkeypatch.setattr(server, "build_server", lambda: application)
    told = []
    monkeypatch.setattr("nsa_hf.recipes.serve.stop_without_failure", lambda server, stopping: told.append(stopping))
    monkeypatch.setitem(sys.modules, "uvicorn", SimpleNamespace(Server=None))
    adapt_server()
    assert server.build_server() is application
    threading.Timer(0.5, told[0].set).start()
    model = tiny_nsa_model()
    model.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    config = GenerationConfig(max_new_tokens=4000)
    answer = utils.GenerateManager().generate_non_streaming(model, byte_tokenizer(), inputs, config, request_id="1")
    _, read, generated = asyncio.run(answer)
    assert read == 8 and 1 <= len(generated) < 4000


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    class Server:
        force_exit = False

        def handle_exit(self, sig, frame):
            self.force_exit = stopping.is_set() and self.asked

        def run(self):
            raise KeyboardInterrupt

    left = []
    monkeypatch.setattr("os._exit", left.append)
    stopping = threading.Event()
    monkeypatch.setattr("signal.signal", lambda *_: None)
    stop_without_failure(Server, stopping)
    server = Server()
    server.asked = False
    server.handle_exit(signal.SIGINT, None)
    server.run()
    assert (stopping.is_set(), left) == (True, [])
    server.asked = True
    server.handle_exit(signal.SIGINT, None)
    server.run()
    assert left == [130]


STOPPED = """
import threading, os, signal, uvicorn
from nsa_hf.recipes.serve import stop_without_failure

stop_without_failure(uvicorn.Server, threading.Event())

async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.complete"})
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    await receive()
    await send({"type": "lifespan.shutdown.complete"})

uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on")).run()
print("closed")
"""


def test_a_server_that_is_asked_to_stop_has_not_failed():
    """By SIGTERM; by Ctrl-C where the servers above are stopped."""
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


def test_the_server_listens_on_this_machine_only_unless_told_otherwise():
    """What docs/security.md says of Transformers' defaults."""
    from transformers.cli import serve  # here: it needs the server's packages

    defaults = inspect.signature(serve.Serve.__init__).parameters
    said = {name: defaults[name].default for name in ("host", "port", "enable_cors", "trust_remote_code")}
    assert said == {"host": "localhost", "port": 8000, "enable_cors": False, "trust_remote_code": False}


def test_a_model_that_lacks_weights_is_not_served(nsa_dir, tmp_path):
    shutil.copytree(nsa_dir, tmp_path / "nsa")
    weights = load_file(tmp_path / "nsa/model.safetensors")
    name = next(name for name in weights if ".nsa." in name)
    del weights[name]
    save_file(weights, tmp_path / "nsa/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match=f"1 missing tensors .{name}"):
        serve_model(tmp_path / "nsa", ["--no-such-option"])
    (tmp_path / "nsa/adapter_config.json").write_text("{}")
    with pytest.raises(NsaError, match="adapter"):
        serve_model(tmp_path / "nsa", ["--no-such-option"])
