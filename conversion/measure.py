"""What a conversion would cost a model on a text, nothing trained and nothing written: `plan(src, measure=...)`.

    from nsa_hf.conversion import Measuring, plan
    plan("path/to/llama", measure=Measuring([("a name", text)]))["measured"]

The source is loaded once, in float32. Sparse models are built on its weights, which they share. Beyond the exact range,
where nothing differs, it measures:
- perplexity and KL to dense by position, of the conversion, of fewer channels, and of the other selector;
- the KL with a single layer sparse, for every layer; by that, which layers are worth leaving dense.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from nsa_hf.errors import NotPlain, NsaError
from nsa_hf.families import family_of
from nsa_hf.heads import check_next_token
from nsa_hf.in_memory import on_same_weights
from nsa_hf.model_cards.escaping import figure

from .compare.metrics import Accumulator, position_edges
from .compare.models import compare_models, final_states
from .compare.resumed import resumable
from .compare.selectors import other_selector, selector_name
from .compare.texts import provenance
from .compare.tokens import Window, has_tokenizer, longest_windows
from .costs import kv_cache
from .rope import scale_model
from .sources import Source
from .verify import check_whole_number

# A layer is worth being left dense if its KL is so many times the median layer's,
STANDS_OUT = 4
# and its share of all layers' KL so many times the share by which the bytes grow that one more token reads
WORTH = 2
# at this length.
LENGTH = 65536
# With one layer sparse, logits are compared at about so many positions of a text: a head is as much work as layers are.
POSITIONS = 1024


@dataclass(frozen=True)
class Measuring:
    """What a conversion is measured on.

        >>> from nsa_hf.conversion import Measuring, plan
        >>> texts = [("mine", "word after word, " * 40)]
        >>> planned = plan("path/to/llama", measure=Measuring(texts, tokens=400, documents=1), topk=4)
        >>> planned["measured"]["documents"]
        [{'name': 'mine', 'tokens': 400}]

    Attributes:
        texts: (name, text) pairs, read as far as they are needed.
        tokens: of each text; fewer where no text has so many, or the model no such position.
        documents: texts at most.
        device: where the models run.
        progress: show a bar on standard error.
    """

    texts: Iterable[tuple[str, str]]
    tokens: int = 4096
    documents: int = 2
    device: str | torch.device = "cpu"
    progress: bool = False


def measure_conversion(
    source: Source,
    config: Any,
    layers: Sequence[dict[str, Any]],
    how: Measuring,
    scaling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures a conversion.

    Args:
        source: the dense model, its weights there.
        config: the converted model's.
        layers: what `plan` says of each.
        how: the texts and where to run.
        scaling: RoPE scaling that the conversion adds, see rope.py.

    Returns:
        See `measured` in what `plan` returns.

    Raises:
        NsaError: the source is no language model, no layer would be sparse, there is no tokenizer, or the texts are
            too short.
    """
    began = time.perf_counter()
    check_next_token(config, source.name)
    check_whole_number("measure_tokens", how.tokens, 2, 1 << 24)
    check_whole_number("measure_documents", how.documents, 1, 10_000)
    sparse_layers = [layer["layer"] for layer in layers if layer["becomes"] == "nsa"]
    if not sparse_layers:
        raise NsaError("no layer would be sparse, so there is nothing to measure: name fewer in nsa_dense_layers")
    texts = list(how.texts)
    windows = measured_windows(source, config, texts, how)
    configs, without = configs_to_measure(config)
    dense = source.load_model(config.dtype)
    if scaling:
        dense = scale_model(dense, scaling)
    dense = dense.float().to(how.device)
    with _progress(how.progress, windows, len(configs) + len(sparse_layers) + 2) as advance:
        study = Study(dense, config, windows, advance)
        del dense
        conversions = [study.conversion(one) for one in configs]
        by_layer = study.kl_by_layer(sparse_layers)
    advice = dense_layers_worth_leaving(config, layers, by_layer)
    if advice["layers"]:
        with _progress(how.progress, windows, 1) as study.advance:
            advice["by_position"] = study.conversion(config, advice["layers"])["by_position"]
    total = sum(by_layer.values())
    read = {name for name, _ in windows}
    return {
        "texts": provenance([(name, text) for name, text in texts if name in read]),
        "documents": [{"name": name, "tokens": ids.shape[1]} for name, ids in windows],
        "exact_up_to": config.nsa_exact_tokens,
        "device": str(how.device),
        "computed_in": "float32",
        "conversions": conversions,
        "without_channels": without,
        "by_layer": [{"layer": n, "kl": kl, "share": kl / total if total else 0.0} for n, kl in by_layer.items()],
        "dense_layers": advice,
        "seconds": round(time.perf_counter() - began, 1),
    }


