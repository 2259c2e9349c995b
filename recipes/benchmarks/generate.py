"""`generate()` and the time to the first token of a whole model, sparse beside dense, on one GPU.

    python -m nsa_hf.recipes.benchmarks.generate --phase decode --systems nsa
    python -m nsa_hf.recipes.benchmarks.generate --phase first-token --systems nsa,dense-cudnn

The model has random weights, the same in every system, and by default the shape of an 8B model: 15 GB, and 39 GB of
keys and values at 64k tokens and batch 4. Rows are appended to a CSV as they come; `times_dense` is the fastest dense
time of the same shape in the CSV over the row's own, `peak_mib` the most memory while the steps, or the passes over the
prompt, are timed. `compiled_error`, `kernels_error` and `one_bit_error` are those of `logits.Errors`.

decode: the prompt is read once, in one row, and copied to the others. Then `generate()` continues it from this cache,
once to compile and once to be timed, from step to step. Systems:

    nsa             static cache, which Transformers compiles into CUDA graphs; its logits must first be those of
                    the same steps without compiling, and these the PyTorch reference's
    nsa-dynamic     the cache that `generate()` makes by itself
    dense-dynamic   the same of the dense model, SDPA
    dense-static    static cache, compiled, SDPA with a mask
    dense-flex      static cache, compiled, flex attention
    dense-cut       static buffers cut on the host: no mask and no copies, a cache that Transformers does not have

Compiled code rounds where PyTorch's own operators do (Inductor's `emulate_precision_casts`). By default it rounds less
often, which changes a bf16 query by a few thousandths, and with it the choice between blocks that are about as good:
with random weights another text comes out, which could be compared with nothing.

first-token: one forward over the prompt that fills a cache. Systems: nsa, dense-flash, dense-cudnn, dense-efficient.
"""

from __future__ import annotations

import csv
import gc
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from nsa_hf.dense_kernels import DENSE_KERNELS
from nsa_hf.releases import CACHE

from .common import (
    STAMP,
    Heads,
    dense_times,
    draw_and_say,
    lengths_below,
    make_axes,
    make_parser,
    no_gpu,
    save_figure,
    stamp,
    wait,
    write_rows,
)
from .logits import check
from .models import Shape, cut_back, filled_cache, make_model

COLUMNS = (
    *STAMP,
    "transformers",
    "model",
    "config",
    "tokens",
    "batch",
    "phase",
    "system",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "tokens_per_s",
    "warm_up_s",
    "peak_mib",
    "times_dense",
    "compiled_error",
    "kernels_error",
    "one_bit_error",
)
SYSTEMS = {
    "decode": ("nsa", "nsa-dynamic", "dense-dynamic", "dense-static", "dense-flex", "dense-cut"),
    "first-token": ("nsa", *(f"dense-{kernel}" for kernel in DENSE_KERNELS)),
}
COMPILED = ("nsa", "dense-static", "dense-flex")
WARM_UP = 8  # steps before those that are timed
DEVICE = "cuda"


def rounded_as_uncompiled() -> AbstractContextManager[None]:
    """Within it, compiled code rounds to bf16 after each of the model's operators, as uncompiled code does."""
    return torch._inductor.config.patch(emulate_precision_casts=True)


