"""The `--nsa-*` options of `plan` and `convert`: one for each `nsa_*` field of the config, with and without `nsa-`.

Names, types, defaults and help texts are those of `nsa_hf/fields.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from nsa_hf.errors import NsaError
from nsa_hf.fields import FOUND_FIELDS, NSA_FIELDS, RECOMMENDED_FIELDS, NsaFields, full_name

NSA_OPTIONS = {name: member for name, member in NSA_FIELDS.items() if name not in FOUND_FIELDS}
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
    """Gives a command an option for each entry of `NSA_OPTIONS`, and `--rope-scaling` and `--options`.

    Args:
        command: takes the options as `**nsa`, each by its name; None where it was not given.

    Returns:
        The command itself, with a signature from which Typer makes the options.
    """
    signature = inspect.signature(command, eval_str=True)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    types = get_type_hints(NsaFields)
    options = []
    for name, field in NSA_OPTIONS.items():
        long = "--" + name.replace("_", "-")
        default = "as recommended, see plan" if name in RECOMMENDED_FIELDS else field.default
        text = f"{field.metadata['help']} [default: {default}]"
        settings = typer.Option(long, long.replace("--nsa-", "--"), help=text, show_default=False)
        # a list is written as text: 0,1,-1 (see `parse_layers`)
        kind = next((kind for kind in (int, float, str) if kind in (types[name], *get_args(types[name]))), str)
        options.append(keyword(name, Annotated[kind | None, settings]))
    options.append(keyword("rope_scaling", Annotated[str | None, ROPE_SCALING]))
    options.append(keyword("options_file", Annotated[Path | None, OPTIONS_FILE]))
    command.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return command


def keyword(name: str, annotation: Any) -> inspect.Parameter:
    """A parameter of a command that is None where it is not given."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def options_of(nsa: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, on the command line or in the file of `--options`.

    Args:
        nsa: what a command of `with_nsa_options` got as `**nsa`.

    Returns:
        What `conversion.convert` takes. Where both give an option, the command line's value.

    Raises:
        NsaError: the file cannot be used, or the layers are not a list of whole numbers.
    """
    options = {name: value for name, value in nsa.items() if value is not None}
    file = options.pop("options_file", None)
    if file is not None:
        options = {**read_options(file), **options}
    if isinstance(options.get("nsa_dense_layers"), str):
        options["nsa_dense_layers"] = parse_layers(options["nsa_dense_layers"])
    return options


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by their full names.

    Raises:
        NsaError: it cannot be read, is not a list of settings, or gives one twice.
    """
    # here: with its package come PyTorch and Transformers, for which --help does not wait
    from nsa_hf.conversion.files.plain_yaml import read_plain

    try:
        content = read_plain(path)
    except (OSError, ValueError) as error:
        raise NsaError(f"cannot read the options in {path}: {error}") from error
    if not isinstance(content, dict):
        raise NsaError(f"{path} must hold options such as `topk: 32`, one a line, got {type(content).__name__}")
    options: dict[str, Any] = {}
    for name, value in content.items():
        full = full_name(str(name)) if full_name(str(name)) in NSA_OPTIONS else str(name)
        if full in options:
            raise NsaError(f"{path} gives {full} twice, with and without its prefix: give it once")
        options[full] = value
    return options


def parse_layers(text: str) -> list[int]:
    """The layers in a text such as "0,1,-1".

    Raises:
        NsaError: it has something else than whole numbers.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise NsaError(f"--nsa-dense-layers is a list such as 0,1,-1, got {text!r}") from None
