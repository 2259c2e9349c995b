"""The `--nsa-*` options of `plan` and `convert`: one per `nsa_*` field of the config, with and without `nsa-`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nsa_hf.errors import NsaError
from nsa_hf.fields import NSA_FIELDS, full_name

NSA_OPTIONS = {name: member for name, member in NSA_FIELDS.items() if name != "nsa_format"}
# A field's type, as the config writes it, on the command line; the layers are a list such as 0,1,-1.
TYPES = {"int": int, "float": float, "str": str, "list[int] | None": str}
ROPE_SCALING = typer.Option(
    "--rope-scaling",
    metavar="KIND:FACTOR",
    help="For texts longer than the source was trained on: yarn:4, linear:2 or llama3:8. It changes the dense model "
    "too: the result is exact beside the source with the same scaling.",
)
OPTIONS_FILE = typer.Option(
    "--options", metavar="FILE", help="A YAML file of these options (`topk: 32`); those on the command line win."
)


def with_nsa_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command`, which takes **nsa, an option for each entry of NSA_OPTIONS; None is one not given."""
    signature = inspect.signature(command, eval_str=True)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = []
    for name, field in NSA_OPTIONS.items():
        long = "--" + name.replace("_", "-")
        text = f"{field.metadata['help']} [default: {field.default}]"
        shown = typer.Option(long, long.replace("--nsa-", "--"), help=text, show_default=False)
        added.append(parameter(name, Annotated[TYPES[str(field.type)] | None, shown]))
    added.append(parameter("rope_scaling", Annotated[str | None, ROPE_SCALING]))
    added.append(parameter("options_file", Annotated[Path | None, OPTIONS_FILE]))
    command.__signature__ = signature.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
    return command


def parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def given(nsa: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as `convert` takes them; those on the command line win over the file's."""
    options = {name: value for name, value in nsa.items() if value is not None}
    file = options.pop("options_file", None)
    if file is not None:
        options = {**read_options(file), **options}
    if isinstance(options.get("nsa_dense_layers"), str):
        options["nsa_dense_layers"] = parse_layers(options["nsa_dense_layers"])
    return options


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file, with their full names.

    Raises:
        NsaError: it cannot be read, is not a list of settings, or gives one twice.
    """
    # here: with its package come PyTorch and Transformers, for which --help does not wait
    from nsa_hf.conversion.files.plain_yaml import read_plain

    try:
        found = read_plain(path)
    except (OSError, ValueError) as error:
        raise NsaError(f"cannot read the options in {path}: {error}") from error
    if not isinstance(found, dict):
        raise NsaError(f"{path} must hold options such as `topk: 32`, one a line, got {type(found).__name__}")
    options: dict[str, Any] = {}
    for name, value in found.items():
        full = full_name(str(name)) if full_name(str(name)) in NSA_OPTIONS else str(name)
        if full in options:
            raise NsaError(f"{path} gives {full} twice, with and without its prefix: give it once")
        options[full] = value
    return options


def parse_layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise NsaError(f"--nsa-dense-layers is a list such as 0,1,-1, got {text!r}") from None