class Stamps(StoppingCriteria):
    """Stops nothing; notes when the host was done with each step, for which it waits for the one before.

    Attributes:
        times: `time.perf_counter()` of each step.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decode(model: Any, ids: Tensor, system: str, new: int) -> tuple[list[float], float, dict[str, str]]:
    """Times the steps of `generate()`.

    Args:
        ids: the prompt, `[B, n]`, the same in every row.
        system: of SYSTEMS.
        new: steps that are timed.

    Returns:
        Seconds of each step; seconds of what came before, compiling included; the columns of `nsa`'s errors.

    Raises:
        ArithmeticError: the sparse model's result is wrong.
    """
    past, begin = ids.shape[1] - 1, time.perf_counter()
    errors = {}
    cache = filled_cache(model, ids[:, :past], system, ids.shape[1] + WARM_UP + new)
    if system == "dense-flex":
        model.set_attn_implementation("flex_attention")
    if system == "nsa":
        checked = check(model, ids, cache)
        print(f"{system}: {checked}", flush=True)
        if checked.wrong:
            raise ArithmeticError(str(checked))
        errors = {f"{name}_error": f"{value:.3f}" for name, value in checked._asdict().items()}
        cut_back(cache, past)
    options: dict[str, Any] = {CACHE: cache, "do_sample": False}
    model.generate(ids, max_new_tokens=WARM_UP, **options)
    cut_back(cache, past)
    stamps = Stamps()
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=WARM_UP + new, stopping_criteria=StoppingCriteriaList([stamps]), **options)
    times = stamps.times[WARM_UP - 1 :]
    return [b - a for a, b in zip(times[:-1], times[1:], strict=True)], start - begin, errors


def first_token(model: Any, ids: Tensor, system: str, repeats: int = 2) -> tuple[list[float], float]:
    """Times one forward over the prompt `[B, n]`, with a new cache each time.

    Returns:
        Seconds to the first token, of each repetition; seconds of the call before them.
    """
    kernel = DENSE_KERNELS.get(system.removeprefix("dense-"))
    times = []
    for _ in range(repeats + 1):
        cache, start = DynamicCache(config=model.config), wait(ids.device.type)
        with sdpa_kernel(kernel) if kernel else nullcontext():
            model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        times.append(wait(ids.device.type) - start)
        del cache
    return times[1:], times[0]


def graphs() -> str:
    """What `torch.compile` did since the last call, in words. Without breaks and skips a step is one launch."""
    from torch._dynamo.utils import counters

    compiled, skipped = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
    text = f"{compiled} graphs compiled, {sum(counters['graph_break'].values())} breaks, {skipped} CUDA graphs skipped"
    counters.clear()
    return text


def measure(shape: Shape, tokens: int, batch: int, phase: str, system: str, new: int, device: str) -> dict[str, Any]:
    """Measures one system at one length.

    Args:
        shape: of the model.
        tokens, batch: of the prompt.
        phase, system: of SYSTEMS.
        new: steps of decoding that are timed.

    Returns:
        A row of the CSV but for its stamp.

    Raises:
        ArithmeticError: the sparse model's result is wrong.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = make_model(shape, tokens + WARM_UP + new, system.startswith("nsa"), device)
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device).expand(batch, -1)
    with torch.no_grad(), rounded_as_uncompiled():
        if phase == "decode":
            times, warm_up, errors = decode(model, ids, system, new)
        else:
            (times, warm_up), errors = first_token(model, ids, system), {}
    del model
    gc.collect()
    median, low, high = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    return {
        "transformers": transformers.__version__,
        "model": shape.name,
        "config": shape.heads.name,
        "tokens": tokens,
        "batch": batch,
        "phase": phase,
        "system": system,
        "median_ms": f"{median * 1e3:.3f}",
        "p20_ms": f"{low * 1e3:.3f}",
        "p80_ms": f"{high * 1e3:.3f}",
        "tokens_per_s": f"{batch * len(times) / sum(times):.2f}" if phase == "decode" else "",
        "warm_up_s": f"{warm_up:.1f}",
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else "",
        **errors,
    }


def fastest_dense(path: Path, row: dict[str, Any]) -> float | None:
    """The least milliseconds of a dense system in the CSV for a row's GPU, PyTorch and shape.

    Returns:
        None where there is none, or decoding was measured without compiling only: much of such a step may be the
        host's.
    """
    times = dense_times(path, row, ("gpu", "torch", "model", "config", "tokens", "batch", "phase"))
    if row["phase"] == "decode" and not any(system in COMPILED for _, system in times):
        return None
    return min(times)[0] if times else None


