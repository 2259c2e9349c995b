"""The bytes that a decoding step reads, and what decode.py writes, prints and draws of its time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from nsa_hf.kernels import Sizes, n_blocks

from .common import INDEX_CHANNELS, STAMP, Heads, Times, lengths_below, make_axes, save_figure

COLUMNS = (
    *STAMP,
    "config",
    "tokens",
    "batch",
    "queries",
    "system",
    "part",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "bytes",
    "bytes_once",
    "gb_s",
    "share_of_card",
    "times_dense",
    "ceiling",
    "share_of_ceiling",
)
SIZES = Sizes()
# The sparse systems: one set of keys and values for all branches; a window that has its own; blocks chosen by an index
# and no compressed branch, with the index's keys in 16 and in 8 bits.
SPARSE = ("nsa", "nsa-independent", "nsa-index", "nsa-index8")
# Bytes of the index's key of one token and head, with the scale of 8 bits.
INDEX_BYTES = {"nsa-index": 2 * INDEX_CHANNELS, "nsa-index8": INDEX_CHANNELS + 2}
# The batches that are drawn beside that of 1, by the GiB that their keys and values take.
FULL = (4, 32)


def token_bytes(heads: Heads) -> int:
    """Bytes of one token's keys and values in bf16."""
    return 2 * heads.kv_heads * (heads.key_dim + heads.value_dim)


