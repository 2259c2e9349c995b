"""What a conversion would do, before it is done: layers, parameters, cache, and from which length it pays.

    from nsa_hf.conversion import plan
    plan("path/to/llama", topk=16)["kv_cache"]

Needs the config only: no weights are loaded (of a local safetensors folder the headers are checked), unless it is to
measure as well (measure.py). It can also time attention on the machine at hand (timing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from nsa_hf.fields import NSA_FIELDS

from .choices import records
from .costs import kv_cache, pays_from, scoring_of
from .files.loading import reading, transformers_progress
from .measure import Measuring, measure_conversion, render_measured
from .options import dtype_name, nsa_options, parse_dtype, target_config
from .sources import open_source
from .sources.folder import SafetensorsSource
from .tensors import ConvertedTensors, converted_tensors
from .timing import Timing, render_timed, time_attention

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def plan(
    src: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    lengths: Sequence[int] = LENGTHS,
    measure: Measuring | None = None,
    timing: Timing | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Describes a conversion.

        >>> from nsa_hf.conversion import plan
        >>> plan("path/to/llama", topk=32)["exact_up_to"]  # tokens
        2048

    Args:
        src, dtype, revision, allow_pickle, trust_remote_code, options: as `convert` takes them.
        lengths: tokens at which to count the cache's bytes.
        measure: also measure, on these texts, what the conversion costs; the weights are loaded for it.
        timing: also time one layer's attention at these lengths, dense and sparse, on the machine at hand.

    Returns:
        A JSON-able dict:
        - `source`: name, kind, model_type, dtype; `options`: every `nsa_*` field; `exact_up_to`: tokens;
          `rope_scaling`: None, or what both the source and the result then have.
        - `choices`: what was chosen, given or recommended, with the reason and the cost (see choices.py).
        - `training`: None, or why `nsa-hf train` will refuse the result.
        - `layers`: per layer `becomes` (nsa, dense, or other: sliding, linear, ...), `why`, `parameters_added`, and in
          `keeps` the most tokens that its cache holds (None: all).
        - `parameters`: `dense`, `added`, `added_share`; `bytes`: of the weights, `dense` and `nsa`.
        - `kv_cache`: for each length, of one sequence in the model's dtype over all layers: bytes kept (`dense_bytes`,
          `nsa_bytes`: full keys and values plus the compressed entries and an index's keys) and bytes read for one more
          token (`dense_read_bytes`, `nsa_read_bytes`, and their ratio `read_less`).
        - `pays_from`: tokens from which attention takes fewer FLOPs, None if never: `one_token` (for the token at that
          length), `whole_text` (for all tokens up to it), and `formula`.
        - `measured`: None unless `measure` is given. `documents`: name and tokens of each text; `conversions`: the
          conversion itself, that with half as many channels and that with the other selector, each with its rows
          `by_position` (see compare/metrics.py) and in these the `rise` of perplexity, a share; `without_channels`: why
          none chooses by channels; `by_layer`: the KL beyond the exact range with one layer sparse and its `share` of
          their sum; `dense_layers`: the `layers` worth leaving dense, the `rule` and `why`, their `kl_share`, at
          `length` the bytes read for a token (`read_bytes`, `read_bytes_then`), all that are dense then (`option`) and
          what is left (`by_position`; None without such layers).
        - `timed`: None unless `timing` is given: milliseconds at each length, and from which one sparse attention is
          faster (see timing.py).

    Raises:
        NsaError: the source or an option is not as it must be.
    """
    with transformers_progress(False):
        source = open_source(src, revision, measure is not None, allow_pickle, trust_remote_code)
        with reading(source.folder / "config.json"):
            config, choices = target_config(source.config, options, parse_dtype(dtype))
            expected = converted_tensors(config)
        if isinstance(source, SafetensorsSource) and source.has_weights:
            expected.as_stored(source.table).check(source.table, str(src))
    dense, added = (sum(map(_numel, shapes.values())) for shapes in (expected.dense, expected.added))
    itemsize = config.dtype.itemsize
    layers = [_layer(config, expected, index) for index in range(config.num_hidden_layers)]
    scaling = nsa_options(options).get("rope_scaling")
    measured = None
    if measure is not None:
        with transformers_progress(measure.progress):
            measured = measure_conversion(source, config, layers, measure, scaling)
    said = records(choices, config)
    if measured is not None and not choices["dense_layers"].given:
        advice = measured["dense_layers"]
        option = ",".join(map(str, advice["option"]))
        worth = f"worth it, as measured: --nsa-dense-layers {option}: " if advice["layers"] else "as measured, "
        said["dense_layers"] |= {"why": worth + advice["why"], "hint": ""}
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
        "rope_scaling": scaling,
        "choices": said,
        "training": training_hindrance(config),
        "layers": layers,
        "parameters": {"dense": dense, "added": added, "added_share": added / dense},
        "bytes": {"dense": dense * itemsize, "nsa": (dense + added) * itemsize},
        "kv_cache": [kv_cache(config, layers, length) for length in lengths],
        "pays_from": pays_from(config.nsa_sizes, scoring_of(config)),
        "measured": measured,
        "timed": None if timing is None else time_attention(config, timing),
    }


