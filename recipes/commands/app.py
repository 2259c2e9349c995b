"""What the commands share: the program itself, and options that several have."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from nsa_hf import __version__

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
