"""`generate()` and the time to the first token of a whole model, sparse beside dense, on one GPU.

    python -m nsa_hf.recipes.benchmarks.generate --phase decode --systems nsa
    python -m nsa_hf.recipes.benchmarks.generate --phase first-token --systems nsa,dense-cudnn

The model has random weights, the same in every system, and by default the shape of an 8B model: 15 GB, and 39 GB of
keys and values at 64k tokens and batch 4. Rows are appended to a CSV as they come; `times_dense` is the fastest dense
time of the same shape in the CSV over the row's own, `peak_mib` the most memory while the steps are timed, or all of
the passes over the prompt. `compiled_error`, `kernels_error` and `one_bit_error` are `check`'s.

decode: the prompt is read once, in one row, and copied to the others. Then `generate()` continues it from this cache,
once to compile and once to be timed, from step to step. Systems:

    nsa             static cache, which Transformers compiles into CUDA graphs; its logits must first be those of
                    the same steps without compiling, and these the PyTorch reference's
    nsa-dynamic     the cache that `generate()` makes by itself
    dense-dynamic   the same of the dense model, SDPA
    dense-static    static cache, compiled, SDPA with a mask
    dense-flex      static cache, compiled, flex attention
    dense-cut       static buffers cut on the host: no mask and no copies, a cache that Transformers does not have

What is compiled rounds where PyTorch's own operators do (Inductor's `emulate_precision_casts`). By default it rounds
less often, which changes a bf16 query by a few thousandths, and the choice between blocks that are about as good: with
random weights that is another text, which nothing could be compared with.

first-token: one forward over the prompt that fills a cache. Systems: nsa, dense-flash, dense-cudnn, dense-efficient.
"""

from __future__ import annotations

import csv
import gc
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from nsa_hf.releases import CACHE

from .common import (
    DENSE_KERNELS,
    STAMP,
    Heads,
    draw_and_say,
    lengths_below,
    make_axes,
    make_parser,
    no_gpu,
    relative_error,
    save_figure,
    stamp,
    write_rows,
)
from .models import Shape, cut_back, filled_cache, make_model, select_these

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
# steps before those that are timed, and steps that are compared
WARM_UP, COMPARED = 8, 6
# bf16 has 8 bits, and the error of a logit is that of some dozen layers: of 36 it was .05 where the same blocks are
# selected. What compiling may change is measured: no more than the last bit of one number in a token's embedding does
# where it does least. Of 36 layers that was .06 to .09 on an H100, and .6 to .8 wherever the first layer selected one
# other block: of random weights, an embedding is small beside what the first attention adds to it.
WRONG = 0.1
DEVICE = "cuda"


def wait(device: str) -> float:
    """The time when everything is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rounded_as_uncompiled() -> AbstractContextManager[None]:
    """What is compiled within this rounds to bf16 after each of the model's operators, as they do by themselves."""
    return torch._inductor.config.patch(emulate_precision_casts=True)


class Errors(NamedTuple):
    """How far the logits of some steps are off, as a share of their norm.

    compiled: of `generate()`, which compiles, beside the same steps without compiling (see `rounded_as_uncompiled`); in
        the worst row of the worst step.
    kernels: of these beside the reference attention, which is given the blocks that the kernels selected; the worst.
    one_bit: of plain steps whose tokens' embeddings have another last bit in one number, as a rounding may make it; in
        the best row of the best step.
    """

    compiled: float
    kernels: float
    one_bit: float

    def __str__(self) -> str:
        by = f"{self.compiled:.3f} of their norm by compiling, {self.kernels:.3f} by the kernels, {self.one_bit:.3f}"
        return f"the logits are off by {by} at least where one bit of a token's embedding is another"

    @property
    def wrong(self) -> bool:
        # NaN is wrong
        return not (self.compiled <= min(self.one_bit, WRONG) and self.kernels <= WRONG)


def with_another_bit(module: Any, arguments: Any, embedded: Tensor) -> Tensor:
    """A forward hook: the largest number of each token's embedding `[.., hidden]` with another last bit."""
    place = embedded.abs().argmax(-1, keepdim=True)
    bits = embedded.gather(-1, place).view({2: torch.int16, 4: torch.int32}[embedded.element_size()])
    return embedded.scatter(-1, place, (bits ^ 1).view(embedded.dtype))


def check(model: Any, ids: Tensor, cache: Cache) -> Errors:
    """The errors of some steps; the keys and values of these stay in the cache.

    Args:
        cache: holds at least all of `ids [B, n]` but the last.
    """
    held = ids.shape[1] - 1
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cut_back(cache, held)
    # the first step compresses all that the cache holds at once, which may round otherwise than step by step
    model(ids[:, held:], **{CACHE: cache}, use_cache=True)
    cut_back(cache, held)
    found = model.generate(ids, **{CACHE: cache}, max_new_tokens=COMPARED, **options)
    new = found.sequences[:, held:-1].split(1, dim=1)

    def logits(token: Tensor) -> Tensor:
        return model(token, **{CACHE: cache}, use_cache=True).logits[:, -1]

    cut_back(cache, held)
    plain, selected = [], []
    for token in new:
        with model.record_selection() as record:
            plain.append(logits(token))
        selected += [record[layer] for layer in sorted(record)]
    cut_back(cache, held)
    hook = model.get_input_embeddings().register_forward_hook(with_another_bit)
    try:
        close = [logits(token) for token in new]
    finally:
        hook.remove()
    cut_back(cache, held)
    try:
        model.set_attn_implementation("eager")
        with select_these(selected):
            truth = [logits(token) for token in new]
    finally:
        model.set_attn_implementation("nsa")
    compiled, kernels, one_bit = (row_errors(*x) for x in ((found.logits, plain), (plain, truth), (close, plain)))
    # each NaN if any of them is
    return Errors(float(compiled.max()), float(kernels.max()), float(one_bit.min()))


