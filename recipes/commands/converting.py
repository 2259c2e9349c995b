"""A dense checkpoint to a sparse one, the proof, and back."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from nsa_hf.errors import NsaError

from ..exit_codes import FAILED
from ..measuring import measuring, save_plan, timing_of
from ..nsa_options import options_of, with_nsa_options
from ..terminal import read_text, result_alone, show, show_json
from .app import AllowPickle, Device, Dtype, Json, Out, Revision, Src, TrustRemoteCode, app


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
    time: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Time one layer's attention here: 4096,16384,65536.")
    ] = None,
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
    and layer by layer. With --time also from which length it is faster than dense attention on this machine.
    """
    from nsa_hf.conversion import plan, render_plan

    options = {**options_of(nsa), "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    timing = timing_of(time, device)
    texts = measuring(measure, measure_tokens, measure_documents, device if timing is None or measure else None, save)
    with result_alone(as_json):
        planned = plan(src, dtype=dtype, revision=revision, measure=texts, timing=timing, **options)
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

    from ..load import pick_device

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
