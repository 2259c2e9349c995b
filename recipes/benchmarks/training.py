"""A whole training step of a model, sparse beside dense, on one GPU, and what its time goes into.

    python -m nsa_hf.recipes.benchmarks.training --systems nsa-index,dense-cudnn --tokens 32768

As `nsa-hf train` takes it: weights in float32, bfloat16 autocast, compiled layers, the next token's loss in chunks,
every layer's activations computed again in the backward pass, fused AdamW; one text a step and no teacher, so that what
is compared is the model. Weights and text are random, the same in every system. Rows are appended to a CSV as they
come; `times_dense` is the fastest dense time of the same shape in the CSV over the row's own. Systems:

    nsa-index       blocks chosen by an index of 32 channels in 8 bits, no compressed branch: what `convert` recommends
    nsa-paper       blocks chosen by compressed keys, three branches
    dense-cudnn, dense-flash    the dense model with one of PyTorch's attentions

A profile of one more step says what its time goes into: the attention operation, matrix products, clipping and the
optimizer (timed by themselves), and everything else. `mfu` counts what the system really multiplies, but for what is
computed again.
"""

from __future__ import annotations

import csv
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from nsa_hf.dense_kernels import DENSE_KERNELS
from nsa_hf.kernels.operators import operator_name
from nsa_hf.releases import checkpoint_activations

from ..training.compiling import compile_layers, room_for_graphs
from ..training.flops import peak_flops, training_flops
from ..training.losses import LossModel
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
from .common import measure as measure_times
from .models import INDEX, PAPER, Shape, empty_model, make_model

PARTS = ("attention_ms", "products_ms", "optimizer_ms", "rest_ms")
COLUMNS = (
    *STAMP,
    *("transformers", "model", "config", "tokens", "system", "median_ms", "p20_ms", "p80_ms", "tokens_per_s"),
    *("times_dense", "mfu", "peak_mib", *PARTS),
)
SAME = ("gpu", "torch", "model", "config", "tokens")  # of the rows that are compared
FIELDS = {"nsa-index": INDEX, "nsa-paper": PAPER}
SYSTEMS = (*FIELDS, "dense-cudnn", "dense-flash")
# `family:layers:hidden:intermediate:vocabulary Hq:Hk:D`, of Llama 3.2 1B and Qwen 3 0.6B
MODELS = {"llama:16:2048:8192:128256": "32:8:64", "qwen3:28:1024:3072:151936": "16:8:128"}
RATE = 1e-6  # little, so that random weights stay where they are
# Names of PyTorch's operators by what they do; each stands with everything that it calls.
ATTENTION = (operator_name("forward"), operator_name("backward"), "aten::_scaled_dot_product")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")
DEVICE = "cuda"
STEPS_MS = 3_000  # of one system's steps that are timed, together


class Step:
    """A training step of a model.

    Attributes:
        model: with its loss.
        attention: the context that it runs in.
    """

    def __init__(self, model: Any, attention: Callable[[], AbstractContextManager], ids: Tensor):
        checkpoint_activations(model.train(), 1)
        compile_layers(model)
        self.model, self.attention, self.ids = LossModel(model, None, ce_weight=1.0, kl_weight=0.0), attention, ids
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def backward(self) -> Tensor:
        """Computes the gradients; the loss, a scalar on the device."""
        with self.attention():  # backward too: there layers are computed again
            with torch.autocast(self.ids.device.type, torch.bfloat16):
                loss = self.model(self.ids).total
            loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clips the gradients and moves the weights."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> Tensor:
        """Takes it; the loss before it, a scalar on the device."""
        loss = self.backward()
        self.update()
        return loss


def parts_of(events: Iterable[Any], optimizer_ms: float, step_ms: float, time: str = "device") -> dict[str, float]:
    """Milliseconds of PARTS, the columns; the rest is everything else, and the device's waiting for the host.

    Operators' own times are added up. What the profiler says of one with all that it calls is wrong: a call of CUDA's
    runtime has a number too, and gets the kernels of the operator of the same number.

    Args:
        events: `events()` of a profile of one step's forward and backward passes.
        optimizer_ms: the step's update, measured by itself.
        step_ms: a step's time without the profiler.
        time: "device" or "cpu", whose time is counted.
    """
    attention = products = 0.0
    for event in events:
        own = getattr(event, f"self_{time}_time_total")
        if "::" in event.name and any(caller.name.startswith(ATTENTION) for caller in callers(event)):
            attention += own
        elif event.name in PRODUCTS:
            products += own
    known = [attention / 1e3, products / 1e3, optimizer_ms]
    return dict(zip(PARTS, (*known, step_ms - sum(known)), strict=True))