def measured_windows(source: Source, config: Any, texts: Sequence[tuple[str, str]], how: Measuring) -> list[Window]:
    """The texts' first tokens, on the device.

    Raises:
        NsaError: the source has no tokenizer, or no text goes beyond the exact range.
    """
    exact = config.nsa_exact_tokens
    longest = getattr(config, "max_position_embeddings", None)
    length = min(how.tokens, longest or how.tokens)
    if length <= exact:
        limit = "tokens to measure" if length == how.tokens else "the model's positions"
        raise NsaError(
            f"up to {exact:,} tokens a converted model is the dense one, so that there is something to measure beyond "
            f"only: {limit} must be more, got {length:,} (a smaller nsa_topk or nsa_block_size is exact for fewer)"
        )
    trusted = getattr(source, "trust_remote_code", False)
    with TemporaryDirectory() as folder:
        source.save_companions(Path(folder))
        if not has_tokenizer(Path(folder)):
            raise NsaError(
                f"{source.name} has no tokenizer, so no text can be measured: put its files beside the weights"
            )
        windows = longest_windows(Path(folder), texts, length, how.documents, config.vocab_size, trusted)
    found = max((ids.shape[1] for _, ids in windows), default=0)
    if found <= exact:
        raise NsaError(
            f"up to {exact:,} tokens a converted model is the dense one: expected a text of more, and the longest of "
            f"{len(texts)} has {found:,}; give one of at least {min(2 * exact, length):,} tokens"
        )
    return [(name, ids.to(how.device)) for name, ids in windows]


