"""What a conversion chose, why and at what cost: in a plan, in the manifest, and in lines to read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from nsa_hf.recommend import Choice

from .costs import kv_cache

Record = dict[str, Any]
NAMED = ("nsa_selector", "nsa_compression", "nsa_topk", "nsa_block_size", "nsa_dense_layers")
# Tokens in the cache at which costs are counted.
LENGTH = 65_536
TITLES = {
    "selector": "blocks are scored by",
    "compression": "compressed branch",
    "blocks": "selected blocks",
    "dense_layers": "layers left dense",
}


def records(choices: Mapping[str, Choice], config: PreTrainedConfig) -> dict[str, Record]:
    """Choices as JSON can hold them.

    Args:
        choices: of `recommend`.
        config: the converted model's, made with them.

    Returns:
        By name: `what` and `which`, in words; `options`, the fields as they are in the config, without the list of
        channels; `given`, whether the user gave any of them; `why`; `hint`, what was measured on other models; `cost`,
        see `costs_of`.
    """
    costs = costs_of(config)
    made = {}
    for name, choice in choices.items():
        options = {field: getattr(config, field) for field in shown(choice.fields)}
        made[name] = {
            "what": TITLES[name],
            "which": in_words(options),
            "options": options,
            "given": choice.given,
            "why": choice.why,
            "hint": choice.hint,
            "cost": costs[name],
        }
    return made


def costs_of(config: PreTrainedConfig, length: int = LENGTH) -> dict[str, dict[str, int]]:
    """What each choice costs, in bytes, of one sequence over all layers with full attention.

    Args:
        config: the converted model's.
        length: tokens in the cache.

    Returns:
        By the choices' names: `length`; `kept_bytes`, beyond keys and values; `read_bytes`, for one more token.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    layers = [{"becomes": "nsa" if config.is_nsa_layer(layer) else "dense", "keeps": None} for layer in full]
    without_index = copy.copy(config)
    without_index.nsa_selector = "compressed"
    cache, plain = (kv_cache(one, layers, length) for one in (config, without_index))
    kept = plain["nsa_bytes"] - plain["dense_bytes"]
    token = plain["dense_bytes"] // (len(layers) * length)  # a key and a value in one layer
    sparse, sizes = sum(layer["becomes"] == "nsa" for layer in layers), config.nsa_sizes
    dense = (len(layers) - sparse) * length * token
    blocks, window = (sparse * token * min(length, most) for most in (sizes.exact_tokens, sizes.window_size))
    costs = {
        "selector": (cache["nsa_bytes"] - plain["nsa_bytes"], cache["nsa_read_bytes"] - plain["nsa_read_bytes"]),
        "compression": (kept, plain["nsa_read_bytes"] - dense - blocks - window),
        "blocks": (0, blocks),
        "dense_layers": (0, dense),
    }
    return {name: {"length": length, "kept_bytes": keep, "read_bytes": read} for name, (keep, read) in costs.items()}


def shown(fields: Mapping[str, Any]) -> list[str]:
    """The names of the fields that say what was chosen: with the selector an index's, but for its list of channels."""
    names = [name for name in fields if name in NAMED]
    return [*names, "nsa_selector_dim", "nsa_selector_bits"] if "nsa_selector" in names else names


def in_words(options: Mapping[str, Any]) -> str:
    """A choice's fields in a few words."""
    if "nsa_selector" in options:
        index = options["nsa_selector"] == "channels"
        bits = " in 8 bits" if options["nsa_selector_bits"] == 8 else ""
        return options["nsa_selector"] + (f", {options['nsa_selector_dim']} of each head{bits}" if index else "")
    if "nsa_topk" in options:
        return f"{options['nsa_topk']} of {options['nsa_block_size']} tokens"
    (value,) = options.values()
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def lines_of(choices: Mapping[str, Record]) -> Iterator[str]:
    """One line for each choice: what, and why."""
    for record in choices.values():
        yield f"{record['what']}: {record['which']} ({record['why']})"
