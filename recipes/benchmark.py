"""Speed and memory of the operation and its parts on one GPU, beside FlashAttention-2 and cuDNN, in one run.

    python -m nsa_hf.recipes.benchmark                                     every shape, 4k to 128k: about half an hour
    python -m nsa_hf.recipes.benchmark --configs 9:3:64 --tokens 8192      one shape, a minute

Forward and backward are compared with the float64 reference first; a configuration that is wrong is not timed and the
exit code is 1. Rows are appended to a CSV, one for each (config, tokens, inputs, system, part), so that a run that was
cut off leaves what it measured. `flops` and `bytes` are what the part has to do at least; `floor_ms` is the larger of
the two times they take at the rates that this card was measured to give at the start of the run (system `card`).
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_hf.kernels import MeanCompressor, Sizes, compress, nsa_attention

CONFIGS = ("64:4:128", "32:8:128", "16:8:128", "64:4:192/128", "9:3:64")
TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
COLUMNS = (
    "run_id", "gpu", "torch", "triton", "commit", "config", "tokens", "inputs", "system", "part", "median_ms", "p20_ms",
    "p80_ms", "peak_mib", "flops", "bytes", "floor_ms",
)  # fmt: skip
SIZES = Sizes()
Times = tuple[float, float, float]


@dataclass(frozen=True)
class Heads:
    """`Hq:Hk:D` or `Hq:Hk:Dk/Dv`."""

    name: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def parse(cls, name: str) -> Heads:
        query, kv, dims = name.split(":")
        key_dim, _, value_dim = dims.partition("/")
        return cls(name, int(query), int(kv), int(key_dim), int(value_dim or key_dim))


class Inputs(NamedTuple):
    """Arguments of `nsa_attention`, bf16, and a gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor
    dout: Tensor


class Cost(NamedTuple):
    """What a part must do at least."""

    flops: float
    bytes: float


