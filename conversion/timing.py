"""How long the attention of one layer takes on the machine at hand, dense and sparse: `plan(src, timing=...)`.

    from nsa_hf.conversion import Timing, plan
    plan("path/to/llama", timing=Timing(lengths=(4096, 16384)))["timed"]

FLOPs say from which length sparse attention does less (costs.py); a clock says from which length that pays: later,
since dense kernels come nearer to what a card can do, and short texts wait for the host. Inputs are random, of the
converted model's heads, sizes and scorer; nothing is loaded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from nsa_hf.dense_kernels import DENSE_KERNELS
from nsa_hf.errors import NsaError
from nsa_hf.kernels import n_blocks, nsa_attention

from .costs import head_size, index_channels, kv_head_count
from .verify import check_whole_number

ENOUGH = 0.3  # seconds of repetitions
LONGEST = 1 << 20


@dataclass(frozen=True)
class Timing:
    """What is timed.

        >>> from nsa_hf.conversion import Timing, plan
        >>> planned = plan("path/to/llama", timing=Timing(lengths=(64, 128), device="cpu"))
        >>> [row["tokens"] for row in planned["timed"]["rows"]]
        [64, 128]

    Attributes:
        lengths: tokens of the texts.
        device: where; None: a GPU if there is one.
        patience: seconds; no longer text is begun when one call took more.
    """

    lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768, 65536)
    device: str | None = None
    patience: float = 20.0

    def __post_init__(self) -> None:
        if not self.lengths:
            raise NsaError("Timing needs at least one length, got none")
        for length in self.lengths:
            check_whole_number("a length to time", length, 2, LONGEST)


Call = Callable[[], object]


def time_attention(config: PreTrainedConfig, timing: Timing) -> dict[str, Any]:
    """Times one layer's attention, one row of text.

    Args:
        config: of the sparse model.
        timing: what is timed.

    Returns:
        `device`: its name; `dtype`, `heads`: `Hq:Hk:D`; `rows`: of each length `tokens`, and in milliseconds `forward`
        and `training` (forward and backward), each with `dense`, its `kernel`, and `nsa`; `faster_from`: for both the
        tokens from which sparse attention is faster, None: at none of these; `left_out`: why longer ones were not
        timed, or None.
    """
    device = torch.device(timing.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[dict[str, Any]] = []
    left_out = None
    for length in sorted(set(timing.lengths)):
        try:
            rows.append(_row(config, length, device, timing.patience))
        except torch.OutOfMemoryError:
            left_out = f"no memory for {length:,} tokens"
            break
        slowest = max(rows[-1][part][way] for part in ("forward", "training") for way in ("dense", "nsa")) / 1e3
        if slowest > timing.patience:
            left_out = f"at {length:,} tokens one call took {slowest:.0f} s"
            break
    heads = f"{config.num_attention_heads}:{kv_head_count(config)}:{head_size(config)}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "dtype": str(config.dtype).removeprefix("torch."),
        "heads": heads,
        "rows": rows,
        "faster_from": {part: _faster_from(rows, part) for part in ("forward", "training")},
        "left_out": left_out,
    }


def _row(config: PreTrainedConfig, tokens: int, device: torch.device, patience: float) -> dict[str, Any]:
    """Both ways and both passes at one length."""
    heads, kv_heads, size = config.num_attention_heads, kv_head_count(config), head_size(config)
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.float32).to(config.dtype)

    q, k, v = normal(1, tokens, heads, size), normal(1, tokens, kv_heads, size), normal(1, tokens, kv_heads, size)
    sizes, channels = config.nsa_sizes, index_channels(config)
    inputs: dict[str, Tensor | None] = {"q": q, "k": k, "v": v, "k_cmp": None, "v_cmp": None}
    inputs["gates"] = torch.rand(1, tokens, heads, 3, generator=random, device=device).to(config.dtype)
    if config.nsa_compression != "none":
        entries = n_blocks(tokens, sizes.kernel_size, sizes.kernel_stride)
        inputs |= {"k_cmp": normal(1, entries, kv_heads, size), "v_cmp": normal(1, entries, kv_heads, size)}
    if channels:
        inputs |= {"q_index": q[..., :channels].contiguous(), "k_index": k[..., :channels].contiguous()}

    def sparse(**given: Any) -> Tensor:
        out = nsa_attention(**given, **sizes.by_name())
        assert isinstance(out, Tensor)
        return out

    def dense(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

    row: dict[str, Any] = {"tokens": tokens}
    for part, trained in (("forward", False), ("training", True)):
        row[part] = {"nsa": _milliseconds(_call(sparse, inputs, trained), device, patience)}
        call = _call(dense, inputs, trained)
        found = [one for kernel in DENSE_KERNELS if (one := _dense(kernel, call, device, patience))]
        row[part]["dense"], row[part]["kernel"] = min(found or [(_milliseconds(call, device, patience), "default")])
    return row


def _call(function: Callable[..., Tensor], inputs: dict[str, Tensor | None], trained: bool) -> Call:
    """A forward pass without gradients, or one with its backward pass."""
    names = ("q", "k", "v", "k_cmp", "v_cmp", "gates") if trained else ()
    given = {name: x.requires_grad_() if x is not None and name in names else x for name, x in _copies(inputs).items()}
    if not trained:
        return torch.no_grad()(lambda: function(**given))

    def both() -> None:
        out = function(**given)
        out.backward(torch.ones_like(out))
        for x in given.values():
            if x is not None:
                x.grad = None

    return both


def _copies(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.detach() for name, x in inputs.items()}


def _dense(kernel: str, call: Call, device: torch.device, patience: float) -> tuple[float, str] | None:
    """Milliseconds and name of one of PyTorch's attentions; None: it does not run here."""
    try:
        with sdpa_kernel(DENSE_KERNELS[kernel]):
            return _milliseconds(call, device, patience), kernel
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def _milliseconds(call: Call, device: torch.device, patience: float) -> float:
    """The median time of a call, with the host's share, after those that compile."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once()]
    while sum(times) < min(ENOUGH, patience) and len(times) < 100:
        times.append(once())
    return statistics.median(times) * 1e3


def _faster_from(rows: list[dict[str, Any]], part: str) -> int | None:
    """Tokens from which on sparse attention is faster at all lengths that were timed."""
    found = None
    for row in reversed(rows):
        if row[part]["nsa"] >= row[part]["dense"]:
            break
        found = row["tokens"]
    return found


def render_timed(timed: dict[str, Any]) -> Table:
    """The times as a rich table."""
    where = f"{timed['device']}, {timed['dtype']}, heads {timed['heads']}"
    table = Table(title=f"Attention of one layer, ms: {where}", caption=timed["left_out"])
    for column in ("tokens", "dense", "NSA", "times", "training: dense", "NSA", "times"):
        table.add_column(column, justify="right")
    for row in timed["rows"]:
        cells = [f"{row['tokens']:,}"]
        for part in ("forward", "training"):
            dense, nsa = row[part]["dense"], row[part]["nsa"]
            cells += [f"{dense:.3g}", f"{nsa:.3g}", f"{dense / nsa:.2f}"]
        table.add_row(*cells)
    return table
