"""One decoding step of the operation in a CUDA graph, beside every attention of PyTorch, in one run on one GPU.

    python -m nsa_hf.recipes.benchmarks.decode                                  two shapes, 8k to 128k
    python -m nsa_hf.recipes.benchmarks.decode --configs 9:3:64 --queries 1,4   another shape; four tokens at a time
    python -m nsa_hf.recipes.benchmarks.decode --batches 32GiB --tokens 8192,131072   growth where the card is full

Keys and values lie as in a static cache. A batch of "4GiB" is the one whose keys and values take so much. A graph goes
over so many caches that none is still in the GPU's own cache when its turn comes; times are those of one step.

Before a shape is timed, rows of its result are compared with the float64 reference; a wrong one is not timed and the
exit code is 1. `bytes` are the keys, values and compressed entries that a step reads by the paper's count: the
entries, n blocks and w tokens (5,631 tokens at 64k). In `bytes_once` the blocks that lie in the window count once;
`gb_s` is of these. `ceiling` is dense bytes over `bytes`, and `times_dense` the fastest dense time over this one.
System `nsa` has one set of keys and values for all branches, as a converted model has by default; in `nsa-independent`
the window has its own, as in the paper, and nothing is read for two branches. In `nsa-index` blocks are chosen by 32
channels a head and there is no compressed branch; in `nsa-index8` these are kept in 8 bits. Rows are appended to a CSV
as they come, the dense ones of a shape first.
"""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa_hf.dense_kernels import DENSE_KERNELS
from nsa_hf.kernels import n_blocks, nsa_attention, quantize_index_keys

from .common import (
    INDEX_CHANNELS,
    Heads,
    Times,
    card_rates,
    draw_and_say,
    make_parser,
    no_gpu,
    relative_error,
    stamp,
    write_rows,
)
from .figures import (
    COLUMNS,
    FULL,
    INDEX_BYTES,
    SIZES,
    SPARSE,
    bytes_read,
    draw,
    full_batch,
    growth,
    printed,
    read_curves,
    step_row,
)

CONFIGS = ("64:4:128", "32:8:128")
TOKENS = (8192, 16384, 32768, 65536, 131072)
# Bytes that a graph's steps read together: several times the cache of any GPU.
COLD = 200_000_000
Step = Callable[[], Tensor]


class WrongResult(Exception):
    """A sparse step whose result is wrong; the message says in what."""


class Cache(NamedTuple):
    """A full static cache, bf16, with keys and values of a window of its own.

    Attributes:
        keys, values: `[B, Hk, S, D]`.
        k_cmp, v_cmp: the compressed entries, `[B, N, Hk, D]`.
        k_win, v_win: the window's, `[B, Hk, w + T - 1, D]` for T queries.
        index_keys: of the index, `[B, Hk, S, c]`; the same as `codes` int8 and `scales [B, Hk, S]`.
        lengths: tokens of each row, int32 `[B]`.
    """

    keys: Tensor
    values: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor
    v_win: Tensor
    index_keys: Tensor
    codes: Tensor
    scales: Tensor
    lengths: Tensor

    def in_float64(self) -> Cache:
        """The same numbers in float64, but for the scales, which have one type."""
        wide = (x.double() if x.is_floating_point() else x for x in self)
        return Cache(*wide)._replace(scales=self.scales)


class Query(NamedTuple):
    """The queries of a step `[B, T, Hq, Dk]`, those of the index `[B, T, Hq, c]`, and gates `[B, T, Hq, 3]`, bf16."""

    q: Tensor
    q_index: Tensor
    gates: Tensor


def make_cache(heads: Heads, tokens: int, batch: int, device: str, queries: int = 1) -> Cache:
    """A cache of random numbers with `tokens` tokens in each row, for steps of `queries`."""
    entries = n_blocks(tokens, SIZES.kernel_size, SIZES.kernel_stride)
    dims = (heads.key_dim, heads.value_dim)
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    keys, values = (torch.randn(batch, heads.kv_heads, tokens, dim, **bf16) for dim in dims)
    # as large as a mean of normal numbers is
    k_cmp, v_cmp = (
        torch.randn(batch, entries, heads.kv_heads, dim, **bf16).mul_(SIZES.kernel_size**-0.5) for dim in dims
    )
    near = min(tokens, SIZES.window_size + queries - 1)
    k_win, v_win = (torch.randn(batch, heads.kv_heads, near, dim, **bf16) for dim in dims)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    index = torch.randn(batch, heads.kv_heads, tokens, INDEX_CHANNELS, **bf16)
    return Cache(keys, values, k_cmp, v_cmp, k_win, v_win, index, *quantize_index_keys(index), lengths)


