"""Speed and memory of the operation and its parts on one GPU, beside FlashAttention-2 and cuDNN, in one run.

    python -m nsa_hf.recipes.benchmarks.operation                                     every shape, 4k to 128k
    python -m nsa_hf.recipes.benchmarks.operation --configs 9:3:64 --tokens 8192      one shape

System `nsa` is the paper's; `nsa-index` chooses blocks by 32 channels of a head, and has no compressed branch.
Forward and backward are compared with the float64 reference first; a configuration that is wrong is not timed and the
exit code is 1. Rows are appended to a CSV, one for each (config, tokens, inputs, system, part), so that a run that was
cut off leaves what it measured. `flops` and `bytes` are what the part has to do at least. At the start of the run the
card's own rates are measured (system `card`), and `floor_ms` is the longer of the two times that these take at them.
`tflop_s` and `gb_s` are `flops` and `bytes` over the measured time, and `share_of_card` is `floor_ms` over it.
Of short texts there is also what the host takes until both passes are queued (part `forward + backward, host`),
`launches`, how many kernels, fills and copies the GPU gets, and these ones' own time (`forward + backward, kernels`).
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import DeviceType, ProfilerActivity, profile

from nsa_hf.kernels import nsa_attention

from .common import (
    INDEX_CHANNELS,
    STAMP,
    Cost,
    Heads,
    Times,
    achieved,
    card_rates,
    draw_and_say,
    lengths_below,
    make_axes,
    make_parser,
    measure,
    no_gpu,
    quantiles,
    relative_error,
    save_figure,
    stamp,
    wait,
    write_rows,
)
from .parts import SIZES, Inputs, Stages, make_inputs

SPARSE = ("nsa", "nsa-index")
CONFIGS = ("64:4:128", "32:8:128", "16:8:128", "64:4:192/128", "9:3:64")
TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
# The host takes the same time for every length, and up to here it may be the longer one.
HOST_TOKENS = 8192
COLUMNS = (
    *STAMP,
    "config",
    "tokens",
    "inputs",
    "system",
    "part",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "peak_mib",
    "flops",
    "bytes",
    "floor_ms",
    "tflop_s",
    "gb_s",
    "share_of_card",
    "launches",
)


def sparse(system: str, x: Inputs, backend: str = "triton") -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """The forward pass of one of SPARSE, and its inputs that have gradients, by name."""
    index = {f"{name}_index": getattr(x, name)[..., :INDEX_CHANNELS].contiguous() for name in "qk"}
    names = ("q", "k", "v", "k_cmp", "v_cmp", "gates") if system == "nsa" else ("q", "k", "v", "gates")
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
    inputs = leaves if system == "nsa" else leaves | index | {"k_cmp": None, "v_cmp": None}

    def forward() -> Tensor:
        out = nsa_attention(**inputs, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return forward, leaves


def check(heads: Heads, tokens: int = 1536, systems: Sequence[str] = SPARSE) -> list[str]:
    """Compares forward and backward of the kernels with the float64 reference.

    bf16 has 8 bits: a rounding is at most 2^-9 = .002 of a number, and a result passes through a few of them
    (probabilities, partial results, gradients of logits), so .01 of a tensor's norm is more than rounding.

    Args:
        tokens: a multiple of 16, as the lengths that are timed are, so that the very same kernels run.
        systems: those of SPARSE among them are compared.

    Returns:
        A line for each tensor that is wrong.
    """
    inputs, wrong = make_inputs(heads, tokens, "random", seed=1), []
    for system in (one for one in systems if one in SPARSE):
        results = {}
        for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
            forward, leaves = sparse(system, Inputs(*(x.to(dtype) for x in inputs)), backend)
            out = forward()
            gradients = torch.autograd.grad(out, list(leaves.values()), inputs.dout.to(dtype))
            results[backend] = [out.detach(), *gradients]
        names = ("output", *(f"gradient of {name}" for name in leaves))
        for name, result, truth in zip(names, results["triton"], results["reference"], strict=True):
            error = relative_error(result, truth)
            # `not <=`: NaN is wrong too
            if not error <= 0.01:
                wrong.append(f"{heads.name}, {system}: {name} is off by {error:.4f} of its norm")
    return wrong


def peak_mib(call: Callable[[], object]) -> float:
    """The most memory allocated during the call, in MiB; what was allocated before it counts too."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def costs(heads: Heads, tokens: int) -> dict[str, Cost]:
    """The least work of each part: each pair of query and key once, each tensor read or written once."""
    s, pair = SIZES, 2.0 * heads.query_heads * (heads.key_dim + heads.value_dim)
    blocks = max(0, (tokens - s.kernel_size) // s.kernel_stride + 1)
    seen = tokens * blocks / 2
    chosen = tokens * min(s.topk * s.block_size, tokens / 2)
    near = tokens * min(s.window_size, tokens / 2)
    # a query's own block is half full on average
    local = tokens * min((s.local_blocks - 0.5) * s.block_size, tokens / 2)
    rows, width = 2.0 * tokens * heads.query_heads, heads.key_dim + heads.value_dim
    kv = 2.0 * tokens * heads.kv_heads * width
    attention = rows * width + kv
    parts = {
        "compression": Cost(0, kv * (1 + 1 / s.kernel_stride)),
        "attention": Cost(seen * pair, rows * width + kv / s.kernel_stride),
        "scores + top-k": Cost(seen * 2 * heads.query_heads * heads.key_dim, rows * heads.key_dim),
        "other selected blocks, combination": Cost((chosen - local) * pair, attention + 4 * rows * heads.value_dim),
        "window and local blocks": Cost(near * pair, attention + rows * heads.value_dim),
    }
    # of the whole passes: the local blocks' keys are the window's too
    near_flops = (chosen - local) * pair + parts["window and local blocks"].flops
    branches = parts["attention"].flops + near_flops
    parts["forward"] = Cost(branches + parts["scores + top-k"].flops, rows * width + kv)
    # five products instead of two in each branch, no scores
    parts["backward"] = Cost(2.5 * branches, 2 * (rows * width + kv))
    index_bytes = rows * INDEX_CHANNELS + 2.0 * tokens * heads.kv_heads * INDEX_CHANNELS
    index = Cost(tokens * tokens * heads.query_heads * INDEX_CHANNELS, index_bytes)
    parts["index scores + top-k"] = index
    parts["index forward"] = Cost(index.flops + near_flops, rows * width + kv + index_bytes)
    parts["index backward"] = Cost(2.5 * near_flops, 2 * (rows * width + kv))
    # of the products of q and k, dout and v, p and dout, ds and q, ds and k, those that a part takes
    key, value = (2.0 * heads.query_heads * dim for dim in (heads.key_dim, heads.value_dim))
    dq, dkv = 2 * key + value, 2 * (key + value)
    in_out, float32 = rows * width + kv, 2 * rows * heads.key_dim
    parts |= {
        "backward, gates": Cost(0, 4 * rows * heads.value_dim),
        "backward, compressed dq": Cost(seen * dq, rows * width + float32 + kv / s.kernel_stride),
        "backward, compressed dk dv": Cost(seen * dkv, rows * width + 2 * kv / s.kernel_stride),
        "backward, window and local blocks dq": Cost(near * dq, in_out + 2 * float32),
        "backward, window and local blocks dk dv": Cost(near * dkv, in_out + 3 * kv),
        "backward, selection": Cost((chosen - local) * (dkv + key), in_out + 1.5 * float32 + 4 * kv),
    }
    dense = tokens * tokens / 2 * pair
    parts["dense forward"] = Cost(dense, attention)
    parts["dense backward"] = Cost(2.5 * dense, 2 * attention)
    return parts


def whole(system: str, x: Inputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A system's forward pass, and the tensors whose gradients its backward pass gives."""
    if system in SPARSE:
        forward, by_name = sparse(system, x)
        return forward, list(by_name.values())
    backend = SDPBackend.FLASH_ATTENTION if system == "fa2" else SDPBackend.CUDNN_ATTENTION
    q, k, v = (tensor.transpose(1, 2) for tensor in x[:3])
    if system == "fa2" and q.shape[-1] != v.shape[-1]:
        v = torch.nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1]))
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]

    def dense() -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = leaves
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return dense, leaves


