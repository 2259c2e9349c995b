"""What a conversion chooses where its user does not: how blocks are scored, and whether there is a compressed branch.

There are two whole ways. By channels: an index scores the blocks, and there is no compressed branch. That starts
nearest to the dense model, so it is the recommendation. By compressed keys: the paper's way, made to be trained.

1. An option that is given is never changed.
2. Options that only an index has a use for (`INDEX`) mean channels.
3. Otherwise options that only the compressed branch or the paper's gates have a use for (`PAPER`) mean the paper's way.
4. Otherwise it is channels, or the paper's way where the family's rotation is none of which channels can be found.

There is a compressed branch with the paper's way, and where an option of `PAPER` is given beside channels. How many
blocks there are and which layers stay dense does not depend on any of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from transformers import PreTrainedConfig

from .channels import slowest_channels
from .errors import NotPlain
from .fields import NSA_FIELDS

Options = Mapping[str, Any]
Test = Callable[[Any], bool]


def always(value: Any) -> bool:
    """For options that say something whatever their value is."""
    return True


# What only an index has a use for, and what only the compressed branch or a start that is not dense; by which values.
INDEX: dict[str, Test] = {
    "nsa_selector_dim": always,
    "nsa_selector_channels": always,
    "nsa_selector_bits": always,
    "nsa_compression": lambda kind: kind == "none",
}
PAPER: dict[str, Test] = {
    "nsa_compression": lambda kind: kind != "none",
    "nsa_compression_dim": always,
    "nsa_kernel_size": always,
    "nsa_kernel_stride": always,
    "nsa_rope_order": always,
    "nsa_branch_kv": lambda kind: kind != "shared",
    "nsa_gate": lambda kind: kind == "sigmoid",
    "nsa_gate_blend": bool,
}
ASKED = "asked for"
# Of an index's keys: half of the bytes of 16, and no loss that was measured.
BITS = 8


@dataclass(frozen=True)
class Choice:
    """One decision of a conversion.

    Attributes:
        fields: the `nsa_*` fields that it sets, by name.
        given: whether the user gave any of it; the rest is as it is otherwise.
        why: the reason, one line.
        hint: what was measured of it on other models, one line; empty where nothing was.
    """

    fields: Mapping[str, Any]
    given: bool
    why: str
    hint: str = ""


def recommend(dense: PreTrainedConfig, given: Options) -> dict[str, Choice]:
    """What a conversion sets where nothing is given, and why.

    Args:
        dense: the source's config, of a supported family.
        given: `nsa_*` fields that the user gave (None: not given). They stay as they are, right or wrong: the config's
            rules check them.

    Returns:
        The choices by name: `selector`, `compression`, `blocks`, `dense_layers`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    selector = selector_choice(dense, given)
    return {
        "selector": selector,
        "compression": compression_choice(selector.fields["nsa_selector"], given),
        "blocks": blocks_choice(given),
        "dense_layers": dense_layers_choice(given),
    }


def chosen_fields(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """All fields that choices set, by name."""
    return {name: value for choice in choices.values() for name, value in choice.fields.items()}


def selector_choice(dense: PreTrainedConfig, given: Options) -> Choice:
    """What scores blocks: by the rule of this module. An index has keys of `BITS` bits where nothing else is given."""
    index = {"nsa_selector_bits": BITS, **of_these(given, "nsa_selector_dim", "nsa_selector_channels")}
    index |= of_these(given, "nsa_selector_bits")
    if "nsa_selector" in given:
        selector = given["nsa_selector"]
        return Choice({"nsa_selector": selector, **(index if selector == "channels" else {})}, True, ASKED)
    if names := speaking(given, INDEX):
        fields = {"nsa_selector": "channels", **index}
        return Choice(fields, False, f"{names} is for blocks that an index scores")
    if names := speaking(given, PAPER):
        why = f"{names} belongs to the paper's way (with nsa_selector=channels an index would score the blocks)"
        return Choice({"nsa_selector": "compressed"}, False, why)
    try:
        channels = slowest_channels(dense, None)
    except NotPlain as reason:
        why = f"which channels RoPE turns slowest could not be found, so blocks are chosen as in the paper: {reason}"
        warnings.warn(f"nsa_selector is compressed: {why}", stacklevel=2)
        return Choice({"nsa_selector": "compressed"}, False, why)
    count = max(map(len, channels), default=0)
    found = {"nsa_selector_dim": count or None, "nsa_selector_channels": channels}
    fields = {"nsa_selector": "channels", **index, **found}
    why = "starts much nearer to the dense model than compressed keys"
    hint = "untrained, perplexity at 4k-8k rises by 1.4 % in SmolLM2-135M; 8 bits lose nothing that was measured"
    return Choice(fields, False, why, hint)


def compression_choice(selector: str, given: Options) -> Choice:
    """Whether there is a compressed branch, and of which kind."""
    none = {"nsa_compression": "none", **unused_sizes(given)}
    if "nsa_compression" in given:
        fields = none if given["nsa_compression"] == "none" else of_these(given, "nsa_compression")
        return Choice(fields, True, ASKED)
    kind = NSA_FIELDS["nsa_compression"].default
    if selector != "channels":
        return Choice({"nsa_compression": kind}, False, "blocks are scored by it")
    if names := speaking(given, PAPER):
        return Choice({"nsa_compression": kind}, False, f"{names} is for a model with one")
    return Choice(none, False, "blocks are chosen without it: nothing to keep, read and train")


def unused_sizes(given: Options) -> dict[str, int]:
    """Sizes of entries that there are not, where the usual ones do not fit the blocks: the rules hold for them too."""
    names, block = ("nsa_kernel_size", "nsa_kernel_stride"), given.get("nsa_block_size")
    if of_these(given, *names) or not isinstance(block, int) or block < 1:
        return {}
    usual: list[Any] = [NSA_FIELDS[name].default for name in names]
    size = gcd(usual[0], block)
    fitting = [size, gcd(usual[1], size)]
    return {} if fitting == usual else dict(zip(names, fitting, strict=True))


def blocks_choice(given: Options) -> Choice:
    """How many blocks, of how many tokens."""
    names = ("nsa_topk", "nsa_block_size")
    fields = {name: given.get(name, NSA_FIELDS[name].default) for name in names}
    if any(name in given for name in names):
        return Choice(fields, True, ASKED)
    hint = "by an earlier way of scoring, half as many again halved the KL of SmolLM2-135M and Gemma 3 270M"
    return Choice(fields, False, "the paper's", hint)


def dense_layers_choice(given: Options) -> Choice:
    """Which layers keep dense attention."""
    if "nsa_dense_layers" in given:
        return Choice(of_these(given, "nsa_dense_layers"), True, ASKED)
    hint = "three of SmolLM2-135M's 30: 0.2 % less perplexity at 4k-8k"
    return Choice({"nsa_dense_layers": []}, False, "leaving the first ones dense gains little", hint)


def of_these(given: Options, *names: str) -> dict[str, Any]:
    """The options of these names that are given."""
    return {name: given[name] for name in names if name in given}


def speaking(given: Options, tests: Mapping[str, Test]) -> str:
    """The names of the given options that say something by these tests, as text; empty without any."""
    return " and ".join(f"{name}={given[name]}" for name, test in tests.items() if name in given and test(given[name]))