def make_query(heads: Heads, batch: int, queries: int, device: str) -> Query:
    """Random queries and gates of a step."""
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    q = torch.randn(batch, queries, heads.query_heads, heads.key_dim, **bf16)
    q_index = torch.randn(batch, queries, heads.query_heads, INDEX_CHANNELS, **bf16)
    return Query(q, q_index, torch.rand(batch, queries, heads.query_heads, 3, **bf16))


def nsa(cache: Cache, query: Query, backend: str, system: str = "nsa", **options: Any) -> Any:
    """A sparse step.

    Args:
        system: one of SPARSE.
        options: further arguments of `nsa_attention`, whose result is returned.
    """
    keys, values, k_win, v_win = (x.transpose(1, 2) for x in (cache.keys, cache.values, cache.k_win, cache.v_win))
    entries: tuple[Tensor | None, Tensor | None] = (cache.k_cmp, cache.v_cmp)
    if system == "nsa-independent":
        # all rows are full, so the window's buffers hold just the last tokens, which the operation takes
        options |= {"k_win": k_win, "v_win": v_win}
    else:
        options |= {"lengths": cache.lengths}
    if system in INDEX_BYTES:
        entries = (None, None)
        index = cache.index_keys if system == "nsa-index" else cache.codes
        options |= {"q_index": query.q_index, "k_index": index.transpose(1, 2)}
    if system == "nsa-index8":
        options |= {"k_index_scales": cache.scales.transpose(1, 2)}
    return nsa_attention(query.q, keys, values, *entries, query.gates, backend=backend, **options)


def dense(cache: Cache, query: Query, fold: bool) -> Tensor:
    """A dense step, `[B, T, Hq, Dv]`. With several queries each sees all keys, which costs as many bytes.

    Args:
        fold: give the query heads of a group to the kernel as rows of one head, `[B, Hk, G * T, D]`.
    """
    batch, queries, query_heads, dim = query.q.shape
    kv_heads = cache.keys.shape[1]
    q = query.q.transpose(1, 2)
    if not fold:
        return scaled_dot_product_attention(q, cache.keys, cache.values, enable_gqa=True).transpose(1, 2)
    q = q.reshape(batch, kv_heads, -1, dim)
    out = scaled_dot_product_attention(q, cache.keys, cache.values)
    return out.reshape(batch, query_heads, queries, -1).transpose(1, 2)


def check(cache: Cache, query: Query, backend: str, system: str = "nsa") -> list[str]:
    """Compares the first and the last row of a step with the float64 reference.

    Of two blocks whose scores differ by less than rounding, either may be chosen: 2 % of the blocks may differ, and
    outputs are compared where none does. bf16 has 8 bits, so .01 of a norm is more than rounding.

    Returns:
        A line for each row that is wrong.
    """
    out, selection = nsa(cache, query, backend, system, return_selection=True)
    wrong = []
    for row in sorted({0, query.q.shape[0] - 1}):
        exact = Cache(*(x[row : row + 1] for x in cache)).in_float64()
        queries = Query(*(x[row : row + 1].double() for x in query))
        truth, chosen = nsa(exact, queries, "reference", system, return_selection=True)
        same = (selection[row : row + 1, ..., None] == chosen[..., None, :]).any(-1)
        group = query.q.shape[2] // selection.shape[2]
        agree = same.all(-1).repeat_interleave(group, dim=2)
        share = float(same.float().mean())
        if share < 0.98 or not agree.any():
            wrong.append(f"row {row}: {1 - share:.2%} of the selected blocks are others")
        elif not (error := relative_error(out[row : row + 1][agree], truth[agree])) <= 0.01:
            wrong.append(f"row {row}: the output is off by {error:.4f} of its norm")
    return wrong


