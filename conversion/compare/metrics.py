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
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

# Positions whose label is this are compared but have no next token to predict.
NO_LABEL = -100

# The fields of a Bucket that are added up, and those of which the largest is kept.
COUNTS = ("tokens", "labelled", "same_top1")
SUMS = (*COUNTS, "nll_reference", "nll", "kl")
LARGEST = ("max_abs_diff", "top1_gap")


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
    """Sums over the positions `start <= t < end` of one or many documents.

    `rise` is by which share the model's perplexity is above the reference's, from the mean over documents of the
    difference of -log p(label); `rise_error` is its standard error over documents, None with fewer than two.
    """

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
    rise: float | None = None
    rise_error: float | None = None

    def as_dict(self) -> dict:
        """The bucket as JSON: means and perplexities; None where nothing was measured or it is not finite."""
        counted = bool(self.tokens)
        return {
            "from": self.start,
            "to": self.end,
            "tokens": self.tokens,
            "ppl_reference": _perplexity(self.nll_reference, self.labelled),
            "ppl": _perplexity(self.nll, self.labelled),
            "rise": self.rise,
            "rise_error": self.rise_error,
            "kl": _finite(self.kl / self.tokens) if counted else None,
            "same_top1": self.same_top1 / self.tokens if counted else None,
            "max_abs_diff": _finite(self.max_abs_diff) if counted else None,
            "top1_gap": _finite(self.top1_gap) if counted else None,
        }


@dataclass
class Accumulator:
    """Compares logits and sums by position over any number of documents.

    The sums stay on the device of the logits until they are asked for: a GPU is never waited for in between.

    Args:
        edges: rising borders; bucket i holds the positions `edges[i] <= t < edges[i + 1]`.
        chunk: positions compared at once; None takes what suits the logits' device and vocabulary.
    """

    edges: Sequence[int]
    chunk: int | None = None
    # of each document [buckets, len(SUMS) + len(LARGEST)] fp64
    documents: list[Tensor] = field(init=False, default_factory=list)
    reached: int | None = field(init=False, default=None)  # where the last run of positions ended

    def __post_init__(self) -> None:
        if len(self.edges) < 2 or any(a >= b for a, b in pairwise(self.edges)):
            raise ValueError(f"edges must be at least two rising positions, got {list(self.edges)}")

    @torch.no_grad()
    def update(self, reference_logits: Tensor, logits: Tensor, labels: Tensor, start: int = 0) -> None:
        """Adds one run of positions. A run that does not begin where the last one ended is another document's.

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
        if self.reached != start:
            columns = len(SUMS) + len(LARGEST)
            self.documents.append(logits.new_zeros(len(self.edges) - 1, columns, dtype=torch.float64))
        self.reached = end
        chunk = self.chunk or positions_at_once(logits.device, logits.shape[1])
        borders = sorted({start, end, *range(start, end, chunk), *(e for e in self.edges if start < e < end)})
        for first, last in pairwise(borders):
            rows = slice(first - start, last - start)
            sums, largest = _compare(reference_logits[rows], logits[rows], labels[rows])
            bucket = self.documents[-1][bisect_right(self.edges, first) - 1]
            bucket[: len(SUMS)] += sums
            torch.maximum(bucket[len(SUMS) :], largest, out=bucket[len(SUMS) :])  # NaN stays NaN

    def merge(self, other: Accumulator) -> None:
        """Adds another accumulator's documents, such as another process's.

        Raises:
            ValueError: it has other edges.
        """
        if list(self.edges) != list(other.edges):
            raise ValueError(f"cannot merge buckets {list(other.edges)} into {list(self.edges)}")
        self.documents += other.documents
        self.reached = None

    def __getstate__(self) -> dict:
        """What goes to another process, which has another GPU: the sums on the CPU."""
        return {**self.__dict__, "documents": [document.cpu() for document in self.documents]}

    def between(self, start: int, end: int) -> Bucket:
        """The sum of the buckets that lie within `start <= t < end`."""
        return self._sum(self._table(), start, end)

    def as_dict(self) -> list[dict]:
        """One JSON-able row per bucket that saw a token.

        Each has `from`, `to`, `tokens`, the perplexities `ppl_reference` and `ppl`, `rise` and `rise_error` (shares,
        see `Bucket`), `kl` (nats a token), `same_top1` (a share), `max_abs_diff` (of logits) and `top1_gap`: where the
        top token differs, the largest lead (in logits) that the reference gave its own. A lead that rounding can
        overturn is a tie, not a difference.
        """
        table = self._table()
        buckets = [self._sum(table, start, end) for start, end in pairwise(self.edges)]
        return [bucket.as_dict() for bucket in buckets if bucket.tokens]

    def _table(self) -> Tensor:
        """Every document's sums on the CPU, [documents, buckets, columns] fp64."""
        if not self.documents:
            return torch.zeros(0, len(self.edges) - 1, len(SUMS) + len(LARGEST), dtype=torch.float64)
        return torch.stack(self.documents).cpu()

    def _sum(self, table: Tensor, start: int, end: int) -> Bucket:
        """The buckets of `table` that lie within `start <= t < end` as one."""
        inside = [start <= first and last <= end for first, last in pairwise(self.edges)]
        table = table[:, inside]
        total = Bucket(start, end)
        if not table.numel():
            return total
        documents = table[..., : len(SUMS)].sum(1)
        for name, value in zip(SUMS, documents.sum(0).tolist(), strict=True):
            setattr(total, name, int(value) if name in COUNTS else value)
        for name, value in zip(LARGEST, table[..., len(SUMS) :].amax((0, 1)).tolist(), strict=True):
            setattr(total, name, value)
        total.rise, total.rise_error = _rise(documents)
        return total


