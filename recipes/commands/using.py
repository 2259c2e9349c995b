"""What a model selects and says, its server and its card; and the demo."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nsa_hf.errors import NsaError, check_folder

from ..terminal import read_text, result_alone, show, show_json
from .app import Device, Json, Out, TrustTokenizer, app


@app.command()
def inspect(
    out: Out,
    text: Annotated[
        Path | None, typer.Option(help="Text file. [default: a held-out file of the standard library]")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens read of it.")] = 2048,
    device: Device = None,
    trust_remote_code: TrustTokenizer = False,
    as_json: Json = False,
) -> None:
    """Show what is selected and how open gates are.

    Per layer and KV head the blocks that are selected, per branch the gates' means; also written to OUT/inspect.json.
    """
    from ..inspection import inspect_model, render_inspection
    from ..load import pick_device

    named_text = (text.name, read_text(text)) if text else None
    with result_alone(as_json):
        result = inspect_model(out, named_text, length, pick_device(device), trust_remote_code)
    show(result, render_inspection, as_json)


@app.command()
def generate(
    out: Out,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt; - is standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn: apply the chat template.")] = False,
    prompt_tokens: Annotated[int | None, typer.Option(help="Take this many tokens of the prompt only.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many of the likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    save: Annotated[Path | None, typer.Option(help="Also write prompt, text and speed to this JSON file.")] = None,
    trust_remote_code: TrustTokenizer = False,
    as_json: Json = False,
) -> None:
    """Generate from a prompt.

    The text is printed as it comes, then the tokens per second.
    """
    from ..generate import generate_text
    from ..load import pick_device

    if (prompt is None) == (prompt_file is None):
        raise NsaError("give the prompt once: --prompt TEXT or --prompt-file FILE")
    text = read_text(prompt_file) if prompt_file is not None else str(prompt)
    with result_alone(as_json):
        result = generate_text(
            out,
            text,
            chat=chat,
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            device=pick_device(device),
            dtype=dtype,
            save=save,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        show_json(result)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    out: Out,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print its address as one JSON object when it listens; all else goes to stderr."),
    ] = False,
) -> None:
    """Serve OUT over HTTP, compatible with OpenAI's API.

    It is `transformers serve` with the sparse classes known; further options are that command's: --host, --port (0: any
    that is free), --device, --dtype, --compile, ... Needs `pip install 'nsa-hf[serve]'`.
    """
    from ..serve import serve_model

    standard_output = sys.stdout

    def listening(url: str) -> None:
        print(json.dumps({"model": str(out), "url": url}), file=standard_output, flush=True)

    with result_alone(as_json):
        serve_model(out, context.args, listening if as_json else None)


@app.command()
def card(
    out: Out,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md written by hand.")] = False,
    as_json: Json = False,
) -> None:
    """Write the model card.

    OUT/README.md and its pictures, from the JSON results in OUT only: what was not measured is not in it.
    """
    from nsa_hf.model_cards.card import render_card

    with result_alone(as_json):
        path = render_card(check_folder(out), overwrite)
    if as_json:
        show_json({"card": str(path)})
    else:
        print(f"model card: {path}")


@app.command()
def demo(
    context: typer.Context,
    work: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo"),
    run: Annotated[
        Path | None, typer.Option(help="The training run's settings. [default: the package's demo.yaml]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Walk the whole path on a real small model.

    Fetch SmolLM2-135M, then plan, convert, verify, train, generate, inspect, card. Finished steps are not done again.
    """
    from ..demo import run_demo

    with result_alone(as_json):
        result = run_demo(work, run, context.obj)
    if as_json:
        show_json(result)