def configs_to_measure(config: Any) -> tuple[list[Any], str | None]:
    """The conversion's config, that with half as many channels, and that with the other selector.

    Returns:
        The configs, and why none of them chooses by channels; None where one does.
    """
    try:
        other = [other_selector(config)]
        without = None
    except NotPlain as reason:
        other, without = [], str(reason)
    fewer = []
    if config.nsa_selector == "channels" and config.nsa_selector_dim >= 4:
        fewer = [config.with_fields(nsa_selector_dim=config.nsa_selector_dim // 2)]
    return [config, *fewer, *other], without


class Study:
    """A dense model's weights, run dense and sparse on the same texts.

    Args:
        dense: the dense model.
        config: the converted model's.
        windows: the texts, on the models' device.
        advance: is called after each text that a model has read.

    Attributes:
        model: the converted model.
        dense_states: of each text, [1, T, hidden], what the decoder gives when all of it runs dense.
        exact: tokens up to which nothing differs.
        step: from one position to the next at which a single layer's KL is measured.
    """

    def __init__(self, dense: PreTrainedModel, config: Any, windows: Sequence[Window], advance: Callable[[], None]):
        self.config, self.model = config, sparse_model(dense, config)
        self.windows, self.advance = windows, advance
        self.exact = config.nsa_exact_tokens
        self.step = max(1, (max(ids.shape[1] for _, ids in windows) - self.exact) // POSITIONS)
        with self.model.dense_attention():
            self.dense_states = self.states(self.model)

    def states(self, model: Any) -> list[Tensor]:
        """A model's final hidden states of each text."""
        states = []
        for window in self.windows:
            states += final_states(model, [window])
            self.advance()
        return states

    def conversion(self, config: Any, dense_layers: Sequence[int] = ()) -> dict[str, Any]:
        """What a conversion costs by position.

        Args:
            config: of the converted model.
            dense_layers: layers that are left dense besides.
        """
        model = self.model if config is self.config else sparse_model(self.model, config)
        with model.dense_attention(dense_layers):
            states = self.states(model)
        longest = max(ids.shape[1] for _, ids in self.windows)
        edges = position_edges(longest, [self.exact])
        compared = compare_models(self.model, self.dense_states, model, states, self.windows, edges)
        return {
            "name": selector_name(config),
            "selector": config.nsa_selector,
            "selector_dim": config.nsa_selector_dim,
            "compression": config.nsa_compression,
            "by_position": finite(compared),
        }

    def kl_by_layer(self, layers: Sequence[int]) -> dict[int, float]:
        """KL to dense in nats a token with one of these layers sparse at a time, at positions beyond the exact range.

        Up to a sparse layer all is as in the dense model, and not computed again.
        """
        positions = slice(self.exact, None, self.step)
        places = range(self.dense_states[0].shape[1])[positions]
        compared = {layer: Accumulator([0, len(places)]) for layer in layers}
        for window, dense in zip(self.windows, self.dense_states, strict=True):
            begin_at = resumable(self.model, window)
            self.advance()
            read = [(window[0], window[1][:, positions])]
            for layer in layers:
                with self.model.dense_attention([other for other in layers if other != layer]), begin_at(layer):
                    (states,) = final_states(self.model, [window])
                both = ([dense[:, positions]], self.model, [states[:, positions]])
                one = compare_models(self.model, *both, read, compared[layer].edges, is_text=False)
                compared[layer].merge(one)
                self.advance()
        return {layer: max(0.0, finite(one)[0]["kl"]) for layer, one in compared.items()}


def sparse_model(weights: PreTrainedModel, config: Any) -> Any:
    """A sparse model on another model's weights."""
    return on_same_weights(family_of(config).causal_lm_class, config, weights)


def finite(comparison: Accumulator) -> list[dict[str, Any]]:
    """The rows of a comparison.

    Raises:
        NsaError: logits are not finite.
    """
    rows = comparison.as_dict()
    if any(row["kl"] is None for row in rows):
        raise NsaError("logits are not finite: the source's weights are damaged")
    return rows


def dense_layers_worth_leaving(
    config: Any, layers: Sequence[dict[str, Any]], by_layer: Mapping[int, float]
) -> dict[str, Any]:
    """Which layers to leave dense: those far above the others that save more KL than they cost bytes.

    Args:
        config: the converted model's.
        layers: what `plan` says of each.
        by_layer: the KL with one layer sparse, for each sparse layer.

    Returns:
        See `measured["dense_layers"]` in what `plan` returns; without `by_position`.
    """

    def read(dense: Sequence[int]) -> int:
        rows = [{**row, "becomes": "dense"} if row["layer"] in dense else row for row in layers]
        return int(kv_cache(config, rows, LENGTH)["nsa_read_bytes"])

    total, median = sum(by_layer.values()), statistics.median(by_layer.values())
    before = read([])
    most = max(by_layer, key=by_layer.__getitem__)
    added = read([most]) / before - 1
    chosen = [n for n, kl in by_layer.items() if kl > STANDS_OUT * median and kl > WORTH * added * total]
    share = sum(by_layer[layer] for layer in chosen or [most]) / total if total else 0.0
    grown = read(chosen or [most]) / before - 1
    rule = (
        f"a layer is left dense whose KL is over {STANDS_OUT} times the median layer's, and whose share of all layers' "
        f"KL is over {WORTH} times the share by which it raises the bytes read for a token at {LENGTH:,}"
    )
    which = ", ".join(map(str, chosen)) if chosen else f"none: layer {most}, the first in KL,"
    return {
        "layers": chosen,
        "option": sorted({*(config.nsa_dense_layers or ()), *chosen}),
        "rule": rule,
        "why": f"{which} has {share:.1%} of the KL and would raise the bytes by {grown:.1%}",
        "kl_share": share,
        "length": LENGTH,
        "read_bytes": before,
        "read_bytes_then": read(chosen),
        "by_position": None,
    }


class SecondsEach(ProgressColumn):
    """How long a model reads a text."""

    def render(self, task: Task) -> str:
        """The seconds, or nothing before the first is done."""
        return f"{1 / task.speed:.1f} s each" if task.speed else ""


@contextmanager
def _progress(shown: bool, windows: Sequence[Window], runs: int) -> Iterator[Callable[[], None]]:
    """A bar over so many runs of all texts."""
    columns = (
        TextColumn("Measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        SecondsEach(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=runs * len(windows))
        yield lambda: bar.advance(task)


def render_measured(measured: dict[str, Any]) -> RenderableType:
    """What was measured as rich tables, for `rich.print`."""
    texts = ", ".join(f"{escape(text['name'])} ({text['tokens']:,} tokens)" for text in measured["documents"])
    advice, first = measured["dense_layers"], measured["conversions"][0]
    beyond = [row["from"] for row in first["by_position"] if row["from"] >= measured["exact_up_to"]]
    costs = Table(title="Rise of perplexity, and KL to dense")
    costs.add_column("blocks chosen by")
    for row in first["by_position"][-len(beyond) :]:
        costs.add_column(f"{row['from']:,} -\n{row['to']:,}", justify="right", no_wrap=True)
    shown = [(one["name"], one["by_position"]) for one in measured["conversions"]]
    if advice["by_position"]:
        layers = ", ".join(map(str, advice["layers"]))
        shown.insert(1, (f"{first['name']}, dense in {layers}", advice["by_position"]))
    for name, rows in shown:
        costs.add_row(name, *(f"{_percent(row['rise'])}  {row['kl']:z.4f}" for row in rows if row["from"] in beyond))
    if measured["without_channels"]:
        costs.caption = f"channels: {escape(measured['without_channels'])}"
    by_layer = Table(title=f"KL with one layer sparse, by {first['name']}")
    for column in ("layer", "KL", "share of all"):
        by_layer.add_column(column, justify="right")
    by_layer.add_column("")
    most = max(row["share"] for row in measured["by_layer"])
    for row in measured["by_layer"]:
        bar = "█" * round(30 * row["share"] / most) if most else ""
        by_layer.add_row(str(row["layer"]), f"{row['kl']:.1e}", f"{row['share']:.1%}", bar)
    facts = Table(title="Measured, nothing trained", show_header=False)
    facts.add_row("On", texts)
    facts.add_row("Worth leaving dense", advice["why"])
    facts.add_row("By the rule", advice["rule"])
    if advice["layers"]:
        facts.add_row("To do so", f"--nsa-dense-layers {','.join(map(str, advice['option']))}")
    return Group(facts, costs, by_layer)


def _percent(share: float | None) -> str:
    return "-" if share is None else figure(share, "+.2%")