def positions_at_once(device: torch.device, vocabulary: int) -> int:
    """Positions whose logits are compared at a time: on a GPU as many as make one fp32 tensor of 256 MB.

    Args:
        device: where they are compared.
        vocabulary: V of the logits [T, V].
    """
    return max(256, 2**26 // vocabulary) if device.type == "cuda" else 256


def compare_by_position(
    reference_logits: Tensor, logits: Tensor, labels: Tensor, edges: Sequence[int], chunk: int | None = None
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


def _compare(reference_logits: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What a chunk of positions adds to its bucket; nothing here waits for the device.

    Args:
        reference_logits: [C, V].
        logits: [C, V].
        labels: [C] int64.

    Returns:
        [len(SUMS)] and [len(LARGEST)] fp64.
    """
    # [C, V] in fp32
    reference, other = reference_logits.float(), logits.float()
    difference = (reference - other).abs_().amax()
    # [C]: how much more the reference gives its own top token than the other's
    best, other_best = reference.argmax(-1), other.argmax(-1)
    gap = reference.amax(-1) - reference.gather(-1, other_best[:, None]).squeeze(-1)
    same = best == other_best
    reference, other = reference.log_softmax(-1), other.log_softmax(-1)
    has_label = labels != NO_LABEL
    index = labels.where(has_label, 0)[:, None]
    nll_reference, nll = (
        -log_p.gather(-1, index).squeeze(-1).where(has_label, 0).double().sum() for log_p in (reference, other)
    )
    kl = (reference.exp() * reference.sub_(other)).sum(-1).double().sum()
    tokens = torch.full_like(kl, len(labels))
    sums = torch.stack([tokens, has_label.sum().double(), same.sum().double(), nll_reference, nll, kl])
    return sums, torch.stack([difference, gap.where(~same, 0).amax()]).double()


def _rise(documents: Tensor) -> tuple[float | None, float | None]:
    """`rise` and `rise_error` of a bucket.

    Args:
        documents: the bucket's sums of each document, [documents, len(SUMS)] fp64.
    """
    labelled, reference, other = (documents[:, SUMS.index(name)] for name in ("labelled", "nll_reference", "nll"))
    differences = ((other - reference) / labelled)[labelled > 0]
    mean = float(differences.mean())  # NaN of none
    if not mean < 700:
        return None, None
    error = math.exp(mean) * float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
    return _finite(math.expm1(mean)), _finite(error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(nll: float, tokens: int) -> float | None:
    # exp overflows beyond 709 nats a token
    return math.exp(nll / tokens) if tokens and math.isfinite(nll) and nll / tokens < 700 else None
