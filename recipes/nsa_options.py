"""The `--nsa-*` options of `plan` and `convert`: one per `nsa_*` field of the config, with and without `nsa-`.

Written out, not read from the config, so that `--help` need not import PyTorch; a test holds both equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from nsa_hf.errors import NsaError

# field: (type, default, help)
NSA_OPTIONS: dict[str, tuple[type, Any, str]] = {
    "nsa_kernel_size": (int, 32, "tokens of a compression block [l]"),
    "nsa_kernel_stride": (int, 16, "tokens between two compression blocks' starts [d]"),
    "nsa_block_size": (int, 64, "tokens of a selection block [l']"),
    "nsa_topk": (int, 16, "selected blocks per query, the forced ones counted [n]"),
    "nsa_init_blocks": (int, 1, "blocks at the start of the text that are always selected"),
    "nsa_local_blocks": (int, 2, "the query's own block and those just before it, always selected"),
    "nsa_window_size": (int, 512, "tokens of the sliding window, the query's own counted [w]"),
    "nsa_compression": (str, "mlp", "how a block becomes one key and one value: mean, linear or mlp"),
    "nsa_compression_dim": (int, 128, "width of the compression MLP"),
    "nsa_rope_order": (str, "post", "keys are compressed after RoPE (post) or before (pre)"),
    "nsa_branch_kv": (str, "shared", "one K and V for all branches (shared) or one each (independent)"),
    "nsa_gate": (str, "residual", "residual and blend start exactly dense; sigmoid is the paper's"),
    "nsa_gate_dim": (int, 64, "width of the gate's MLP"),
    "nsa_gate_blend": (float, 0.0, "with nsa_gate=blend: the share of the paper's gates, from 0 (dense) to 1"),
    "nsa_dense_layers": (str, None, "layers that keep dense attention, as 0,1,-1; negative counts from the end"),
}
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
    for name, (kind, default, help) in NSA_OPTIONS.items():
        long = "--" + name.replace("_", "-")
        shown = typer.Option(
            long, long.replace("--nsa-", "--"), help=f"{help} [default: {default}]", show_default=False
        )
        added.append(parameter(name, Annotated[kind | None, shown]))
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
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise NsaError(f"cannot read the options in {path}: {error}") from error
    if not isinstance(found, dict):
        raise NsaError(f"{path} must hold options such as `topk: 32`, one a line, got {type(found).__name__}")
    options: dict[str, Any] = {}
    for name, value in found.items():
        full = f"nsa_{name}" if f"nsa_{name}" in NSA_OPTIONS else str(name)
        if full in options:
            raise NsaError(f"{path} gives {full} twice, with and without its prefix: give it once")
        options[full] = value
    return options


def parse_layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise NsaError(f"--nsa-dense-layers is a list such as 0,1,-1, got {text!r}") from None
