"""The commands of `nsa-hf`. Each reads its options and calls one function, which Python programs can call too.

PyTorch and Transformers are imported by the command that runs, so that `--help` and completion do not wait for them.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from nsa_hf import NsaError, __version__
from nsa_hf.errors import check_folder

from .exit_codes import FAILED
from .measuring import measuring, save_plan
from .nsa_options import options_of, with_nsa_options
from .terminal import numbers, read_text, result_alone, show, show_json, split
from .training.config import load_run_config, settings_help

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Src = Annotated[str, typer.Argument(help="Dense model: a local folder, a Hub id, a .gguf file or a folder with one.")]
Out = Annotated[Path, typer.Argument(help="Converted (or trained) model's folder.")]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1. [default: a GPU if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: as the source]")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read weights that are PyTorch pickles: the tensors in them, nothing else."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Accept a source that brings its own code, and run that code.")
]
TrustTokenizer = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code of its own that OUT's tokenizer may have.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object; all else goes to standard error.")
]


def show_version(wanted: bool) -> None:
    """Prints the versions and leaves, where `--version` was given."""
    if wanted:
        print(f"nsa-hf {__version__} ({', '.join(versions('torch', 'transformers', 'triton'))})")
        raise typer.Exit


def versions(*packages: str) -> Iterator[str]:
    """Each package with its version, or as missing."""
    for package in packages:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"no {package}"


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the versions and leave.")
    ] = False,
) -> None:
    """Native Sparse Attention for Transformers: convert a dense checkpoint, prove what was kept, train, generate.

    Each command's own --help says more. Exit codes: 0 all is well, 1 a check failed, 2 wrong input.
    """


@app.command()
@with_nsa_options
def plan(
    src: Src,
    dtype: Dtype = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    measure: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Measure on it: stdlib, a text file, a folder, a .jsonl or .parquet."),
    ] = None,
    measure_tokens: Annotated[
        int | None, typer.Option(help="Tokens of every text (4096); fewer where none has so many.")
    ] = None,
    measure_documents: Annotated[int | None, typer.Option(help="Texts read at most (2).")] = None,
    device: Device = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep what was measured there: plan.json and layers.png.")
    ] = None,
    as_json: Json = False,
    **nsa: Any,
) -> None:
    """Show what a conversion would do.

    What is recommended, why and at what cost; per layer what becomes of it, the parameters added, KV-cache bytes; from
    which length it pays. With --measure also what it costs in quality, nothing trained: perplexity and KL by position,
    and layer by layer.
    """
    from nsa_hf.conversion import plan, render_plan

    options = {**options_of(nsa), "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    texts = measuring(measure, measure_tokens, measure_documents, device, save)
    with result_alone(as_json):
        planned = plan(src, dtype=dtype, revision=revision, measure=texts, **options)
        if save is not None:
            save_plan(save, planned)
    show(planned, render_plan, as_json)


@app.command()
@with_nsa_options
def convert(
    src: Src,
    out: Annotated[Path, typer.Argument(help="Folder for the converted model; new or empty.")],
    dtype: Dtype = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "2GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in OUT.")] = False,
    seed: Annotated[int, typer.Option(help="Of the new parameters; they change no output before training.")] = 0,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ID", help="Then upload it to this Hub repository, its model card included.")
    ] = None,
    as_json: Json = False,
    **nsa: Any,
) -> None:
    """Make an NSA checkpoint of a dense one.

    Every weight is carried bit for bit; with the defaults the result is the dense model up to 1,024 tokens. What is not
    given is chosen as `nsa-hf plan` recommends, and said; --nsa-selector compressed is the paper's way. When it was
    stopped, the same command goes on where it was.
    """
    from nsa_hf.conversion import convert, manifest
    from nsa_hf.conversion.choices import lines_of
    from nsa_hf.conversion.sources import hub

    if push_to_hub:
        from nsa_hf.model_cards.card import render_card

        # said now, not after the conversion
        if missing := [package for package in ("jinja2", "matplotlib") if find_spec(package) is None]:
            raise NsaError(f"the model card that goes along needs {', '.join(missing)}: pip install 'nsa-hf[eval]'")
        hub.check_upload(push_to_hub)
    try:
        with result_alone(as_json):
            path = convert(
                src,
                out,
                dtype=dtype,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
                seed=seed,
                revision=revision,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
                progress=sys.stderr.isatty(),
                **options_of(nsa),
            )
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        raise
    choices, next_command = manifest.read(path)["choices"], f"nsa-hf {shlex.join(['verify', src, str(path)])}"
    uploaded = None
    with result_alone(as_json):
        print(*lines_of(choices), sep="\n")
        print(f"converted model: {path}\nnext: {next_command}")
        if push_to_hub:
            render_card(path)
            uploaded = hub.upload(path, push_to_hub)
            print(f"uploaded: {uploaded}")
    if as_json:
        show_json({"out": str(path), "choices": choices, "next": next_command, "uploaded": uploaded})


@app.command("export-dense")
def export_dense(
    out: Out,
    dense: Annotated[Path, typer.Argument(help="Folder for the dense model; new or empty.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "2GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in DENSE.")] = False,
    as_json: Json = False,
) -> None:
    """Go back to the dense family.

    Of an untrained conversion every tensor comes back bit for bit. After training the branches that were learned are
    dropped: what training measured of that is shown, and also written to DENSE/export.json.
    """
    from nsa_hf.conversion import export_dense, render_export

    with result_alone(as_json):
        report = export_dense(
            out, dense, overwrite=overwrite, max_shard_size=max_shard_size, progress=sys.stderr.isatty()
        )
    show(report, render_export, as_json)


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="Converted (or trained) model's folder.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT adapter for it, or for its dense source.")],
    out: Annotated[Path, typer.Argument(help="Folder for the merged model; new or empty.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Merge a PEFT adapter (LoRA, IA3) into a model.

    OUT is a plain model that needs no PEFT, with a manifest; whole or not there at all.
    """
    from nsa_hf.conversion import merge

    with result_alone(as_json):
        path = merge(model, adapter, out, overwrite=overwrite)
    if as_json:
        show_json({"out": str(path)})
        return
    print(f"merged model: {path}\nnext: nsa-hf verify SRC {path}, with the dense model that {model} was made from")