def row_errors(steps: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Of every row of every step."""
    pairs = (pair for step in zip(steps, expected, strict=True) for pair in zip(*step, strict=True))
    return torch.tensor([relative_error(row, truth.double()) for row, truth in pairs])


class Stamps(StoppingCriteria):
    """Stops nothing, and keeps when each step was done on the host, which waits for the one before."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decode(model: Any, ids: Tensor, system: str, new: int) -> tuple[list[float], float, dict[str, str]]:
    """Seconds of each step of `generate()`, those of what came before, which compiles, and the errors of `nsa`.

    Args:
        ids: `[B, n]`, the same in every row.
        new: steps that are timed.

    Raises:
        ArithmeticError: the sparse model's result is wrong.
    """
    held, begin = ids.shape[1] - 1, time.perf_counter()
    errors = {}
    cache = filled_cache(model, ids[:, :held], system, ids.shape[1] + WARM_UP + new)
    if system == "dense-flex":
        model.set_attn_implementation("flex_attention")
    if system == "nsa":
        found = check(model, ids, cache)
        print(f"{system}: {found}", flush=True)
        if found.wrong:
            raise ArithmeticError(str(found))
        errors = {f"{name}_error": f"{value:.3f}" for name, value in found._asdict().items()}
        cut_back(cache, held)
    options: dict[str, Any] = {CACHE: cache, "do_sample": False}
    model.generate(ids, max_new_tokens=WARM_UP, **options)
    cut_back(cache, held)
    stamps = Stamps()
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=WARM_UP + new, stopping_criteria=StoppingCriteriaList([stamps]), **options)
    times = stamps.times[WARM_UP - 1 :]
    return [b - a for a, b in zip(times[:-1], times[1:], strict=True)], start - begin, errors


def first_token(model: Any, ids: Tensor, system: str, repeats: int = 2) -> tuple[list[float], float]:
    """Seconds from the prompt `[B, n]` to the first token, each time anew, and those of the first call."""
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
    """What `torch.compile` made since the last call: without graph breaks and skips a step is one launch."""
    from torch._dynamo.utils import counters

    made, skipped = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
    text = f"{made} graphs compiled, {sum(counters['graph_break'].values())} breaks, {skipped} CUDA graphs skipped"
    counters.clear()
    return text


def measure(shape: Shape, tokens: int, batch: int, phase: str, system: str, new: int, device: str) -> dict[str, Any]:
    """A row of the CSV but for its stamp: one system at one length."""
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
    """The least milliseconds of a dense system in the CSV for a row's GPU and shape; None where decoding was measured
    without compiling only, since then much of a dense step may be the host's."""
    same = ("gpu", "torch", "model", "config", "tokens", "batch", "phase")
    times: list[tuple[float, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            for other in csv.DictReader(file):
                if other["system"].startswith("dense") and all(other[name] == str(row[name]) for name in same):
                    times.append((float(other["median_ms"]), other["system"]))
    if row["phase"] == "decode" and not any(system in COMPILED for _, system in times):
        return None
    return min(times)[0] if times else None


def draw(path: Path) -> Path | None:
    """Tokens a second of each system, and seconds to the first token over the prompt's length, the latest of each:
    `path` with `.png` for `.csv`. None with a single bar and a single length: there is nothing to see."""
    rates: dict[str, float] = {}
    times: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            model = f"{row['model']} {row['config']}"
            if row["phase"] == "first-token":
                found = times.setdefault(f"{model}, {row['system']}", {})
                found[int(row["tokens"])] = float(row["median_ms"]) / 1e3
            else:
                how = "compiled" if row["system"] in COMPILED else "not compiled"
                shape = f"{row['config']}, {row['tokens']} tokens, batch {row['batch']}"
                rates[f"{row['system']}, {how}\n{row['model']}\n{shape}"] = float(row["tokens_per_s"])
    lengths = sorted({tokens for found in times.values() for tokens in found})
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
        for name, found in sorted(times.items()):
            axis.plot([tokens / 1024 for tokens in sorted(found)], [found[n] for n in sorted(found)], "o-", label=name)
        lengths_below(axis, lengths)
        axis.set(xlabel="tokens of the prompt (thousands)", ylabel="seconds to the first token", ylim=(0, None))
        axis.legend(fontsize="small")
    return save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
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
            given = (tokens, options.batch or (4 if decoding else 1), options.phase, system, options.new)
            try:
                row = source | measure(shape, *given, DEVICE)
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
            rate = f", {row['tokens_per_s']} tokens/s" if decoding else ""
            beside = f", {row['times_dense']} times as fast as dense" if "times_dense" in row else ""
            print(
                f"{options.phase} {system:15} {tokens:7} tokens, batch {row['batch']}: {row['median_ms']} ms "
                f"({row['p20_ms']} to {row['p80_ms']}){rate}{beside}; before {row['warm_up_s']} s, {graphs()}, "
                f"peak {row['peak_mib']} MiB",
                flush=True,
            )
    draw_and_say(options.out, draw)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