def measure_system(system: str, x: Inputs) -> Iterator[tuple[str, Times, float]]:
    """Measures the passes of a whole system: "forward" or "backward", times, peak memory in MiB."""
    forward, leaves = whole(system, x)
    peak_forward = peak_mib(forward)
    out = forward()
    dout = x.dout if system in SPARSE else x.dout.transpose(1, 2)
    if out.shape[-1] != dout.shape[-1]:
        dout = torch.nn.functional.pad(dout, (0, out.shape[-1] - dout.shape[-1]))
    with torch.no_grad():
        times = measure(forward)
    yield "forward", times, peak_forward
    graph = [out]
    del out
    times = measure(lambda: torch.autograd.grad(graph[0], leaves, dout, retain_graph=True))
    graph.clear()
    yield "backward", times, peak_mib(lambda: torch.autograd.grad(forward(), leaves, dout))


class Both(NamedTuple):
    """Forward and backward pass together.

    Attributes:
        host: times until both are queued.
        launches: kernels, fills and copies that the GPU gets.
        kernels_ms: their own time, without what lies between them.
    """

    host: Times
    launches: int
    kernels_ms: float


def of_the_gpu(events: Iterable[Any]) -> tuple[int, float]:
    """Of a profile's events, how many are the GPU's (kernels, fills and copies), and their milliseconds."""
    times = [event.time_range.elapsed_us() / 1e3 for event in events if event.device_type == DeviceType.CUDA]
    return len(times), sum(times)


