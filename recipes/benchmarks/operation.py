"""Speed and memory of the operation and its parts on one GPU, beside FlashAttention-2 and cuDNN, in one run.

    python -m nsa_hf.recipes.benchmarks.operation                                     every shape, 4k to 128k
    python -m nsa_hf.recipes.benchmarks.operation --configs 9:3:64 --tokens 8192      one shape

Forward and backward are compared with the float64 reference first; a configuration that is wrong is not timed and the
exit code is 1. Rows are appended to a CSV, one for each (config, tokens, inputs, system, part), so that a run that was
cut off leaves what it measured. `flops` and `bytes` are what the part has to do at least; `floor_ms` is the larger of
the two times they take at the rates that this card was measured to give at the start of the run (system `card`).
`tflop_s` and `gb_s` are what of them was done a second, and `share_of_card` the floor's share of the time.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_hf.kernels import nsa_attention

from .common import (
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
    relative_error,
    save_figure,
    stamp,
    write_rows,
)
from .parts import SIZES, Inputs, Stages, make_inputs

CONFIGS = ("64:4:128", "32:8:128", "16:8:128", "64:4:192/128", "9:3:64")
TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
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
)


def check(heads: Heads, tokens: int = 1536) -> list[str]:
    """What is wrong with the kernels at this configuration, against float64; empty: nothing.

    A multiple of 16 tokens, as those that are timed: the very same kernels run.

    bf16 has 8 bits: a rounding is at most 2^-9 = .002 of a number, and a result passes through a few of them
    (probabilities, partial results, gradients of logits), so .01 of a tensor's norm is more than rounding.
    """
    inputs = make_inputs(heads, tokens, "random", seed=1)
    results = {}
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs[:6]]
        out = nsa_attention(*leaves, backend=backend)
        assert isinstance(out, Tensor)
        results[backend] = [out, *torch.autograd.grad(out, leaves, inputs.dout.to(dtype))]
    wrong = []
    names = ("output", *(f"gradient of {name}" for name in Inputs._fields[:6]))
    for name, got, truth in zip(names, results["triton"], (x.detach() for x in results["reference"]), strict=True):
        error = relative_error(got, truth)
        # `not <=`: NaN is wrong too
        if not error <= 0.01:
            wrong.append(f"{heads.name}: {name} is off by {error:.4f} of its norm")
    return wrong


def peak_mib(call: Callable[[], object]) -> float:
    """Most memory allocated during the call, what was there before included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def costs(heads: Heads, tokens: int) -> dict[str, Cost]:
    """Least work of the parts: each (query, key) pair once, each tensor read or written once."""
    s, pair = SIZES, 2.0 * heads.query_heads * (heads.key_dim + heads.value_dim)
    blocks = max(0, (tokens - s.kernel_size) // s.kernel_stride + 1)
    seen = tokens * blocks / 2
    chosen = tokens * min(s.topk * s.block_size, tokens / 2)
    near = tokens * min(s.window_size, tokens / 2)
    rows, width = 2.0 * tokens * heads.query_heads, heads.key_dim + heads.value_dim
    kv = 2.0 * tokens * heads.kv_heads * width
    attention = rows * width + kv
    parts = {
        "compression": Cost(0, kv * (1 + 1 / s.kernel_stride)),
        "attention": Cost(seen * pair, rows * width + kv / s.kernel_stride),
        "scores + top-k": Cost(seen * 2 * heads.query_heads * heads.key_dim, rows * heads.key_dim),
        "selection": Cost(chosen * pair, attention),
        "window": Cost(near * pair, attention),
        "combination": Cost(0, 4 * rows * heads.value_dim),
    }
    once = [parts[name] for name in ("attention", "scores + top-k", "selection", "window", "combination")]
    parts["forward"] = Cost(sum(x.flops for x in once), rows * width + kv)
    # five products instead of two in each branch, no scores
    branches = sum(parts[name].flops for name in ("attention", "selection", "window"))
    parts["backward"] = Cost(2.5 * branches, 2 * (rows * width + kv))
    dense = tokens * tokens / 2 * pair
    parts["dense forward"] = Cost(dense, attention)
    parts["dense backward"] = Cost(2.5 * dense, 2 * attention)
    return parts


def whole(system: str, x: Inputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A system's forward pass and the leaves that it takes gradients of."""
    if system == "nsa":
        leaves = [tensor.detach().requires_grad_() for tensor in x[:6]]

        def nsa() -> Tensor:
            out = nsa_attention(*leaves, backend="triton")
            assert isinstance(out, Tensor)
            return out

        return nsa, leaves
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
    """Forward and backward of a whole system: part, times, peak memory."""
    forward, leaves = whole(system, x)
    peak_forward = peak_mib(forward)
    out = forward()
    dout = x.dout if system == "nsa" else x.dout.transpose(1, 2)
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


def draw(path: Path) -> Path | None:
    """Speed over length, beside FlashAttention-2 of the same run: `path` with `.png` for `.csv`; None without any."""
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
            axis.plot([n // 1024 for n in lengths], ratio, marker="o", label=config)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=part, yscale="log")
        lengths_below(axis, (key[3] for key in times))
        axis.set_yticks((0.1, 0.2, 0.5, 1, 2, 5, 10), labels=("0.1", "0.2", "0.5", "1", "2", "5", "10"))
    axes[0].set_ylabel("times as fast as FlashAttention-2")
    axes[0].legend()
    return save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "recipes/results/benchmark.csv")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="Hq:Hk:D or Hq:Hk:Dk/Dv, separated by commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="lengths, separated by commas")
    parser.add_argument("--inputs", default="random,realistic", help="random, realistic or both")
    parser.add_argument("--systems", default="nsa,fa2,cudnn", help="which of nsa, fa2, cudnn")
    parser.add_argument("--no-parts", action="store_true", help="only whole passes")
    options = parser.parse_args(arguments)
    if no_gpu():
        return 2
    source = stamp(options.commit)
    flops, moved, card = card_rates()

    def row(
        config: str,
        tokens: int,
        inputs: str,
        system: str,
        part: str,
        times: Times,
        peak: float | None,
        cost: Cost | None,
    ) -> dict[str, object]:
        found = {**source, "config": config, "tokens": tokens, "inputs": inputs, "system": system, "part": part}
        median, low, high = (f"{time:.4f}" for time in times)
        found |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "peak_mib": "" if peak is None else round(peak)}
        found |= achieved(cost, times[0], flops, moved) if cost else {}
        print(f"{config:13} {tokens:7} {inputs:9} {system:5} {part:32} {median:>9} ms", end="")
        print(
            f"  floor {found['floor_ms']:>8}" if cost else "",
            "" if peak is None else f"  peak {peak:.0f} MiB",
            flush=True,
        )
        return found

    write_rows(
        options.out, COLUMNS, [row("", 0, "random", "card", part, times, None, cost) for part, times, cost in card]
    )
    failed = False
    for heads in map(Heads.parse, options.configs.split(",")):
        if wrong := check(heads):
            failed = True
            print("\n".join(["error: not timed, since it is wrong:", *wrong]), file=sys.stderr, flush=True)
            continue
        for tokens in map(int, options.tokens.split(",")):
            least = costs(heads, tokens)
            for kind in options.inputs.split(","):
                x = make_inputs(heads, tokens, kind)
                for system in options.systems.split(","):
                    if system != "nsa" and kind != "random":
                        continue
                    name = "" if system == "nsa" else "dense "
                    try:
                        rows = [
                            row(heads.name, tokens, kind, system, part, times, peak, least[name + part])
                            for part, times, peak in measure_system(system, x)
                        ]
                    except (torch.OutOfMemoryError, RuntimeError) as error:
                        if system == "nsa":
                            raise
                        print(f"{heads.name} {tokens} {system}: not measured, {str(error).splitlines()[0]}", flush=True)
                        continue
                    write_rows(options.out, COLUMNS, rows)
                if not options.no_parts and "nsa" in options.systems.split(","):
                    stages = Stages(x)
                    for parts in (stages.forward, stages.backward):
                        for part, call in parts().items():
                            times = measure(call, 60)
                            found = row(heads.name, tokens, kind, "nsa", part, times, None, least.get(part))
                            write_rows(options.out, COLUMNS, [found])
                    del stages, parts, call
                del x
                torch.cuda.empty_cache()
    draw_and_say(options.out, draw)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
