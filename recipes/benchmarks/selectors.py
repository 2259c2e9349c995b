"""How blocks are best chosen: what each way of scoring them costs a dense model that was not trained for it.

    python -m nsa_hf.recipes.benchmarks.selectors MODEL DOCUMENTS.json --csv OUT.csv --tokens 8192

MODEL is a dense folder; DOCUMENTS.json a list of {"name", "text"}, none of them used to choose anything; the first only
calibrates. Every layer with full attention attends to its selected blocks alone (no compressed branch, no window).
Everything is float32, so that the difference to dense is the choice of blocks alone. For each variant and range of
positions: KL to the dense model and the rise of perplexity over it (100 times the mean difference of the loss), with
standard errors over documents, paired.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

from nsa_hf.conversion.compare.models import head_of

RANGES = ((0, 1024), (1024, 2048), (2048, 4096), (4096, 8192), (8192, 16384), (16384, 32768))
ASKED = (
    "model",
    "question",
    "form",
    "channels",
    "rule",
    "bits",
    "key_scale",
    "mean_query",
    "block_size",
    "topk",
    "layers",
)
MEASURED = ("from", "to", "kl", "kl_error", "rise_percent", "rise_error", "documents")
RAN = ("tokens", "device", "torch", "transformers", "commit")
QUERIES = 1024  # at a time
LOGITS = 512  # positions at a time
Losses = list[tuple[float, float]]  # KL to dense and difference of the loss, for each of RANGES


@dataclass(frozen=True)
class Variant:
    """One way to choose blocks.

    Attributes:
        form: how the logits of a block's tokens and of a group's heads become one score, see `FORMS`.
        channels: how many channels of queries and keys the score reads; None = all.
        rule: which: the `slowest` to turn, or those with the most `energy` over the calibration text, layer by layer.
        bits: of index queries and keys, with one scale a token and head; 0 = float32.
        key_scale: "token", or "block": the keys of a block and head have one scale.
        mean_query: one index query a KV head, the mean of its group's.
        layers: which of the full-attention layers are sparse, counted among themselves; None = all.
    """

    form: str = "max-softmax-sum"
    channels: int | None = 32
    rule: str = "slowest"
    bits: int = 0
    key_scale: str = "token"
    mean_query: bool = False
    block_size: int = 64
    topk: int = 16
    layers: tuple[int, ...] | None = field(default=None)


def max_softmax_sum(logits: Tensor) -> Tensor:
    """The specification: the largest logit of a block, softmax over blocks, sum over heads."""
    return logits.amax(-1).softmax(-1).sum(1)


def lse_softmax_sum(logits: Tensor) -> Tensor:
    """Log-sum-exp over a block's tokens: the dense attention's own mass, of these channels."""
    return logits.logsumexp(-1).softmax(-1).sum(1)


def raw_max(logits: Tensor) -> Tensor:
    """The largest logit of any head and token: one pass, no exponential."""
    return logits.amax(-1).amax(1)


def max_softmax_max(logits: Tensor) -> Tensor:
    """As the specification, but the largest head counts."""
    return logits.amax(-1).softmax(-1).amax(1)


def running(logits: Tensor) -> Tensor:
    """One pass from the first block on: the maximum less what the head's log-sum-exp of maxima is by then."""
    best = logits.amax(-1)
    return (best - best.logcumsumexp(-1)).amax(1)


def mean_of_heads(logits: Tensor) -> Tensor:
    """The mean of the heads' block maxima."""
    return logits.amax(-1).mean(1)


def max_less_top(logits: Tensor) -> Tensor:
    """The operation's definition: each head's largest logit of a block, less its largest of all; the largest head."""
    best = logits.amax(-1)
    return (best - best.amax(-1, keepdim=True)).amax(1)


def forced(values: Tensor) -> Tensor:
    """Of values `[..., blocks]`, those of the first block and of the one before the query's own: `[..., 2]`."""
    last = ((values > -torch.inf).sum(-1, keepdim=True) - 1).clamp(min=0)
    return torch.cat([values[..., :1], values.gather(-1, last)], -1)


def max_less_forced_top(logits: Tensor) -> Tensor:
    """One pass: the maximum less the larger of the head's two forced past blocks'."""
    best = logits.amax(-1)
    return (best - forced(best).amax(-1, keepdim=True)).amax(1)


def max_less_forced_lse(logits: Tensor) -> Tensor:
    """One pass: the maximum less the log-sum-exp of the head's two forced past blocks' maxima."""
    best = logits.amax(-1)
    return (best - forced(best).logsumexp(-1, keepdim=True)).amax(1)


