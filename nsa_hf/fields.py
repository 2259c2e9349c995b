"""The `nsa_*` fields of a model's config: types, defaults, choices and help texts. Their other rules: config.py.

The options of `nsa-hf convert` are made from them. This module imports neither PyTorch nor Transformers, for which
`--help` would have to wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from .errors import NsaError
from .registration import PREFIX

# Written into configs; older formats load, newer ones are refused.
NSA_FORMAT = 2


def option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A field of the config that is also an option of the command line.

    Args:
        default: its value when it is not given.
        text: what it is, for `--help`; it names every choice.
        choices: the values it may have; none listed: its rule is in config.py.
    """
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(kw_only=True, repr=False, eq=False)
class NsaFields:
    """What Native Sparse Attention adds to a dense family's config; the paper's letters in brackets."""

    nsa_kernel_size: int = option(32, "tokens of a compression block [l]")
    nsa_kernel_stride: int = option(16, "tokens between two compression blocks' starts [d]")
    nsa_block_size: int = option(64, "tokens of a selection block [l']")
    nsa_topk: int = option(16, "selected blocks per query, the forced ones counted [n]")
    nsa_init_blocks: int = option(1, "blocks at the start of the text that are always selected")
    nsa_local_blocks: int = option(2, "the query's own block and those just before it, always selected")
    nsa_window_size: int = option(512, "tokens of the sliding window, the query's own counted [w]")
    nsa_selector: str = option(
        "compressed",
        "what scores blocks: compressed keys (compressed), or the channels that RoPE turns slowest (channels)",
        ("compressed", "channels"),
    )
    nsa_selector_dim: int | None = option(None, "with nsa_selector=channels: how many; none is half of a head's")
    nsa_selector_channels: list[list[int]] | None = option(
        None, "with nsa_selector=channels: each layer's, found in the family's own attention if none are given"
    )
    nsa_selector_bits: int = option(
        16, "with nsa_selector=channels: bits of the index's keys, 16 (as the model's) or 8"
    )
    nsa_compression: str = option(
        "mlp",
        "how a block becomes one key and one value: mean, linear or mlp; none is no compressed branch, with "
        "nsa_selector=channels",
        ("mean", "linear", "mlp", "none"),
    )
    nsa_compression_dim: int = option(128, "width of the compression MLP")
    nsa_rope_order: str = option("post", "keys are compressed after RoPE (post) or before (pre)", ("post", "pre"))
    nsa_branch_kv: str = option(
        "shared", "one K and V for all branches (shared) or one each (independent)", ("shared", "independent")
    )
    nsa_gate: str = option(
        "residual", "residual and blend start exactly dense; sigmoid is the paper's", ("residual", "sigmoid", "blend")
    )
    nsa_gate_dim: int = option(64, "width of the gate's MLP")
    nsa_gate_blend: float = option(0.0, "with nsa_gate=blend: the share of the paper's gates, from 0 (dense) to 1")
    nsa_dense_layers: list[int] | None = option(
        None, "layers that keep dense attention, as 0,1,-1; negative counts from the end"
    )
    nsa_format: int = option(NSA_FORMAT, "version of this set of fields")


NSA_FIELDS = {member.name: member for member in fields(NsaFields)}
# Those that a conversion finds out itself.
FOUND_FIELDS = ("nsa_format", "nsa_selector_channels")
# Those that a conversion chooses where they are not given (recommend.py); a config that lacks them has the defaults.
RECOMMENDED_FIELDS = ("nsa_selector", "nsa_selector_bits", "nsa_compression")


def full_name(option: str) -> str:
    """A field's full name: of `topk` and of `nsa_topk` it is `nsa_topk`."""
    return option if option.startswith(PREFIX) else PREFIX + option


def named_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their full names.

    Args:
        options: fields with or without the prefix.

    Raises:
        NsaError: a name that is no field (the message names the nearest), or one given with and without its prefix.
    """
    named: dict[str, Any] = {}
    for option, value in options.items():
        name = full_name(option)
        if name not in NSA_FIELDS:
            raise unknown_option(option)
        if name in named:
            raise NsaError(f"{name} is given twice, with and without its prefix: give it once")
        named[name] = value
    return named


def unknown_option(option: str, others: Iterable[str] = ()) -> NsaError:
    """The error of an option that is none: it names the nearest one, or all where none is near.

    Args:
        option: as it was given.
        others: options that may be given beside the fields.
    """
    fields_to_give = [name.removeprefix(PREFIX) for name in NSA_FIELDS if name not in FOUND_FIELDS]
    choices = [*fields_to_give, *others]
    near = get_close_matches(option.removeprefix(PREFIX), choices, n=1)
    advice = f"did you mean {near[0]}?" if near else f"choose among {', '.join(choices)}"
    return NsaError(f"unknown option {option!r}: {advice}")
