"""Two models' logits on the same text, compared by position.

    total = Accumulator(position_edges(2048))
    total.update(dense_logits, sparse_logits, labels)    # once per document, or per run of positions
    total.as_dict()

At every position t: KL(reference || other) = sum_v p(v) (log p(v) - log q(v)) in nats, whether both put the same token
first, the largest absolute difference of a logit, and both models' -log p(label). Short texts say nothing about
sparsity, hence the buckets. The vocabulary is large (49k for SmolLM2), so positions are taken a chunk at a time: beside
the given logits no more than four fp32 tensors of [chunk, V] exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Positions whose label is this are compared but have no next token to predict.
NO_LABEL = -100


def position_edges(length: int, extra: Iterable[int] = ()) -> list[int]:
    """Borders of ranges of positions: 0, 512, 1024, 2048, 4096, ... and `length`.

    Args:
        length: tokens of the longest text; the last border.
        extra: more borders; those below `length` are taken.
    """
    edges = {0, length, *(edge for edge in extra if 0 < edge < length)}
    edge = 512
    while edge < length:
        edges.add(edge)
        edge *= 2
    return sorted(edges)


@dataclass
class Bucket:
    """Sums over the positions `start <= t < end` of one or many documents."""

    start: int
    end: int
    tokens: int = 0
    labelled: int = 0
    nll_reference: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    same_top1: int = 0
    max_abs_diff: float = 0.0
    top1_gap: float = 0.0

    def add(self, other: Bucket) -> None:
        """Adds another bucket's sums; NaN in a largest value stays NaN."""
        for name in ("tokens", "labelled", "nll_reference", "nll", "kl", "same_top1"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("max_abs_diff", "top1_gap"):
            setattr(self, name, _larger(getattr(self, name), getattr(other, name)))

    def as_dict(self) -> dict:
        """The bucket as JSON: means and perplexities; None where nothing was measured or it is not finite."""
        counted = bool(self.tokens)
        return {
            "from": self.start,
            "to": self.end,
            "tokens": self.tokens,
            "ppl_reference": _perplexity(self.nll_reference, self.labelled),
            "ppl": _perplexity(self.nll, self.labelled),
            "kl": _finite(self.kl / self.tokens) if counted else None,
            "same_top1": self.same_top1 / self.tokens if counted else None,
            "max_abs_diff": _finite(self.max_abs_diff) if counted else None,
            "top1_gap": _finite(self.top1_gap) if counted else None,
        }


@dataclass
class Accumulator:
    """Compares logits and sums by position over any number of documents.

    Args:
        edges: rising borders; bucket i holds the positions `edges[i] <= t < edges[i + 1]`.
        chunk: positions compared at once.
    """

    edges: Sequence[int]
    chunk: int = 256
    buckets: list[Bucket] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.edges) < 2 or any(a >= b for a, b in zip(self.edges[:-1], self.edges[1:], strict=True)):
            raise ValueError(f"edges must be at least two rising positions, got {list(self.edges)}")
        self.buckets = [Bucket(start, end) for start, end in zip(self.edges[:-1], self.edges[1:], strict=True)]

    @torch.no_grad()
    def update(self, reference_logits: Tensor, logits: Tensor, labels: Tensor, start: int = 0) -> None:
        """Adds one run of positions.

        Args:
            reference_logits: [T, V], any floating dtype; the model compared with.
            logits: [T, V], any floating dtype.
            labels: [T] int64, the *next* token at each position; NO_LABEL (-100) where there is none.
            start: position of the first row in its document.

        Raises:
            ValueError: shapes that do not fit, or positions outside the edges.
        """
        if reference_logits.shape != logits.shape or logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                "expected reference logits and logits of one shape [T, V] and labels [T], got "
                f"{list(reference_logits.shape)}, {list(logits.shape)} and {list(labels.shape)}"
            )
        end = start + len(labels)
        if start < self.edges[0] or end > self.edges[-1]:
            raise ValueError(f"positions {start} to {end} lie outside the edges {list(self.edges)}")
        borders = sorted({start, end, *range(start, end, self.chunk), *(e for e in self.edges if start < e < end)})
        for first, last in zip(borders[:-1], borders[1:], strict=True):
            rows = slice(first - start, last - start)
            bucket = next(bucket for bucket in self.buckets if bucket.start <= first < bucket.end)
            bucket.add(_compare(bucket, reference_logits[rows], logits[rows], labels[rows]))

    def merge(self, other: Accumulator) -> None:
        """Adds another accumulator's sums, of another document or from another process.

        Raises:
            ValueError: it has other edges.
        """
        if list(self.edges) != list(other.edges):
            raise ValueError(f"cannot merge buckets {list(other.edges)} into {list(self.edges)}")
        for mine, theirs in zip(self.buckets, other.buckets, strict=True):
            mine.add(theirs)

    def between(self, start: int, end: int) -> Bucket:
        """The sum of the buckets that lie within `start <= t < end`."""
        total = Bucket(start, end)
        for bucket in self.buckets:
            if start <= bucket.start and bucket.end <= end:
                total.add(bucket)
        return total

    def as_dict(self) -> list[dict]:
        """One JSON-able row per bucket that saw a token.

        Each has `from`, `to`, `tokens`, the perplexities `ppl_reference` and `ppl`, `kl` (nats a token), `same_top1` (a
        share), `max_abs_diff` (of logits) and `top1_gap`: where the top token differs, the largest lead (in logits)
        that the reference gave its own. A lead that rounding can overturn is a tie, not a difference.
        """
        return [bucket.as_dict() for bucket in self.buckets if bucket.tokens]