def max_less_first(logits: Tensor) -> Tensor:
    """One pass: the maximum less the first block's."""
    best = logits.amax(-1)
    return (best - best[..., :1]).amax(1)


def max_less_forced_tokens(logits: Tensor) -> Tensor:
    """One pass: the maximum less the log-sum-exp of all tokens of the head's two forced past blocks."""
    return (logits.amax(-1) - forced(logits.logsumexp(-1)).logsumexp(-1, keepdim=True)).amax(1)


# Index logits `[Hk, heads, T, blocks, tokens]` to importance `[Hk, T, blocks]`; -inf where a query may not choose.
FORMS = {
    "max-softmax-sum": max_softmax_sum,
    "lse-softmax-sum": lse_softmax_sum,
    "raw-max": raw_max,
    "max-softmax-max": max_softmax_max,
    "running": running,
    "mean-of-heads": mean_of_heads,
    "max-less-top": max_less_top,
    "max-less-forced-top": max_less_forced_top,
    "max-less-forced-lse": max_less_forced_lse,
    "max-less-first": max_less_first,
    "max-less-forced-tokens": max_less_forced_tokens,
}


def variants(head_dim: int, layers: int) -> Iterator[tuple[str, Variant]]:
    """Name of the question, and a variant that answers a part of it."""
    half = Variant(channels=head_dim // 2)
    for channels in (head_dim // 2, head_dim):
        for form in FORMS:
            yield "form", replace(half, form=form, channels=channels)
    for share in (4, 8 / 3, 4 / 3):
        for form in ("max-softmax-sum", "lse-softmax-sum"):
            yield "channels", replace(half, form=form, channels=round(head_dim / share))
    for share in (4, 2):
        yield "rule", replace(half, channels=head_dim // share, rule="energy")
    for bits in (8, 4):
        yield "bits", replace(half, bits=bits)
    for scale in ("token", "block"):
        yield "bits", replace(half, form="max-softmax-max", bits=8, key_scale=scale)
    for channels in (head_dim // 2, head_dim):
        yield "query", replace(half, channels=channels, mean_query=True)
    for block_size in (32, 128):
        yield "block size", replace(half, block_size=block_size, topk=1024 // block_size)
    for topk in (8, 24, 32):
        yield "blocks", replace(half, topk=topk)
    for dense in (1, 2, 3) if layers > 3 else ():
        yield "first layers dense", replace(half, layers=tuple(range(dense, layers)))


def single_layers(head_dim: int, layers: int) -> Iterator[tuple[str, Variant]]:
    """One layer sparse at a time."""
    for layer in range(layers):
        yield "one layer sparse", Variant(channels=head_dim // 2, layers=(layer,))


class Study:
    """A dense model whose attention is dense, or chooses blocks as a variant says.

    Attributes:
        model: Transformers' dense causal model, whose attention is replaced.
        full: its layers with full attention.
        head_dim: channels of a head.
        variant: of the forward that runs; None: dense.
        energy: by layer, the mean square of each channel of queries times that of keys, [D], see `calibrate`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.variant: Variant | None = None
        self.energy: dict[int, Tensor] = {}
        self.calibrating = False
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
        self.full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        self.head_dim = getattr(model.config, "head_dim", None) or (
            model.config.hidden_size // model.config.num_attention_heads
        )
        AttentionInterface.register("selector-study", self.attention)
        AttentionMaskInterface.register("selector-study", lambda *args, **kwargs: None)
        model.set_attn_implementation("selector-study")

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """What Transformers calls: `[1, H, T, D]` after RoPE to `[1, T, H, D]`."""
        layer, variant = module.layer_idx, self.variant
        window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
        if layer in self.full:
            window = None
        chosen = variant is not None and layer in self.full
        if chosen and variant.layers is not None:  # type: ignore[union-attr]
            chosen = self.full.index(layer) in variant.layers  # type: ignore[union-attr]
        key, value = key[0], value[0]
        query = query[0].unflatten(0, (key.shape[0], -1))
        if self.calibrating and layer in self.full:
            self.energy[layer] = query.pow(2).mean((0, 1, 2)) * key.pow(2).mean((0, 1))
        out = []
        for start in range(0, query.shape[2], QUERIES):
            q = query[:, :, start : start + QUERIES]
            position = torch.arange(start, start + q.shape[2], device=q.device)
            stop = start + q.shape[2]
            low = max(0, start - window + 1) if window else 0
            seen = torch.arange(low, stop, device=q.device)
            allowed = seen <= position[:, None]
            if window:
                allowed &= seen > position[:, None] - window
            if chosen and stop > variant.block_size * variant.topk:  # type: ignore[union-attr]
                allowed = allowed & self.selected(layer, q, key[:, :stop], position, scaling)[:, None]
            logits = (q @ key[:, None, low:stop].mT).mul_(scaling).masked_fill_(~allowed, -torch.inf)
            out.append(logits.softmax(-1) @ value[:, None, low:stop])
        return torch.cat(out, dim=2).flatten(0, 1).transpose(0, 1)[None], None

    def selected(self, layer: int, query: Tensor, key: Tensor, position: Tensor, scaling: float) -> Tensor:
        """Which tokens each query's blocks hold: `[Hk, G, T, D]` and `[Hk, S, D]` to bool `[Hk, T, S]`."""
        variant = self.variant
        assert variant is not None
        channels = self.channels(layer, variant)
        q, k = query[..., channels], key[..., channels]
        if variant.mean_query:
            q = q.mean(1, keepdim=True)
        if variant.bits:
            q, k = rounded(q, variant.bits), rounded_keys(k, variant)
        logits = (q @ k[:, None].mT).mul_(scaling)
        size, tokens = variant.block_size, key.shape[1]
        blocks = -(-tokens // size)
        logits = torch.nn.functional.pad(logits, (0, blocks * size - tokens), value=-torch.inf).unflatten(
            -1, (-1, size)
        )
        block, current = torch.arange(blocks, device=q.device), position[:, None] // size
        logits.masked_fill_((block >= current)[..., None], -torch.inf)
        importance = FORMS[variant.form](logits).masked_fill((block >= current), -torch.inf)
        forced = (block == 0) | (block == current) | (block == current - 1)
        importance = importance.masked_fill(forced, torch.inf).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        best = importance.topk(min(variant.topk, blocks), dim=-1).indices
        taken = torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, best, True)
        return taken.repeat_interleave(size, dim=-1)[..., :tokens]

    def channels(self, layer: int, variant: Variant) -> Tensor | slice:
        """The channels that the index reads; RoPE rotates channel i with i + D/2, the higher the slower."""
        if variant.channels is None or variant.channels >= self.head_dim:
            return slice(None)
        half = self.head_dim // 2
        pairs = torch.arange(half - variant.channels // 2, half)
        if variant.rule == "energy":
            energy = self.energy[layer].cpu()
            pairs = (energy[:half] + energy[half:]).topk(variant.channels // 2).indices.sort().values
        return torch.cat([pairs, pairs + half]).to(self.model.device)

    def calibrate(self, ids: Tensor) -> None:
        """Notes the energy of each layer's channels on a text, int64 [1, T], for the rule `energy`."""
        self.calibrating = True
        self.hidden(ids, None)
        self.calibrating = False

    def hidden(self, ids: Tensor, variant: Variant | None) -> Tensor:
        """The model's last hidden states [T, D] of a text, int64 [1, T]; dense without a variant."""
        self.variant = variant
        return self.model.model(ids, use_cache=False).last_hidden_state[0]


def losses(model: Any, ids: Tensor, dense: Tensor, sparse: Tensor) -> Losses:
    """What a sparse model costs on a text, a mean for each of RANGES.

    Args:
        model: whose head both have.
        ids: int64 [1, T].
        dense, sparse: the last hidden states of each, [T, D].
    """
    kl, rise = [], []
    with head_of(model) as head:
        for start in range(0, len(dense) - 1, LOGITS):
            part = slice(start, min(start + LOGITS, len(dense) - 1))
            p, q = (head(x[None, part]).float().log_softmax(-1) for x in (dense, sparse))
            target = ids[0, part.start + 1 : part.stop + 1, None]
            kl.append((p.exp() * (p - q)).sum(-1))
            rise.append((p - q).gather(1, target)[:, 0])
    kls, rises = torch.cat(kl).double(), torch.cat(rise).double()
    ranges = [slice(*positions) for positions in RANGES if positions[0] < len(kls)]
    return [(float(kls[positions].mean()), float(rises[positions].mean())) for positions in ranges]


def rounded_keys(k: Tensor, variant: Variant) -> Tensor:
    """Index keys `[Hk, S, c]` rounded as a variant says; by blocks, those of an unfinished one are left."""
    if variant.key_scale == "token":
        return rounded(k, variant.bits)
    whole = k.shape[1] // variant.block_size * variant.block_size
    blocks = k[:, :whole].unflatten(1, (-1, variant.block_size)).flatten(2)
    return torch.cat([rounded(blocks, variant.bits).view(k.shape[0], whole, -1), k[:, whole:]], 1)


def rounded(x: Tensor, bits: int) -> Tensor:
    """`x [..., c]` rounded to integers of `bits` bits, with one scale for each `[c]`."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
    return (x / scale).round() * scale


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN for a single value."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("nan")


def read_documents(path: Path, tokenizer: Any, tokens: int, most: int, bos: bool, device: str) -> list[Tensor]:
    """The first documents that are long enough, int64 [1, tokens].

    Args:
        path: DOCUMENTS.json.
        most: how many of the file are looked at, beside the one that calibrates.
        bos: begin each with the tokenizer's first token, instead of what the tokenizer adds by itself.
    """
    texts = [document["text"] for document in json.loads(path.read_text(encoding="utf-8"))][: most + 1]
    first = tokenizer.bos_token if bos else ""
    settings = {"return_tensors": "pt", "add_special_tokens": not bos}
    encoded = [tokenizer(first + text, **settings).input_ids[:, :tokens].to(device) for text in texts]
    return [ids for ids in encoded if ids.shape[1] == tokens]


def compare_variants(
    study: Study, documents: list[Tensor], chosen: list[Variant], seconds: float
) -> list[list[Losses]]:
    """What each variant costs on each document.

    Args:
        documents: int64 [1, T] each.
        seconds: no document is begun after so many.
    """
    results: list[list[Losses]] = [[] for _ in chosen]
    begin = time.perf_counter()
    for done, ids in enumerate(documents):
        if time.perf_counter() - begin > seconds:
            break
        dense = study.hidden(ids, None)
        for result, variant in zip(results, chosen, strict=True):
            result.append(losses(study.model, ids, dense, study.hidden(ids, variant)))
        print(f"{done + 1} of {len(documents)} documents, {time.perf_counter() - begin:.0f} s", flush=True)
    return results


def variant_columns(model: str, question: str, variant: Variant) -> list[Any]:
    """The columns ASKED of a variant's rows."""
    layers = "all" if variant.layers is None else f"{variant.layers[0]}-{variant.layers[-1]}"
    return [
        model,
        question,
        variant.form,
        variant.channels,
        variant.rule,
        variant.bits,
        variant.key_scale,
        variant.mean_query,
        variant.block_size,
        variant.topk,
        layers,
    ]


def measured_columns(documents: list[Losses]) -> Iterator[tuple[list[Any], str]]:
    """For each range of positions the columns MEASURED of a variant, and how they are printed."""
    for positions, losses in zip(RANGES, zip(*documents, strict=True), strict=False):
        kl, kl_error = mean_and_error([kl for kl, _ in losses])
        rise, rise_error = (100 * x for x in mean_and_error([rise for _, rise in losses]))
        row = [*positions, f"{kl:.5f}", f"{kl_error:.5f}", f"{rise:.3f}", f"{rise_error:.3f}", len(losses)]
        yield row, f"{kl:.4f} {rise:+.2f}%"


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("documents", type=Path)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--most", type=int, default=10**9, help="documents at the most; the first calibrates")
    parser.add_argument("--bos", action="store_true", help="begin every document with the tokenizer's first token")
    parser.add_argument("--single-layers", action="store_true", help="one layer sparse at a time instead")
    parser.add_argument("--commit", default="", help="noted in the rows")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no document after so many")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    study = Study(model)
    documents = read_documents(args.documents, tokenizer, args.tokens, args.most, args.bos, device)
    if len(documents) < 2:
        parser.error(
            f"{args.documents} must hold two texts of {args.tokens} tokens or more (the first only calibrates), got "
            f"{len(documents)}: give longer ones, or fewer --tokens"
        )
    first, *documents = documents
    study.calibrate(first)
    make = single_layers if args.single_layers else variants
    questions, chosen = zip(*make(study.head_dim, len(study.full)), strict=True)
    results = compare_variants(study, documents, list(chosen), args.seconds)

    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    ran = [args.tokens, gpu, torch.__version__, transformers.__version__, args.commit]
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*ASKED, *MEASURED, *RAN])
        for question, variant, result in zip(questions, chosen, results, strict=True):
            columns = variant_columns(Path(args.model).name, question, variant)
            measured = list(measured_columns(result))
            writer.writerows([*columns, *row, *ran] for row, _ in measured)
            print(*columns[1:], ":", *(text for _, text in measured))


if __name__ == "__main__":
    main()