def draw(path: Path) -> Path | None:
    """Draws tokens a second of each system, and seconds to the first token over length; the latest of each.

    Args:
        path: the CSV.

    Returns:
        The picture beside it; None with a single system and a single length, where there is nothing to see.
    """
    rates: dict[str, float] = {}
    times: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            model = f"{row['model']} {row['config']}"
            if row["phase"] == "first-token":
                seconds = times.setdefault(f"{model}, {row['system']}", {})
                seconds[int(row["tokens"])] = float(row["median_ms"]) / 1e3
            else:
                how = "compiled" if row["system"] in COMPILED else "not compiled"
                shape = f"{row['config']}, {row['tokens']} tokens, batch {row['batch']}"
                rates[f"{row['system']}, {how}\n{row['model']}\n{shape}"] = float(row["tokens_per_s"])
    lengths = sorted({tokens for seconds in times.values() for tokens in seconds})
    panels = [name for name, shown in (("rates", len(rates) > 1), ("times", len(lengths) > 1)) if shown]
    if not panels:
        return None
    figure, axes = make_axes(len(panels), squeeze=False)
    if "rates" in panels:
        named = sorted(rates.items(), key=lambda bar: bar[1])
        drawn = axes[0][0].barh([name for name, _ in named], [rate for _, rate in named])
        axes[0][0].bar_label(drawn, fmt="%.0f", padding=2)
        axes[0][0].tick_params("y", labelsize="x-small")
        axes[0][0].set(xlabel="tokens per second", xlim=(0, 1.15 * max(rates.values())))
    if "times" in panels:
        axis = axes[0][-1]
        for name, seconds in sorted(times.items()):
            measured = sorted(seconds)
            axis.plot([n / 1024 for n in measured], [seconds[n] for n in measured], "o-", label=name)
        lengths_below(axis, lengths)
        axis.set(xlabel="tokens of the prompt (thousands)", ylabel="seconds to the first token", ylim=(0, None))
        axis.legend(fontsize="small")
    return save_figure(figure, path)


def print_row(row: dict[str, Any]) -> None:
    """Prints a row in one line, and what was compiled for it."""
    rate = f", {row['tokens_per_s']} tokens/s" if row["phase"] == "decode" else ""
    beside = f", {row['times_dense']} times as fast as dense" if "times_dense" in row else ""
    print(
        f"{row['phase']} {row['system']:15} {row['tokens']:7} tokens, batch {row['batch']}: {row['median_ms']} ms "
        f"({row['p20_ms']} to {row['p80_ms']}){rate}{beside}; before {row['warm_up_s']} s, {graphs()}, "
        f"peak {row['peak_mib']} MiB",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser(__doc__, "recipes/results/generate.csv")
    parser.add_argument("--phase", choices=SYSTEMS, required=True)
    parser.add_argument("--systems", help="separated by commas; default: all of the phase")
    parser.add_argument("--tokens", help="lengths of the prompt; default: 65536, and 131072 too to the first token")
    parser.add_argument("--batch", type=int, help="default: 4, and 1 to the first token")
    parser.add_argument("--new", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--config", default="32:8:128", help="Hq:Hk:D")
    parser.add_argument("--model", default="qwen3:36:4096:12288:32000", help="family:layers:hidden:intermediate:vocab")
    options = parser.parse_args(arguments)
    decoding = options.phase == "decode"
    systems = options.systems.split(",") if options.systems else SYSTEMS[options.phase]
    if unknown := set(systems) - set(SYSTEMS[options.phase]):
        parser.error(f"--systems of {options.phase} are {', '.join(SYSTEMS[options.phase])}, got {', '.join(unknown)}")
    if no_gpu():
        return 2
    source, shape = stamp(options.commit), Shape(options.model, Heads.parse(options.config))
    failed = False
    for tokens in map(int, (options.tokens or ("65536" if decoding else "65536,131072")).split(",")):
        # the dense ones first, so that the sparse one stands beside them
        for system in sorted(systems):
            batch = options.batch or (4 if decoding else 1)
            try:
                row = source | measure(shape, tokens, batch, options.phase, system, options.new, DEVICE)
            except (ArithmeticError, RuntimeError) as error:
                failed = True
                print(f"error: {system}, {tokens} tokens: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                continue
            finally:
                torch._dynamo.reset()
                gc.collect()
                torch.cuda.empty_cache()
            least = fastest_dense(options.out, row)
            if system.startswith("nsa") and least:
                row["times_dense"] = f"{least / float(row['median_ms']):.2f}"
            write_rows(options.out, COLUMNS, [row])
            print_row(row)
    draw_and_say(options.out, draw)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
