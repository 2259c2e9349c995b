"""`transformers serve` with a converted model, asked by OpenAI's own client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import byte_tokenizer, tiny_dense_model
from tiny_runs import converted
from transformers import AutoModelForCausalLM, pipeline

from nsa_hf.errors import NsaError
from nsa_hf.recipes.serve import serve

TURN = [{"role": "user", "content": "tell me about the words of it, and of them, and of those " * 2}]


@pytest.fixture(scope="module")
def nsa_dir(tiny_sizes, tmp_path_factory):
    """A model that answers in letters: other bytes would be streamed only when a character is complete."""
    dense, tokenizer = tiny_dense_model(), byte_tokenizer()
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

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [sys.executable, *COMMANDS[request.param], str(nsa_dir), "--host", "127.0.0.1"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        for _ in range(240):
            with socket.socket() as ready:
                if ready.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        else:
            raise AssertionError(log.read_text())
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.terminate()
        server.wait(timeout=30)


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


def test_the_pipeline_generates(nsa_dir, expected):
    answer = pipeline("text-generation", model=str(nsa_dir), device="cpu")(
        TURN, max_new_tokens=12, do_sample=False, return_full_text=False
    )
    assert answer == [{"generated_text": expected}]


def test_what_cannot_be_served_is_refused(nsa_dir, tmp_path):
    with pytest.raises(NsaError, match=r"holds a dense model \(llama\)"):
        serve(nsa_dir.parent / "dense", [])
    with pytest.raises(NsaError, match="no converted model in"):
        serve(tmp_path, [])
    with pytest.raises(NsaError, match="does not support continuous batching"):
        serve(nsa_dir, ["--continuous-batching"])
