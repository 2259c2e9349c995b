"""A converted model trained and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..terminal import numbers, result_alone, show, show_json, split
from ..training.config import load_run_config, settings_help
from .app import Device, Json, Out, TrustTokenizer, app


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
    from ..training.folder import read_result
    from ..training.loop import train

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
    from ..evaluation.subject import Settings
    from ..evaluation.suites import evaluate, render
    from ..load import pick_device

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
