"""What the Triton kernels share: tiles as wide as a power of two, the online softmax, tile sizes, launching.

Contracts behind the public function: every tensor is contiguous in `[B, T, H, D]` order, logits are in units of log2
(`scale_log2 = scale * log2(e)`), offsets that grow with the text are int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
# 99 KiB is what the smallest supported cards (sm86, sm89) give a program; sm80 gives 163, sm90 and sm100 give 227.
SMALL_SHARED_MEMORY, LARGE_SHARED_MEMORY = 120 * 1024, 200 * 1024


@triton.jit
def load_tile(base, rows, stride, row_mask, D: tl.constexpr, DP: tl.constexpr):
    """Rows `[R]` of a matrix whose rows stand `stride` apart as `[R, DP]`, zero outside the mask and behind `D`."""
    cols = tl.arange(0, DP)
    mask = row_mask[:, None]
    if D != DP:
        mask = mask & (cols < D)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, rows, stride, row_mask, x, D: tl.constexpr, DP: tl.constexpr):
    """The opposite of `load_tile`; converts to the pointer's type."""
    cols = tl.arange(0, DP)
    mask = row_mask[:, None]
    if D != DP:
        mask = mask & (cols < D)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def online_softmax_update(top, total, logits):
    """One step of the running softmax, in log2 units; rows that have seen nothing yet stay at `top = -inf`.

    Returns the tile's weights `[M, N]`, the factor `[M]` for what was summed before, and the new `top`, `total`.
    """
    new = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(logits - safe[:, None])
    factor = tl.exp2(top - safe)
    return weights, factor, new, total * factor + tl.sum(weights, 1)


@triton.jit
def lower_bound(values, count, x, STEPS):
    """The smallest `i` with `values[i] >= x`, or `count`; `values` rise. STEPS: `search_steps(count)`."""
    low = x * 0
    high = low + count
    for _ in tl.range(0, STEPS):
        searching = low < high
        middle = low + (high - low) // 2
        less = tl.load(values + middle, mask=searching, other=0) < x
        low = tl.where(searching & less, middle + 1, low)
        high = tl.where(searching & less, high, middle)
    return low


def search_steps(count: int) -> int:
    """Steps after which `lower_bound` has found its place among `count` values."""
    return count.bit_length()


# Triton's own, which kernels may call too, take some microseconds each.
def cdiv(count: int, size: int) -> int:
    """`count / size`, rounded up."""
    return -(-count // size)


@cache
def next_power_of_2(count: int) -> int:
    """The smallest power of two that is `count` or more."""
    return 1 << max(0, count - 1).bit_length()


@cache
def padded(dim: int) -> int:
    """The width of one tile for a head of `dim` numbers: a power of two, at least what a matrix product needs."""
    return max(16, next_power_of_2(dim))


@triton.constexpr_function
def first_width(dim: int, widest: int = 256) -> int:
    """Of a head of `dim` numbers in one tile or two (`tiles.py`), the width of the first.

    That is the greatest power of two in `dim` where the rest, padded too, makes less of both than one tile would take;
    `widest` at most, which is half of `dim` or more.
    """
    whole, power = max(16, 1 << (dim - 1).bit_length()), 1 << (dim.bit_length() - 1)
    return min(widest, power if power + max(16, 1 << (dim - power - 1).bit_length()) < whole else whole)


@triton.constexpr_function
def second_width(dim: int, widest: int = 256) -> int:
    """The width of the second tile, which holds the rest; 0: there is none."""
    rest = dim - first_width(dim, widest)
    return max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


@cache
def tile_width(dim: int) -> int:
    """The width of both tiles together: 192 for 192 numbers, 80 for 72, 128 for 120."""
    return first_width(dim) + second_width(dim)


def precision(dtype: torch.dtype) -> str:
    """How products of two float32 tiles are taken: exactly. (tf32 would lose half of the digits.)"""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def begin_next(OVERLAP: tl.constexpr):
    """Lets the next launch begin when every program of this one has come here.

    Every kernel of such a chain must `wait_for_previous`, whatever it reads: the last one may read what the first one
    wrote, and knows only of the one before it.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Until the launch before this one has ended, and what it wrote is there."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch can begin while the one before it ends: programmatic dependent launch, from 9.0 on."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device)[0] >= 9


def in_chain(device: torch.device, first: bool = False) -> dict[str, bool]:
    """Options of a launch in a chain (see `begin_next`); the first one waits for everything before it as all do."""
    return {"OVERLAP": True, "launch_pdl": not first} if overlaps(device) else {"OVERLAP": False}


def on_its_card(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an operator, run with its first tensor's card as the current one, on which kernels are launched."""

    @wraps(body)
    def run(x: Tensor, *others: Any) -> Any:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return body(x, *others)

    return run


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card; asked once a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def hopper(device: torch.device) -> bool:
    """Whether the card's products are Hopper's, of four warps and out of shared memory."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device)[0] == 9


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may use; asked once a device, at the first call."""
    if device.type != "cuda":
        return 1 << 20
    card = torch.cuda.get_device_properties(device)
    if card.major < 8:
        raise ValueError(
            f"backend='triton' needs a card of compute capability 8.0 or more, got {card.name} with {card.major}."
            f"{card.minor}: use backend='reference'"
        )
    return card.shared_memory_per_block_optin  # type: ignore[attr-defined]


def bytes_a_row(q: Tensor, value_dim: int) -> int:
    """Shared memory that one row of the wider of K and V takes."""
    # while torch.compile traces they may be symbols, which a cache does not take
    return max(tile_width(int(q.shape[-1])), tile_width(int(value_dim))) * q.element_size()


def largest_part(q: Tensor, value_dim: int) -> int:
    """Tokens of a selection block that are attended to at once: as many as registers and shared memory hold well."""
    row, small = bytes_a_row(q, value_dim), shared_memory(q.device) < SMALL_SHARED_MEMORY
    if small and row > 768:
        return 16
    return 32 if (small and row > 256) or q.dtype == torch.float32 else 64
