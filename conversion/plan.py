"""What a conversion would do, before it is done: layers, parameters, cache, and from which length it pays.

    from nsa_hf.conversion import plan
    plan("path/to/llama", topk=16)["kv_cache"]

Needs the config only: no weights are loaded (of a local safetensors folder the headers are checked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from nsa_hf.fields import NSA_FIELDS
from nsa_hf.kernels import Sizes, n_blocks

from .files.loading import reading, transformers_progress
from .layout import Layout, dtype_name, layout_of, nsa_options, parse_dtype, target_config
from .sources import open_source
from .sources.folder import SafetensorsSource

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def plan(
    src: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    lengths: Sequence[int] = LENGTHS,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Describes a conversion.

    Args:
        src, dtype, revision, allow_pickle, trust_remote_code, options: as `convert` takes them.
        lengths: tokens at which to count the cache's bytes.

    Returns:
        A JSON-able dict:
        - `source`: name, kind, model_type, dtype; `options`: every `nsa_*` field; `exact_up_to`: tokens;
          `rope_scaling`: None, or what both the source and the result then have.
        - `training`: None, or why `nsa-hf train` will refuse the result.
        - `layers`: per layer `becomes` (nsa, dense, or other: sliding, linear, ...), `why`, `parameters_added`, and in
          `keeps` the most tokens that its cache holds (None: all).
        - `parameters`: `dense`, `added`, `added_share`; `bytes`: of the weights, `dense` and `nsa`.
        - `kv_cache`: per length, of one sequence in the model's dtype over all layers: bytes kept (`dense_bytes`,
          `nsa_bytes`: full K and V plus the compressed entries) and bytes read for one more token (`dense_read_bytes`,
          `nsa_read_bytes`, and their ratio `read_less`).
        - `pays_from`: tokens from which attention takes fewer FLOPs, None if never: `one_token` (the token at that
          length), `whole_text` (all tokens up to it), and `formula`.

    Raises:
        NsaError: the source or an option is not as it must be.
    """
    with transformers_progress(False):
        source = open_source(src, revision, False, allow_pickle, trust_remote_code)
        with reading(source.folder / "config.json"):
            config = target_config(source.config, options, parse_dtype(dtype))
            layout = layout_of(config)
        if isinstance(source, SafetensorsSource) and source.has_weights:
            layout.as_stored(source.table).check(source.table, str(src))
    dense, added = (sum(map(_numel, shapes.values())) for shapes in (layout.dense, layout.added))
    layers = [_layer(config, layout, index) for index in range(config.num_hidden_layers)]
    return {
        "source": {
            "name": str(src),
            "kind": source.kind,
            "model_type": source.config.model_type,
            "dtype": dtype_name(source.config.dtype),
        },
        "model_type": config.model_type,
        "dtype": dtype_name(config.dtype),
        "options": {name: getattr(config, name) for name in NSA_FIELDS},
        "exact_up_to": config.nsa_sizes.exact_tokens,
        "rope_scaling": nsa_options(options).get("rope_scaling"),
        "training": training_hindrance(config),
        "layers": layers,
        "parameters": {"dense": dense, "added": added, "added_share": added / dense},
        "bytes": {"dense": dense * config.dtype.itemsize, "nsa": (dense + added) * config.dtype.itemsize},
        "kv_cache": [kv_cache(config, layers, length) for length in lengths],
        "pays_from": pays_from(config.nsa_sizes),
    }


def training_hindrance(config: PreTrainedConfig) -> str | None:
    """Why a sparse model of this config cannot be trained, None when it can; no weight of attention can be dropped."""
    for name in ("attention_dropout", "attn_pdrop"):
        if share := getattr(config, name, None):
            return (
                f"{name} is {share}, and sparse attention has no dropout: set it to 0 in the source's config.json and "
                "convert again"
            )
    return None


def _layer(config: PreTrainedConfig, layout: Layout, index: int) -> dict[str, Any]:
    kind = (getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)[index]
    keeps: int | None = None
    if config.is_nsa_layer(index):
        becomes, why = "nsa", "full attention"
    elif kind == "full_attention":
        becomes, why = "dense", "named in nsa_dense_layers"
    elif kind == "sliding_attention":
        becomes, why, keeps = "other", f"{kind}: keeps its own attention", config.sliding_window - 1
    else:
        becomes, why, keeps = "other", f"{kind}: no attention, stays as it is", 0
    new = sum(_numel(shape) for name, shape in layout.added.items() if f".layers.{index}." in name)
    return {"layer": index, "becomes": becomes, "why": why, "parameters_added": new, "keeps": keeps}


def read_tokens(sizes: Sizes, length: int) -> int:
    """Cache entries that one query reads at `length` tokens, its own counted.

    They are the compressed blocks (about S/d), the selected blocks' min(S, n*l') tokens and the window's min(S, w).
    """
    selected = min(length, sizes.exact_tokens)
    return n_blocks(length, sizes.kernel_size, sizes.kernel_stride) + selected + min(length, sizes.window_size)