def timed(steps: list[Step], budget_ms: float = 100) -> tuple[Times, Tensor]:
    """Times steps in one CUDA graph.

    Args:
        steps: captured one after the other; each should read other memory.
        budget_ms: about how long the graph is replayed.

    Returns:
        The times of one step, and the first step's result.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps[:2]:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = steps[0]()
        for step in steps[1:]:
            step()

    def replays(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        for event in events[:-1]:
            event.record()
            graph.replay()
        events[-1].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events[:-1], events[1:], strict=True)]

    first = min(replays(3))
    times = torch.tensor(replays(int(min(100, max(10, budget_ms / first)))), dtype=torch.float64) / len(steps)
    median, low, high = times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return (median, low, high), result


def measure_shape(
    heads: Heads, tokens: int, batch: int, queries: int, device: str = "cuda", backend: str = "triton"
) -> Iterator[tuple[str, Times | str]]:
    """Measures every system at one shape, after comparing the sparse ones with the reference.

    Args:
        heads, tokens, batch, queries: the shape.
        backend: of the sparse ones.

    Yields:
        Systems and their times, dense ones first; for a dense one that cannot run, the reason instead of times.

    Raises:
        WrongResult: the result of a sparse step is wrong.
    """
    read = batch * min(bytes_read(heads, tokens, system, queries) for system in SPARSE)
    caches = [make_cache(heads, tokens, batch, device, queries) for _ in range(-(-COLD // read))]
    pairs = [(cache, make_query(heads, batch, queries, device)) for cache in caches * -(-4 // len(caches))]
    for system in SPARSE:
        if wrong := check(*pairs[0], backend, system):
            raise WrongResult(f"{system}: {'; '.join(wrong)}")
    for name, kernel in DENSE_KERNELS.items():
        for fold in (False, True):
            system = f"{name}, folded" if fold else name
            try:
                with sdpa_kernel(kernel):
                    times: Times | str = timed([partial(dense, *pair, fold) for pair in pairs])[0]
            except RuntimeError as reason:
                times = str(reason).splitlines()[0]
            yield system, times
    for system in SPARSE:
        times, result = timed([partial(nsa, *pair, backend, system) for pair in pairs])
        if not (error := relative_error(result, nsa(*pairs[0], backend, system).double())) <= 0.01:
            raise WrongResult(f"{system}: in a CUDA graph the output is off by {error:.4f} of its norm")
        yield system, times


def batch_sizes(text: str) -> list[tuple[int, str]]:
    """What `--batches` names: numbers, each of "rows" or "GiB".

    Raises:
        argparse.ArgumentTypeError: what is wanted and what came.
    """
    sizes = []
    for size in text.split(","):
        number = size.removesuffix("GiB")
        if not number.isdecimal() or int(number) < 1:
            raise ArgumentTypeError(f"whole numbers of rows or of GiB, as in 4GiB,1, got {size}")
        sizes.append((int(number), "rows" if number == size else "GiB"))
    return sizes


def write_shape(
    path: Path, source: dict[str, str], rate: float, heads: Heads, tokens: int, batch: int, queries: int
) -> None:
    """Measures one shape, prints its rows and appends them to the CSV.

    Args:
        path: the CSV.
        source: the columns STAMP.
        rate: bytes a second that the card copies.

    Raises:
        WrongResult: the result of a sparse step is wrong.
    """
    fastest: float | None = None
    for system, times in measure_shape(heads, tokens, batch, queries):
        if isinstance(times, str):
            print(f"{heads.name} {tokens} batch {batch} {system}: not measured, {times}", flush=True)
            continue
        dense_ms = fastest if system in SPARSE else None
        row = source | step_row(heads, tokens, batch, queries, system, times, dense_ms, rate)
        if system not in SPARSE:
            fastest = min(times[0], fastest or times[0])
        print(printed(row), flush=True)
        write_rows(path, COLUMNS, [row])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser(__doc__, "recipes/results/decode.csv")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="Hq:Hk:D or Hq:Hk:Dk/Dv, separated by commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="lengths, separated by commas")
    parser.add_argument(
        "--batches",
        type=batch_sizes,
        default="4GiB,1",
        help=f"rows, or GiB of keys and values ({FULL} are drawn): 4GiB,1",
    )
    parser.add_argument("--queries", default="1", help="tokens of a step, separated by commas")
    options = parser.parse_args(arguments)
    if no_gpu():
        return 2
    source = stamp(options.commit)
    _, rate, _ = card_rates()
    print(f"{source['gpu']} copies at {rate * 1e-9:.0f} GB/s", flush=True)
    failed = False
    lengths, counts = ([int(x) for x in text.split(",")] for text in (options.tokens, options.queries))
    for config, tokens, (number, unit), queries in product(
        options.configs.split(","), lengths, options.batches, counts
    ):
        heads = Heads.parse(config)
        batch = number if unit == "rows" else full_batch(heads, tokens, number)
        try:
            write_shape(options.out, source, rate, heads, tokens, batch, queries)
        except WrongResult as error:
            failed = True
            shape = f"{heads.name}, {tokens} tokens, batch {batch}, {queries} queries"
            print(f"error: {shape} is not timed, since it is wrong: {error}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    if options.out.exists():
        print("\n".join(growth(read_curves(options.out))))
    draw_and_say(options.out, draw)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
