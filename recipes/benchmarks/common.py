"""What the benchmarks share: shapes, times, rates of the card, pictures, and a CSV that says where rows come from."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_hf.errors import NsaError

# The columns that say which run, machine and versions a row comes from.
STAMP = ("run_id", "gpu", "torch", "triton", "commit")
Times = tuple[float, float, float]  # median, 20th and 80th percentile in milliseconds
# Channels of the index, where blocks are chosen by one: the first ones of each head.
INDEX_CHANNELS = 32


@dataclass(frozen=True)
class Heads:
    """How many heads an attention has, and how wide they are.

    Attributes:
        name: `Hq:Hk:D` or `Hq:Hk:Dk/Dv`.
    """

    name: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def parse(cls, name: str) -> Heads:
        """The heads that a name stands for."""
        query, kv, dims = name.split(":")
        key_dim, _, value_dim = dims.partition("/")
        return cls(name, int(query), int(kv), int(key_dim), int(value_dim or key_dim))


class Cost(NamedTuple):
    """What a part must do at least: floating-point operations, and bytes read or written."""

    flops: float
    bytes: float


def achieved(cost: Cost, median_ms: float, flops: float, moved: float) -> dict[str, str]:
    """The columns of a part's least work, and of how much of it was done a second.

    Args:
        cost: the least work.
        median_ms: the measured time.
        flops, moved: FLOP/s and bytes/s that the card was measured to give.
    """
    floor_ms = max(cost.flops / flops, cost.bytes / moved) * 1e3
    return {
        "flops": f"{cost.flops:.4g}",
        "bytes": f"{cost.bytes:.4g}",
        "floor_ms": f"{floor_ms:.4f}",
        "tflop_s": f"{cost.flops / median_ms * 1e-9:.4g}",
        "gb_s": f"{cost.bytes / median_ms * 1e-6:.4g}",
        "share_of_card": f"{floor_ms / median_ms:.3f}",
    }


def no_gpu() -> bool:
    """Whether there is no CUDA GPU, which is printed as an error."""
    missing = not torch.cuda.is_available()
    if missing:
        print("error: the benchmark needs a CUDA GPU", file=sys.stderr)
    return missing


def stamp(commit: str | None = None) -> dict[str, str]:
    """The columns `STAMP` of this run.

    Args:
        commit: what to write down as the commit; None: git's.
    """
    import triton

    run_id, gpu = uuid.uuid4().hex[:8], torch.cuda.get_device_name()
    return dict(zip(STAMP, (run_id, gpu, torch.__version__, triton.__version__, commit or git_commit()), strict=True))


def git_commit() -> str:
    """The commit of this folder, or "unknown"."""
    folder = Path(__file__).resolve().parent
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def relative_error(x: Tensor, truth: Tensor) -> float:
    """The norm of the difference over that of `truth`, which is float64."""
    return float((x.detach().double() - truth).norm() / truth.norm().clamp(min=1e-30))


def quantiles(times: Sequence[float]) -> Times:
    """The median, the 20th and the 80th percentile."""
    median, low, high = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    return median, low, high


def measure(call: Callable[[], object], repeat_ms: int = 300) -> Times:
    """The time of a call on the GPU, by events, with the GPU's cache emptied before each.

    After one call that is not counted, at least three are timed: about as many as take `repeat_ms`, at most 100.

    Args:
        call: what is timed.
        repeat_ms: milliseconds that the calls may take together.
    """
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    timed()
    once = timed()
    more = max(2, min(99, round(repeat_ms / once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(more)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return quantiles([once, *(start.elapsed_time(end) for start, end in events)])


def card_rates() -> tuple[float, float, Iterator[tuple[str, Times, Cost]]]:
    """Measures the card: FLOP/s of a bf16 matrix product, bytes/s of a copy (read and written).

    Returns:
        The two rates, and of both measurements the part, its times and its cost.
    """
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product, copy = measure(lambda: a @ b), measure(lambda: target.copy_(source))
    flops, moved = 2 * 8192.0**3, 2.0 * (1 << 30)
    rows = [("matmul", product, Cost(flops, 6 * 8192.0**2)), ("copy", copy, Cost(0, moved))]
    return flops / product[0] * 1e3, moved / copy[0] * 1e3, iter(rows)


def wait(device: str) -> float:
    """The time in seconds when the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def dense_times(path: Path, row: dict[str, Any], same: Iterable[str]) -> list[tuple[float, str]]:
    """Median milliseconds and names of the dense systems in a CSV that is not there or has `system` and `median_ms`.

    Args:
        path: the CSV.
        row: beside which they stand.
        same: the columns in which they are as it is.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [other for other in csv.DictReader(file) if all(other[name] == str(row[name]) for name in same)]
    return [(float(other["median_ms"]), other["system"]) for other in rows if other["system"].startswith("dense")]


def write_rows(path: Path, columns: Sequence[str], rows: list[dict]) -> None:
    """Appends rows to a CSV, which is made with its header when it is not there.

    Args:
        path: the CSV.
        columns: its columns; what a row lacks stays empty.
        rows: values by column.

    Raises:
        NsaError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new and (header := path.open().readline().strip()) != ",".join(columns):
        raise NsaError(f"{path} must have the columns {','.join(columns)}, got {header}: name another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def make_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        description: the benchmark's docstring.
        out: the default of `--out`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help="CSV to append to")
    parser.add_argument("--commit", default=None, help="what to write down as the commit; default: git's")
    return parser


def make_axes(panels: int, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, `panels` side by side; the options are those of `pyplot.subplots`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(0.5 + 5.5 * panels, 4), **options)


def lengths_below(axis: Any, lengths: Iterable[int]) -> None:
    """Labels a logarithmic axis with lengths in thousands of tokens."""
    ticks = sorted({tokens / 1024 for tokens in lengths})
    axis.set(xlabel="tokens (thousands)", xscale="log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)


def save_figure(figure: Any, path: Path) -> Path:
    """Saves a picture of the CSV at `path` beside it, with `.png` for `.csv`."""
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120, bbox_inches="tight")
    return picture


def draw_and_say(path: Path, draw: Callable[[Path], Path | None]) -> None:
    """Draws the picture of a CSV and prints where both are; nothing where there is no CSV.

    Args:
        path: the CSV.
        draw: draws its picture and returns where, None where there is too little to compare.
    """
    if not path.exists():
        return
    try:
        print(f"{path}, {draw(path) or 'no picture: there is too little to compare'}")
    except ImportError:
        print(f"{path}; no picture, since matplotlib is not installed")