def make_inputs(heads: Heads, tokens: int, kind: str, device: str = "cuda", seed: int = 0) -> Inputs:
    """Normal numbers; `realistic`: queries that turn slowly, so that neighbours choose much the same blocks."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).bfloat16()

    q = normal(1, tokens, heads.query_heads, heads.key_dim)
    if kind == "realistic":
        knots = normal(1, tokens // 64 + 2, heads.query_heads, heads.key_dim)
        place = torch.arange(tokens, device=device) / 64
        left = place.long()
        share = (place - left)[:, None, None].bfloat16()
        q = (1 - share) * knots[:, left] + share * knots[:, left + 1] + 0.2 * q
    k = normal(1, tokens, heads.kv_heads, heads.key_dim)
    v = normal(1, tokens, heads.kv_heads, heads.value_dim)
    mean_k = MeanCompressor(SIZES.kernel_size, heads.key_dim)
    mean_v = MeanCompressor(SIZES.kernel_size, heads.value_dim)
    gates = torch.rand(1, tokens, heads.query_heads, 3, generator=random, device=device).bfloat16()
    return Inputs(
        q, k, v, compress(k, mean_k, SIZES.kernel_stride).contiguous(),
        compress(v, mean_v, SIZES.kernel_stride).contiguous(), gates,
        normal(1, tokens, heads.query_heads, heads.value_dim),
    )  # fmt: skip


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float((x.detach().double() - truth).norm() / truth.norm().clamp(min=1e-30))


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


def measure(call: Callable[[], object], repeat_ms: int = 300) -> Times:
    """Median, 20th and 80th percentile in milliseconds, by events, the cache emptied between calls."""
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=50, rep=repeat_ms, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def peak_mib(call: Callable[[], object]) -> float:
    """Most memory allocated during the call, what was there before included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def card_rates() -> tuple[float, float, Iterator[tuple[str, Times, Cost]]]:
    """FLOP/s of a bf16 matrix product and bytes/s of a copy (read and written), and the rows that say so."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product, copy = measure(lambda: a @ b), measure(lambda: target.copy_(source))
    flops, moved = 2 * 8192.0**3, 2.0 * (1 << 30)
    rows = [("matmul", product, Cost(flops, 6 * 8192.0**2)), ("copy", copy, Cost(0, moved))]
    return flops / product[0] * 1e3, moved / copy[0] * 1e3, iter(rows)


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


def forward_parts(x: Inputs) -> dict[str, Callable[[], object]]:
    """The stages of the forward pass, each callable by itself."""
    from nsa_hf.kernels.triton_common import LOG2E
    from nsa_hf.kernels.triton_gates import combine
    from nsa_hf.kernels.triton_gather import count_slots
    from nsa_hf.kernels.triton_interval import interval_forward
    from nsa_hf.kernels.triton_op import layout_of
    from nsa_hf.kernels.triton_query_major import query_major_forward, takes_query_major
    from nsa_hf.kernels.triton_select import select
    from nsa_hf.kernels.triton_selected import selected_forward

    keys, scale = x.k.shape[1], x.q.shape[-1] ** -0.5 * LOG2E
    layout = layout_of(x.q, x.k, x.v, SIZES, None, None, None)
    mean_k, mean_v = (MeanCompressor(SIZES.kernel_size, tensor.shape[-1]) for tensor in (x.k, x.v))
    cmp = (x.q, x.k_cmp, x.v_cmp, layout.cmp_low, layout.cmp_high, scale)
    out_cmp, lse_cmp = interval_forward(*cmp, long_runs=True)
    selection = select(x.q, x.k_cmp, lse_cmp, layout, SIZES, keys, scale)
    window, local = layout.window(SIZES.window_size, 0), layout.local(SIZES)
    out_win, _ = interval_forward(x.q, x.k, x.v, *window, scale)
    slots = count_slots(SIZES, layout, keys)

    def gathered() -> None:
        out, lse = interval_forward(x.q, x.k, x.v, *local, scale)
        if slots:
            selected_forward(x.q, x.k, x.v, selection, layout, SIZES, slots, scale, out, lse)

    def query_major() -> None:
        query_major_forward(x.q, x.k, x.v, selection, layout, SIZES, scale)

    return {
        "compression": lambda: [
            compress(tensor, mean, SIZES.kernel_stride) for tensor, mean in ((x.k, mean_k), (x.v, mean_v))
        ],
        "attention": lambda: interval_forward(*cmp, long_runs=True),
        "scores + top-k": lambda: select(x.q, x.k_cmp, lse_cmp, layout, SIZES, keys, scale),
        "selection": query_major if takes_query_major(x.q, x.k) else gathered,
        "window": lambda: interval_forward(x.q, x.k, x.v, *window, scale),
        "combination": lambda: combine(out_cmp, out_cmp, out_win, x.gates, layout.relative),
    }


def backward_parts(x: Inputs) -> dict[str, Callable[[], object]]:
    """The stages of the backward pass, each callable by itself."""
    from nsa_hf.kernels.triton_common import LOG2E
    from nsa_hf.kernels.triton_gates import gate_gradient, rows_by_head
    from nsa_hf.kernels.triton_gather import count_slots
    from nsa_hf.kernels.triton_interval_backward import Second, interval_dkv, interval_dq
    from nsa_hf.kernels.triton_op import CMP, SLC, WIN, forward_op, layout_of
    from nsa_hf.kernels.triton_selected import selected_backward

    scale = x.q.shape[-1] ** -0.5
    scales = (scale, scale * LOG2E)
    numbers = list(SIZES.__dict__.values())
    none = (None,) * 5
    _, selection, out_cmp, out_slc, out_win, *lses = forward_op(*x[:6], *none, numbers, scale)
    layout = layout_of(x.q, x.k, x.v, SIZES, None, None, None)
    outs = (out_cmp, out_slc, out_win, x.dout, x.gates, layout.relative)
    _, correction = gate_gradient(*outs)
    rows = rows_by_head(lses, x.gates, correction)
    local_low, local_high = layout.local(SIZES)
    cmp = (x.q, x.k_cmp, x.v_cmp, layout.cmp_low, layout.cmp_high, x.dout, rows[CMP], *scales)
    win = (x.q, x.k, x.v, *layout.window(SIZES.window_size, 0), x.dout, rows[WIN], *scales)
    local = (x.q, x.k, x.v, local_low, local_high, x.dout, rows[SLC], *scales)
    dq, dq_out = torch.zeros_like(x.q, dtype=torch.float32), torch.empty_like(x.q)
    bf16, second = torch.bfloat16, Second(local_low, rows[SLC])
    parts: dict[str, Callable[[], object]] = {
        "backward, gates": lambda: rows_by_head(lses, x.gates, gate_gradient(*outs)[1]),
        "backward, compressed dq": lambda: interval_dq(*cmp, dq, add=False),
        "backward, compressed dk dv": lambda: interval_dkv(*cmp, dtype=bf16, few_keys=True),
        "backward, window and local blocks dq": lambda: interval_dq(*win, dq, add=True, second=second),
        "backward, window dk dv": lambda: interval_dkv(*win, dtype=bf16),
        "backward, local blocks dk dv": lambda: interval_dkv(*local, dtype=bf16),
    }
    if slots := count_slots(SIZES, layout, x.k.shape[1]):
        parts["backward, selection"] = lambda: selected_backward(
            x.q, x.k, x.v, selection, layout, SIZES, slots, x.dout, lses[SLC], x.gates, correction, *scales, dq, dq_out
        )
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


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def draw(path: Path) -> Path | None:
    """Speed over length, beside FlashAttention-2 of the same run: `path` with `.png` for `.csv`; None without any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times: dict[tuple, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] in ("forward", "backward") and row["inputs"] == "random":
                key = (row["part"], row["config"], row["system"], int(row["tokens"]))
                times[key] = float(row["median_ms"])
    if not any(system == "fa2" and (part, config, "nsa", n) in times for part, config, system, n in times):
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, part in zip(axes, ("forward", "backward"), strict=True):
        for config in sorted({key[1] for key in times}):
            lengths = sorted({n for p, c, s, n in times if p == part and c == config and s == "nsa"})
            lengths = [n for n in lengths if (part, config, "fa2", n) in times]
            ratio = [times[part, config, "fa2", n] / times[part, config, "nsa", n] for n in lengths]
            axis.plot([n // 1024 for n in lengths], ratio, marker="o", label=config)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=part, xlabel="tokens (thousands)", xscale="log", yscale="log")
    axes[0].set_ylabel("times as fast as FlashAttention-2")
    axes[0].legend()
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture


def git_commit() -> str:
    folder = Path(__file__).resolve().parent
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default=",".join(CONFIGS), help="Hq:Hk:D or Hq:Hk:Dk/Dv, separated by commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="lengths, separated by commas")
    parser.add_argument("--inputs", default="random,realistic", help="random, realistic or both")
    parser.add_argument("--systems", default="nsa,fa2,cudnn", help="which of nsa, fa2, cudnn")
    parser.add_argument("--no-parts", action="store_true", help="only whole passes")
    parser.add_argument("--out", type=Path, default=Path("recipes/results/benchmark.csv"), help="CSV to append to")
    parser.add_argument("--commit", default=None, help="what to write down as the commit; default: git's")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU", file=sys.stderr)
        return 2
    import triton

    stamp = {
        "run_id": uuid.uuid4().hex[:8], "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "commit": options.commit or git_commit(),
    }  # fmt: skip
    flops, moved, card = card_rates()

    def row(
        config: str, tokens: int, inputs: str, system: str, part: str, times: Times, peak: float | None,
        cost: Cost | None,
    ) -> dict[str, object]:  # fmt: skip
        floor = max(cost.flops / flops, cost.bytes / moved) * 1e3 if cost else None
        found = {**stamp, "config": config, "tokens": tokens, "inputs": inputs, "system": system, "part": part}
        median, low, high = (f"{time:.4f}" for time in times)
        found |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "peak_mib": "" if peak is None else round(peak)}
        found |= {"flops": f"{cost.flops:.4g}", "bytes": f"{cost.bytes:.4g}"} if cost else {}
        print(f"{config:13} {tokens:7} {inputs:9} {system:5} {part:32} {median:>9} ms", end="")
        print(f"  floor {floor:8.4f}" if floor else "", "" if peak is None else f"  peak {peak:.0f} MiB", flush=True)
        return found | ({"floor_ms": f"{floor:.4f}"} if floor else {})

    write_rows(options.out, [row("", 0, "random", "card", part, times, None, cost) for part, times, cost in card])
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
                    write_rows(options.out, rows)
                if not options.no_parts and "nsa" in options.systems.split(","):
                    for stages in (forward_parts, backward_parts):
                        for part, call in stages(x).items():
                            times = measure(call, 100)
                            found = row(heads.name, tokens, kind, "nsa", part, times, None, least.get(part))
                            write_rows(options.out, [found])
                del x
                torch.cuda.empty_cache()
    try:
        picture = draw(options.out)
        print(f"{options.out}, {picture or 'no picture, since nothing was timed beside FlashAttention-2'}")
    except ImportError:
        print(f"{options.out}; no picture, since matplotlib is not installed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