@app.command()
def verify(
    src: Src,
    out: Out,
    length: Annotated[int, typer.Option(help="Tokens of every text.")] = 2048,
    documents: Annotated[int, typer.Option(help="Held-out texts read.")] = 2,
    text: Annotated[list[Path] | None, typer.Option(help="A text file to read instead; may be repeated.")] = None,
    compare_selectors: Annotated[
        bool,
        typer.Option("--compare-selectors", help="Measure the same weights with the other choice of blocks as well."),
    ] = False,
    device: Device = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Prove what OUT kept of SRC.

    Weights kept, largest logit difference in the exact range, and perplexity and KL by position beyond it; also written
    to OUT/verify.json. Exit code 1 when an untrained conversion is not exact, or a trained model is not as recorded.
    """
    from nsa_hf.conversion import render_verify, verify

    from .load import pick_device

    texts = [(path.name, read_text(path)) for path in text] if text else None
    with result_alone(as_json):
        result = verify(
            src,
            out,
            length=length,
            documents=len(texts) if texts else documents,
            texts=texts,
            compare_selectors=compare_selectors,
            device=pick_device(device),
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            progress=sys.stderr.isatty(),
        )
    show(result, render_verify, as_json)
    if result["exact"] is False:
        raise typer.Exit(FAILED)


@app.command(epilog="Settings:\n\n\b\n" + settings_help())
def train(
    run: Annotated[Path, typer.Argument(help="The run's settings, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a converted model further.

    By the KL to the model's dense self, and more where settings ask for it. A run that was stopped goes on when it is
    started again.

    On several GPUs: accelerate launch -m nsa_hf.recipes.train RUN.yaml KEY=VALUE
    """
    config = load_run_config(run, overrides or [])
    from .training.folder import read_result
    from .training.loop import train

    with result_alone(as_json):
        out = train(config)
    if as_json:
        show_json({"out": str(out), **read_result(out)})


@app.command("eval")
def evaluate(
    out: Out,
    suite: Annotated[str, typer.Option(help="ppl, needle, ruler, lm-eval; several with commas.")] = "ppl",
    text: Annotated[str, typer.Option(help="stdlib, a text file, a folder, a .jsonl or .parquet.")] = "stdlib",
    length: Annotated[int, typer.Option(help="ppl: tokens of every text.")] = 2048,
    documents: Annotated[int, typer.Option(help="ppl: held-out texts read.")] = 2,
    lengths: Annotated[
        str | None,
        typer.Option(help="needle, ruler: tokens of the prompts. [default: 4096,8192,16384,32768, as far as they fit]"),
    ] = None,
    depths: Annotated[int, typer.Option(help="needle: places of the needle.")] = 10,
    samples: Annotated[int, typer.Option(help="needle, ruler: prompts for each place, task and length.")] = 2,
    rope_scaling: Annotated[
        str | None, typer.Option(metavar="KIND:FACTOR", help="For longer texts, in this evaluation only: yarn:4.")
    ] = None,
    ruler_data: Annotated[
        Path | None, typer.Option(help="ruler: rows in its own format, a .jsonl or a folder, instead of made ones.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval: its tasks, with commas.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="lm-eval: a folder with more tasks, in YAML.")] = None,
    few_shot: Annotated[int | None, typer.Option(help="lm-eval: examples before each question.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="lm-eval: questions of each task at most; ruler: rows of each file.")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    trust_remote_code: TrustTokenizer = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, needles, RULER, lm-eval.

    Sparse beside the same weights run dense; also written to OUT/eval.json, which keeps what other suites measured.
    """
    from .evaluation.subject import Settings
    from .evaluation.suites import evaluate, render
    from .load import pick_device

    suites = list(dict.fromkeys(split(suite)))
    settings = Settings(
        text=text,
        documents=documents,
        length=length,
        lengths=numbers(lengths, "--lengths"),
        depths=depths,
        samples=samples,
        rope_scaling=rope_scaling,
        ruler_data=ruler_data,
        tasks=tuple(split(tasks)),
        include_path=include_path,
        few_shot=few_shot,
        limit=limit,
    )
    with result_alone(as_json):
        result = evaluate(
            out, suites, settings, device=pick_device(device), dtype=dtype, trust_remote_code=trust_remote_code
        )
    show(result, lambda measured: render(measured, suites, out), as_json)


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
    from .inspection import inspect_model, render_inspection
    from .load import pick_device

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
    from .generate import generate_text
    from .load import pick_device

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
def serve(context: typer.Context, out: Out) -> None:
    """Serve OUT over HTTP, compatible with OpenAI's API.

    It is `transformers serve` with the sparse classes known; further options are that command's: --host, --port,
    --device, --dtype, --compile, ... Needs `pip install 'nsa-hf[serve]'`.
    """
    from .serve import serve_model

    serve_model(out, context.args)


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
    from .demo import run_demo

    with result_alone(as_json):
        result = run_demo(work, run, context.obj)
    if as_json:
        show_json(result)