def full_batch(heads: Heads, tokens: int, gib: int) -> int:
    """The batch whose keys and values take `gib` GiB, at least 1."""
    return max(1, (gib << 30) // (tokens * token_bytes(heads)))


def bytes_read(heads: Heads, tokens: int, system: str, queries: int = 1, *, once: bool = False) -> int:
    """How many bytes of keys, values and compressed entries or index keys one row of a step reads.

    With several queries the forced blocks are counted once for all of them, the others as if each query chose others.

    Args:
        heads, tokens, queries: the shape of the step.
        system: one of SPARSE, or a dense one.
        once: count the local blocks' tokens that lie in a window without keys of its own once.
    """
    if system not in SPARSE:
        return tokens * token_bytes(heads)
    s = SIZES
    forced = s.init_blocks + s.local_blocks
    chosen = min((forced + queries * (s.topk - forced)) * s.block_size, tokens)
    window = min(s.window_size + queries - 1, tokens)
    local = tokens - max(0, (tokens - 1) // s.block_size - s.local_blocks + 1) * s.block_size
    attended = chosen + window - (min(local, window) if once and system != "nsa-independent" else 0)
    if system in INDEX_BYTES:
        return attended * token_bytes(heads) + tokens * heads.kv_heads * INDEX_BYTES[system]
    return (attended + n_blocks(tokens, s.kernel_size, s.kernel_stride)) * token_bytes(heads)


def step_row(
    heads: Heads, tokens: int, batch: int, queries: int, system: str, times: Times, dense_ms: float | None, rate: float
) -> dict[str, object]:
    """A row of the CSV but for its stamp.

    Args:
        heads, tokens, batch, queries: the shape of the step.
        system: one of SPARSE, or a dense one.
        times: of one step.
        dense_ms: the fastest dense time, beside which a sparse step is put.
        rate: bytes a second that the card copies.
    """
    dense_bytes = batch * tokens * token_bytes(heads)
    read, once = (batch * bytes_read(heads, tokens, system, queries, once=x) for x in (False, True))
    gb_s = once / times[0] * 1e-6
    row: dict[str, object] = {
        "config": heads.name,
        "tokens": tokens,
        "batch": batch,
        "queries": queries,
        "system": system,
        "part": "step",
        "bytes": read,
        "bytes_once": once,
        "gb_s": f"{gb_s:.0f}",
        "share_of_card": f"{gb_s * 1e9 / rate:.3f}",
    }
    row |= zip(("median_ms", "p20_ms", "p80_ms"), (f"{time:.5f}" for time in times), strict=True)
    if dense_ms is not None:
        faster, ceiling = dense_ms / times[0], dense_bytes / read
        row |= {"times_dense": f"{faster:.2f}", "ceiling": f"{ceiling:.2f}"}
        row["share_of_ceiling"] = f"{faster / ceiling:.3f}"
    return row


def printed(row: dict[str, object]) -> str:
    """A row in one line."""
    beside = ""
    if "ceiling" in row:
        beside = (
            f"  {row['times_dense']:>6} times dense, of {row['ceiling']}; {row['bytes']} bytes by the paper's count"
        )
    return (
        f"{row['config']:9} {row['tokens']:7} batch {row['batch']:4} queries {row['queries']:2} {row['system']:18} "
        f"{row['median_ms']:>9} ms  {row['bytes_once']:>11} bytes  {row['gb_s']:>5} GB/s, {row['share_of_card']} of "
        f"the card's{beside}"
    )


# Microseconds a row by length, of a batch (`4 GiB`, `32 GiB` or `batch 1`), a config, and `dense` or one of SPARSE.
Curves = dict[tuple[str, str, str], dict[int, float]]


def read_curves(path: Path) -> Curves:
    """The curves in a CSV: steps with one query, the latest of each shape, and the fastest dense system of a run."""
    curves: Curves = {}
    fastest: dict[tuple, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["queries"] != "1" or row["part"] != "step":
                continue
            tokens, batch, time = int(row["tokens"]), int(row["batch"]), float(row["median_ms"])
            heads, system = Heads.parse(row["config"]), row["system"] if row["system"] in SPARSE else "dense"
            kinds = {full_batch(heads, tokens, gib): f"{gib} GiB" for gib in FULL} | {1: "batch 1"}
            if (kind := kinds.get(batch)) is None:
                continue
            if system == "dense":
                shape = (row["run_id"], kind, row["config"], tokens)
                time = fastest[shape] = min(time, fastest.get(shape, time))
            curves.setdefault((kind, row["config"], system), {})[tokens] = time / batch * 1e3
    return curves


def growth(curves: Curves) -> list[str]:
    """A line for each curve: how many times as long a step takes, and how many times the bytes it reads, at the longest
    length beside the shortest."""
    lines = []
    for (kind, config, system), times in sorted(curves.items()):
        first, last = min(times), max(times)
        if first < last:
            heads, grown = Heads.parse(config), times[last] / times[first]
            paper, once = (
                bytes_read(heads, last, system, once=x) / bytes_read(heads, first, system, once=x)
                for x in (False, True)
            )
            read = f"{paper:.2f}" + (f", those of the window once {once:.2f}" if once != paper else "")
            lines.append(f"{config} {kind}, {system}: {grown:.2f} times from {first} to {last}, bytes {read}")
    return lines


def draw(path: Path) -> Path | None:
    """Draws the time of a row over length, sparse and the fastest dense.

    Args:
        path: the CSV.

    Returns:
        The picture beside it; None where the CSV has no curve.
    """
    if not (curves := read_curves(path)):
        return None
    configs = sorted({config for _, config, _ in curves})
    titles = {f"{gib} GiB": f"{gib} GiB of keys and values" for gib in FULL} | {"batch 1": "batch 1"}
    drawn = [kind for kind in titles if any(kind == key[0] for key in curves)]
    figure, axes = make_axes(len(drawn), squeeze=False)
    named: dict[str, Any] = {}
    for axis, kind in zip(axes[0], drawn, strict=True):
        axis.set(title=titles[kind], yscale="log")
        lengths_below(axis, (tokens for key, times in curves.items() if key[0] == kind for tokens in times))
        for (_, config, system), times in sorted(x for x in curves.items() if x[0][0] == kind):
            lengths, costs = zip(*sorted(times.items()), strict=True)
            line = {"nsa": "-", "nsa-independent": ":", "nsa-index": "-.", "nsa-index8": (0, (1, 3))}.get(system, "--")
            style = {"color": f"C{configs.index(config)}", "linestyle": line}
            named[f"{config}, {system}"] = axis.plot([n / 1024 for n in lengths], costs, marker="o", **style)[0]
    axes[0][0].set_ylabel("microseconds a row and layer")
    named = dict(sorted(named.items()))
    axes[0][-1].legend(named.values(), named.keys(), loc="upper left", bbox_to_anchor=(1.02, 1))
    return save_figure(figure, path)