def callers(event: Any) -> Iterator[Any]:
    """An event of a profile, and what called it, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def milliseconds(call: Callable[[], object], device: str) -> float:
    """How long a call takes, once: on the GPU by events, of what it queues."""
    if device != "cuda":
        return 1e3 * cpu_seconds(call)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(shape: Shape, tokens: int, system: str, device: str) -> dict[str, Any]:
    """Measures one system at one length.

    Args:
        shape: of the model.
        tokens: of the text.
        system: of SYSTEMS.

    Returns:
        A row of the CSV but for its stamp.

    Raises:
        ArithmeticError: a loss is no number.
        RuntimeError: the dense attention that ran is not the one of the system.
    """
    sparse, dense = system in FIELDS, system.removeprefix("dense-")
    kernel = DENSE_KERNELS.get(dense)
    model = make_model(shape, tokens, sparse, device, torch.float32, FIELDS.get(system, PAPER))
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    step = Step(model, (lambda: sdpa_kernel(kernel)) if kernel else nullcontext, ids)
    # PyTorch's cache of compiled layers does not tell one dense attention from another
    with torch._functorch.config.patch(enable_autograd_cache=False):
        first = step()  # compiles
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    median, low, high = measure_times(step, repeat_ms=STEPS_MS) if device == "cuda" else (1e3 * cpu_seconds(step),) * 3
    if not torch.stack([first, step()]).isfinite().all():
        raise ArithmeticError(f"{system}: a loss is no number")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        step.backward()
        wait(device)
    events = profiled.events()
    if kernel and not any(event.name.startswith(f"aten::_scaled_dot_product_{dense}_attention") for event in events):
        raise RuntimeError(f"PyTorch took another attention than {dense}")
    parts = parts_of(events, milliseconds(step.update, device), median, "device" if device == "cuda" else "cpu")
    flops = tokens * training_flops(counted_model(shape, tokens, system), tokens, teacher=False, dense=not sparse)
    peak = peak_flops(ids.device)
    return {
        "transformers": transformers.__version__,
        "model": shape.name,
        "config": shape.heads.name,
        "tokens": tokens,
        "system": system,
        "median_ms": f"{median:.1f}",
        "p20_ms": f"{low:.1f}",
        "p80_ms": f"{high:.1f}",
        "tokens_per_s": round(tokens / median * 1e3),
        "mfu": f"{flops / median * 1e3 / peak:.3f}" if peak else "",
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else "",
        **{name: f"{value:.1f}" for name, value in parts.items()},
    }


def counted_model(shape: Shape, tokens: int, system: str) -> Any:
    """A sparse model of the shape without memory, whose arithmetic is counted."""
    return empty_model(shape, tokens, True, "meta", torch.float32, FIELDS.get(system, PAPER))


def cpu_seconds(call: Callable[[], object]) -> float:
    """How long a call takes on the CPU."""
    start = wait("cpu")
    call()
    return wait("cpu") - start


def draw(path: Path) -> Path | None:
    """Draws tokens a second over length, a panel for each model; the latest of each system.

    Args:
        path: the CSV.

    Returns:
        The picture beside it; None where there is one row only.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = {
        (row["model"], row["config"], row["system"], int(row["tokens"])): float(row["tokens_per_s"]) for row in rows
    }
    if len(rates) < 2:
        return None
    models = sorted({key[:2] for key in rates})
    figure, axes = make_axes(len(models), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for system in sorted({key[2] for key in rates if key[:2] == model}):
            points = sorted((key[3], rate) for key, rate in rates.items() if key[:3] == (*model, system))
            axis.plot([tokens / 1024 for tokens, _ in points], [rate for _, rate in points], "o-", label=system)
        lengths_below(axis, {key[3] for key in rates if key[:2] == model})
        axis.set(title=" ".join(model), ylabel="tokens a second of training", ylim=(0, None))
        axis.legend(fontsize="small")
    return save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = make_parser(__doc__, "recipes/results/training.csv")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="separated by commas; default: all")
    parser.add_argument("--tokens", default="8192,32768,65536", help="lengths, separated by commas")
    parser.add_argument("--model", help="family:layers:hidden:intermediate:vocab; default: a 1B and a 0.6B shape")
    parser.add_argument("--config", help="Hq:Hk:D of --model")
    options = parser.parse_args(arguments)
    systems = options.systems.split(",")
    if unknown := set(systems) - set(SYSTEMS):
        parser.error(f"--systems are {', '.join(SYSTEMS)}, got {', '.join(unknown)}")
    if (options.model is None) != (options.config is None):
        parser.error("--model and --config go together: give both or neither")
    if no_gpu():
        return 2
    source, failed = stamp(options.commit), False
    models = MODELS if options.model is None else {options.model: options.config}
    for name, config in models.items():
        shape = Shape(name, Heads.parse(config))
        for tokens in map(int, options.tokens.split(",")):
            for system in sorted(systems):  # the dense ones first, so that the sparse ones stand beside them
                try:
                    with room_for_graphs():
                        row = source | measure(shape, tokens, system, DEVICE)
                except (ArithmeticError, RuntimeError) as error:
                    failed = True
                    print(
                        f"error: {system}, {tokens} tokens: {str(error).splitlines()[0]}", file=sys.stderr, flush=True
                    )
                    continue
                finally:
                    torch._dynamo.reset()
                    gc.collect()
                    torch.cuda.empty_cache()
                times = dense_times(options.out, row, SAME)
                if system in FIELDS and times:
                    row["times_dense"] = f"{min(times)[0] / float(row['median_ms']):.2f}"
                write_rows(options.out, COLUMNS, [row])
                print(" ".join(f"{key}={row[key]}" for key in COLUMNS[len(STAMP) + 1 :] if key in row), flush=True)
    draw_and_say(options.out, draw)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