def training_hindrance(config: PreTrainedConfig) -> str | None:
    """Why a sparse model of this config cannot be trained; None when it can.

    Sparse attention has no dropout.
    """
    for name in ("attention_dropout", "attn_pdrop"):
        if share := getattr(config, name, None):
            return (
                f"{name} is {share}, and sparse attention has no dropout: set it to 0 in the source's config.json and "
                "convert again"
            )
    return None


def _layer(config: PreTrainedConfig, expected: ConvertedTensors, index: int) -> dict[str, Any]:
    """What becomes of one layer, see `plan`."""
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
    new = sum(_numel(shape) for name, shape in expected.added.items() if f".layers.{index}." in name)
    return {"layer": index, "becomes": becomes, "why": why, "parameters_added": new, "keeps": keeps}


def render_plan(plan: dict[str, Any]) -> RenderableType:
    """The plan as rich tables, for `rich.print`.

    >>> from nsa_hf.conversion import plan, render_plan
    >>> tables = render_plan(plan("path/to/llama"))
    """
    source, parameters, pays = plan["source"], plan["parameters"], plan["pays_from"]
    facts = Table(title=f"{escape(source['name'])}: {source['model_type']} to {plan['model_type']}", show_header=False)
    facts.add_row("Source", _source(source, plan["dtype"]))
    facts.add_row("Is the dense model up to", _exactness(plan))
    facts.add_row("Parameters", f"{parameters['dense']:,} + {parameters['added']:,} ({parameters['added_share']:.1%})")
    facts.add_row("Weights", f"{_bytes(plan['bytes']['dense'])} to {_bytes(plan['bytes']['nsa'])}")
    facts.add_row(
        "Attention FLOPs pay from", f"{_tokens(pays['one_token'])} (one token), {_tokens(pays['whole_text'])} (text)"
    )
    if timed := plan.get("timed"):
        forward, training = (_tokens(timed["faster_from"][part]) for part in ("forward", "training"))
        facts.add_row(f"Faster on {escape(timed['device'])} from", f"{forward} (forward), {training} (training)")
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
    cache = Table(title=f"KV cache of one sequence, {plan['dtype']}")
    for column in ("tokens", "dense", "NSA", "read per token: dense", "NSA", "times less"):
        cache.add_column(column, justify="right")
    for row in plan["kv_cache"]:
        sizes = (_bytes(row[key]) for key in ("dense_bytes", "nsa_bytes", "dense_read_bytes", "nsa_read_bytes"))
        cache.add_row(f"{row['length']:,}", *sizes, f"{row['read_less']:.2f}")
    measured = [render_measured(plan["measured"])] if plan.get("measured") else []
    clocked = [render_timed(timed)] if timed else []
    return Group(facts, choices_table(plan["choices"]), layers, cache, *clocked, *measured)


def choices_table(choices: dict[str, Any]) -> Table:
    """What was chosen, why, and what it costs."""
    (length,) = {record["cost"]["length"] for record in choices.values()}
    table = Table(title="Chosen", show_lines=True)
    table.add_column("what")
    table.add_column("why")
    table.add_column(f"at {length:,} tokens")
    for record in choices.values():
        kept, read = (_bytes(record["cost"][key]) for key in ("kept_bytes", "read_bytes"))
        why = "; ".join(filter(None, (record["why"], record["hint"])))
        cost = f"keeps {kept},\nreads {read} per token"
        table.add_row(f"{record['what']}\n{record['which']}", escape(why), cost)
    return table


def _exactness(plan: dict[str, Any]) -> str:
    if plan["options"]["nsa_gate"] == "sigmoid":
        return "nowhere: nsa_gate=sigmoid starts with the paper's gates, for training from scratch"
    if plan["options"]["nsa_gate"] == "blend" and plan["options"]["nsa_gate_blend"] > 0:
        return f"nowhere: nsa_gate_blend={plan['options']['nsa_gate_blend']:g} mixes in the paper's gates"
    scaling = plan["rope_scaling"]
    alike = f", with its RoPE scaled alike ({scaling['rope_type']}, factor {scaling['factor']:g})" if scaling else ""
    return _tokens(plan["exact_up_to"]) + alike


def _source(source: dict[str, Any], dtype: str) -> str:
    """What the weights are, and what they become in this dtype."""
    said = f"{source['kind']}, {source['dtype']}"
    if dtype != source["dtype"]:
        return f"{said}, rounded to {dtype}"
    if source["kind"] == "gguf":
        return f"{said}, whatever the file's bits: --dtype bfloat16 halves weights and caches"
    return said


def _tokens(count: int | None) -> str:
    return "no length" if count is None else f"{count:,} tokens"


def _bytes(count: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