def kv_cache(config: PreTrainedConfig, layers: Iterable[dict[str, Any]], length: int) -> dict[str, Any]:
    """Bytes of the cache, kept and read per decoded token, of one sequence of `length` tokens; see `plan`."""
    sizes = config.nsa_sizes
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None) or config.hidden_size // heads
    # one token's key and value in one layer
    entry = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim * config.dtype.itemsize
    layers = list(layers)
    nsa = sum(layer["becomes"] == "nsa" for layer in layers)
    entries = n_blocks(length, sizes.kernel_size, sizes.kernel_stride)
    kept = nsa * entries
    if config.nsa_branch_kv == "independent":
        # the tokens of the block that is not complete, and the window's
        kept += nsa * (length - entries * sizes.kernel_stride + min(length, sizes.window_size))
    dense = sum(length if layer["keeps"] is None else min(length, layer["keeps"]) for layer in layers)
    read = dense + nsa * (read_tokens(sizes, length) - length)
    return {
        "length": length,
        "dense_bytes": dense * entry,
        "nsa_bytes": (dense + kept) * entry,
        "dense_read_bytes": dense * entry,
        "nsa_read_bytes": read * entry,
        "read_less": dense / read,
    }


def pays_from(sizes: Sizes) -> dict[str, Any]:
    """From which length an NSA layer's attention takes fewer FLOPs than a dense one's.

    Both cost the same per query head and entry read, so entries are compared: S for dense, `read_tokens` for NSA. The
    gate and the compression come on top; they do not grow with the length.
    """
    never = {"one_token": None, "whole_text": None}
    formula = "S > blocks(S) + min(S, n*l') + min(S, w), blocks(S) = (S - l)//d + 1"
    if sizes.kernel_stride == 1:  # as many compressed entries as tokens
        return {**never, "formula": formula}
    # Up to n*l' or w tokens one branch alone costs as much as dense; beyond both, what a token gains only rises.
    start = max(sizes.exact_tokens, sizes.window_size)
    one_token = _first(start, lambda length: length > read_tokens(sizes, length))
    whole_text = _first(one_token, lambda length: length * (length + 1) // 2 > read_tokens_of_text(sizes, length))
    return {"one_token": one_token, "whole_text": whole_text, "formula": formula}


def read_tokens_of_text(sizes: Sizes, length: int) -> int:
    """The sum of `read_tokens` over the lengths 1 .. `length`: what all queries of a text read."""

    def capped(most: int) -> int:
        top = min(length, most)
        return top * (top + 1) // 2 + (length - top) * most

    stride = sizes.kernel_stride
    # lengths with at least one block; of these, `stride` in a row have the same number
    some = max(0, length - sizes.kernel_size + 1)
    full, rest = divmod(some, stride)
    blocks = stride * full * (full + 1) // 2 + rest * (full + 1)
    return blocks + capped(sizes.exact_tokens) + capped(sizes.window_size)


def _first(start: int, holds: Callable[[int], bool]) -> int:
    """The first length from `start` on for which `holds`, which once true stays true."""
    low, high = start - 1, start
    while not holds(high):
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def render_plan(plan: dict[str, Any]) -> RenderableType:
    """The plan as rich tables, for `rich.print`."""
    source, parameters, pays = plan["source"], plan["parameters"], plan["pays_from"]
    facts = Table(title=f"{escape(source['name'])}: {source['model_type']} to {plan['model_type']}", show_header=False)
    facts.add_row("Source", f"{source['kind']}, {source['dtype']}" + _if_other(plan["dtype"], source["dtype"]))
    facts.add_row("Is the dense model up to", _exactness(plan))
    facts.add_row("Parameters", f"{parameters['dense']:,} + {parameters['added']:,} ({parameters['added_share']:.1%})")
    facts.add_row("Weights", f"{_bytes(plan['bytes']['dense'])} to {_bytes(plan['bytes']['nsa'])}")
    facts.add_row(
        "Attention FLOPs pay from", f"{_tokens(pays['one_token'])} (one token), {_tokens(pays['whole_text'])} (text)"
    )
    if plan["training"]:
        facts.add_row("Training", f"refused: {escape(plan['training'])}")
    layers = Table(title="Layers")
    for column in ("layers", "become", "why", "parameters added to each"):
        layers.add_column(column)
    for (becomes, why, new), run in groupby(
        plan["layers"], lambda row: (row["becomes"], row["why"], row["parameters_added"])
    ):
        indices = [row["layer"] for row in run]
        span = f"{indices[0]} - {indices[-1]}" if len(indices) > 1 else str(indices[0])
        layers.add_row(span, becomes, why, f"{new:,}")
    cache = Table(title="KV cache of one sequence")
    for column in ("tokens", "dense", "NSA", "read per token: dense", "NSA", "times less"):
        cache.add_column(column, justify="right")
    for row in plan["kv_cache"]:
        sizes = (_bytes(row[key]) for key in ("dense_bytes", "nsa_bytes", "dense_read_bytes", "nsa_read_bytes"))
        cache.add_row(f"{row['length']:,}", *sizes, f"{row['read_less']:.2f}")
    return Group(facts, layers, cache)


def _exactness(plan: dict[str, Any]) -> str:
    if plan["options"]["nsa_gate"] == "sigmoid":
        return "nowhere: nsa_gate=sigmoid starts with the paper's gates, for training from scratch"
    scaling = plan["rope_scaling"]
    alike = f", with its RoPE scaled alike ({scaling['rope_type']}, factor {scaling['factor']:g})" if scaling else ""
    return _tokens(plan["exact_up_to"]) + alike


def _if_other(dtype: str, source: str) -> str:
    return f", rounded to {dtype}" if dtype != source else ""


def _tokens(count: int | None) -> str:
    return "no length" if count is None else f"{count:,} tokens"


def _bytes(count: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