def compare_by_position(
    reference_logits: Tensor, logits: Tensor, labels: Tensor, edges: Sequence[int], chunk: int = 256
) -> Accumulator:
    """The comparison of one document in one call.

    Args:
        reference_logits: as in `Accumulator.update`.
        logits: as in `Accumulator.update`.
        labels: as in `Accumulator.update`.
        edges: as in `Accumulator`.
        chunk: as in `Accumulator`.
    """
    accumulator = Accumulator(edges, chunk)
    accumulator.update(reference_logits, logits, labels)
    return accumulator


def _compare(bucket: Bucket, reference_logits: Tensor, logits: Tensor, labels: Tensor) -> Bucket:
    """The sums of a chunk of positions of one bucket.

    Args:
        bucket: whose borders the sums get.
        reference_logits: [C, V].
        logits: [C, V].
        labels: [C] int64.
    """
    # [C, V] in fp32
    reference, other = reference_logits.float(), logits.float()
    difference = (reference - other).abs_().amax().item()
    # [C]: how much more the reference gives its own top token than the other's
    gap = reference.amax(-1) - reference.gather(-1, other.argmax(-1, keepdim=True)).squeeze(-1)
    same = reference.argmax(-1) == other.argmax(-1)
    reference, other = reference.log_softmax(-1), other.log_softmax(-1)
    has_label = labels != NO_LABEL
    index = labels.where(has_label, 0)[:, None]
    nll_reference, nll = (
        -log_p.gather(-1, index).squeeze(-1)[has_label].double().sum() for log_p in (reference, other)
    )
    kl = (reference.exp() * (reference - other)).sum(-1)
    return Bucket(
        bucket.start,
        bucket.end,
        tokens=len(labels),
        labelled=int(has_label.sum()),
        nll_reference=nll_reference.item(),
        nll=nll.item(),
        kl=kl.double().sum().item(),
        same_top1=int(same.sum()),
        max_abs_diff=difference,
        top1_gap=gap.where(~same, 0).amax().item(),
    )


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(nll: float, tokens: int) -> float | None:
    # exp overflows beyond 709 nats a token
    return math.exp(nll / tokens) if tokens and math.isfinite(nll) and nll / tokens < 700 else None