def measure_both(system: str, x: Inputs, calls: int = 50) -> Both:
    """Measures forward and backward pass of a system, with nothing queued before.

    Args:
        calls: how many are timed.
    """
    device = x.q.device.type
    forward, leaves = whole(system, x)
    dout = torch.ones_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), leaves, dout)

    both()
    milliseconds = []
    for _ in range(calls):
        start = wait(device)
        both()
        milliseconds.append(1e3 * (time.perf_counter() - start))
        wait(device)
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as profiled:
        both()
        wait(device)
    return Both(quantiles(milliseconds), *of_the_gpu(profiled.events()))


def draw(path: Path) -> Path | None:
    """Draws how many times as fast as FlashAttention-2 the operation is, over length.

    Args:
        path: the CSV.

    Returns:
        The picture beside it; None where no length has both.
    """
    times: dict[tuple, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] in ("forward", "backward") and row["inputs"] == "random":
                key = (row["part"], row["config"], row["system"], int(row["tokens"]))
                times[key] = float(row["median_ms"])
    if not any(system == "fa2" and (part, config, "nsa", n) in times for part, config, system, n in times):
        return None
    figure, axes = make_axes(2, sharey=True)
    for axis, part in zip(axes, ("forward", "backward"), strict=True):
        for config in sorted({key[1] for key in times}):
            lengths = sorted({n for p, c, s, n in times if p == part and c == config and s == "nsa"})
            lengths = [n for n in lengths if (part, config, "fa2", n) in times]
            ratio = [times[part, config, "fa2", n] / times[part, config, "nsa", n] for n in lengths]
            line = axis.plot([n // 1024 for n in lengths], ratio, marker="o", label=config)[0]
            indexed = [n for n in lengths if (part, config, "nsa-index", n) in times]
            ratio = [times[part, config, "fa2", n] / times[part, config, "nsa-index", n] for n in indexed]
            axis.plot([n // 1024 for n in indexed], ratio, ":", color=line.get_color())
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=part, yscale="log")
        lengths_below(axis, (key[3] for key in times))
        axis.set_yticks((0.1, 0.2, 0.5, 1, 2, 5, 10), labels=("0.1", "0.2", "0.5", "1", "2", "5", "10"))
    axes[0].set_ylabel("times as fast as FlashAttention-2")
    if any(key[2] == "nsa-index" for key in times):
        axes[0].plot([], [], ":", color="grey", label="by an index")
    axes[0].legend(loc="lower right", fontsize="small")
    return save_figure(figure, path)


class Case(NamedTuple):
    """The columns of what is measured.

    Attributes:
        config: of heads, as `Heads.parse` takes it.
        tokens: length of the text.
        inputs: "random" or "realistic", see `make_inputs`.
    """

    config: str
    tokens: int
    inputs: str


class Recorder:
    """Prints rows and appends them to the CSV; knows what the card can do, which it measures first."""

    def __init__(self, path: Path, source: dict[str, str]) -> None:
        """Measures the card and writes its rows.

        Args:
            path: the CSV.
            source: the columns STAMP.
        """
        self.path, self.source = path, source
        self.flops, self.moved, card = card_rates()
        case = Case("", 0, "random")
        self.write([self.row(case, "card", part, times, cost=cost) for part, times, cost in card])

    def row(
        self,
        case: Case,
        system: str,
        part: str,
        times: Times,
        peak: float | None = None,
        cost: Cost | None = None,
        launches: int | None = None,
    ) -> dict[str, object]:
        """Prints a row of the CSV and returns it.

        Args:
            peak: the most memory, in MiB.
            cost: what the part has to do at least.
            launches: that the part makes.
        """
        median, low, high = (f"{time:.4f}" for time in times)
        row: dict[str, object] = {**self.source, **case._asdict(), "system": system, "part": part}
        row |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "peak_mib": "" if peak is None else round(peak)}
        row |= achieved(cost, times[0], self.flops, self.moved) if cost else {}
        row |= {} if launches is None else {"launches": launches}
        print(
            f"{case.config:13} {case.tokens:7} {case.inputs:9} {system:9} {part:32} {median:>9} ms"
            + (f"  floor {row['floor_ms']:>8}" if cost else ""),
            "" if peak is None else f"  peak {peak:.0f} MiB",
            "" if launches is None else f"  {launches} launches",
            flush=True,
        )
        return row

    def write(self, rows: list[dict[str, object]]) -> None:
        """Appends rows to the CSV."""
        write_rows(self.path, COLUMNS, rows)


def measure_case(recorder: Recorder, heads: Heads, case: Case, systems: Sequence[str], with_parts: bool) -> None:
    """Measures whole passes of the systems, and the parts of the sparse one, and writes their rows.

    A dense system that PyTorch has no kernel for, or no memory, is passed over with a line. Dense ones take the same
    time for all inputs, and are measured with random ones.

    Args:
        systems: of nsa, nsa-index, fa2, cudnn.
        with_parts: the stages of the sparse ones too.
    """
    least = costs(heads, case.tokens)
    x = make_inputs(heads, case.tokens, case.inputs)
    for system in systems:
        if system not in SPARSE and case.inputs != "random":
            continue
        prefix = {"nsa": "", "nsa-index": "index "}.get(system, "dense ")
        try:
            rows = [
                recorder.row(case, system, part, times, peak, least[prefix + part])
                for part, times, peak in measure_system(system, x)
            ]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if system in SPARSE:
                raise
            print(f"{case.config} {case.tokens} {system}: not measured, {str(error).splitlines()[0]}", flush=True)
            continue
        if case.tokens <= HOST_TOKENS:
            host, launches, kernels = measure_both(system, x)
            rows.append(recorder.row(case, system, "forward + backward, host", host, launches=launches))
            rows.append(recorder.row(case, system, "forward + backward, kernels", (kernels,) * 3, launches=launches))
        recorder.write(rows)
    if not with_parts or not {*SPARSE} & {*systems}:
        return
    stages = Stages(x)
    parts = [("nsa", stages.forward), ("nsa", stages.backward), ("nsa-index", stages.index)]
    for system, parts_of in parts:
        for part, call in parts_of().items() if system in systems else ():
            recorder.write([recorder.row(case, system, part, measure(call, 60), cost=least.get(part))])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser(__doc__, "recipes/results/benchmark.csv")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="Hq:Hk:D or Hq:Hk:Dk/Dv, separated by commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="lengths, separated by commas")
    parser.add_argument("--inputs", default="random,realistic", help="random, realistic or both")
    parser.add_argument("--systems", default="nsa,nsa-index,fa2,cudnn", help="which of nsa, nsa-index, fa2, cudnn")
    parser.add_argument("--no-parts", action="store_true", help="only whole passes")
    options = parser.parse_args(arguments)
    if no_gpu():
        return 2
    recorder = Recorder(options.out, stamp(options.commit))
    systems = options.systems.split(",")
    failed = False
    for heads in map(Heads.parse, options.configs.split(",")):
        if wrong := check(heads, systems=systems):
            failed = True
            print("\n".join(["error: not timed, since it is wrong:", *wrong]), file=sys.stderr, flush=True)
            continue
        for tokens in map(int, options.tokens.split(",")):
            for inputs in options.inputs.split(","):
                measure_case(recorder, heads, Case(heads.name, tokens, inputs), systems, not options.no_parts)
                torch.cuda.empty_cache()
    draw_and_say(options.out, draw)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
