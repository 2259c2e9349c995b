"""The kernels of training and of decoding at short versions of the GPU tests' shapes, for compute-sanitizer to watch.

    python .ci/every_kernel.py              all of them
    python .ci/every_kernel.py 0/4          of four equal parts the first
    python .ci/every_kernel.py 0/1 index    those whose names have that in them

Compares nothing: the tests do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.extend(str(Path(__file__).resolve().parents[1] / "tests" / folder) for folder in ("helpers", "kernels"))
from attention_inputs import make_inputs, with_gradients
from test_gpu_decode import HEADS, cached_inputs, step
from test_gpu_kernels import REAL
from triton_cases import on_device

from nsa_hf.kernels import nsa_attention

# A race checker takes very much longer: few more tokens than are selected, and one KV head.
TOKENS = 1200
BOUNDS: dict[str, dict[str, Any]] = {
    "large blocks": {"queries": 300, "keys": 2500},
    "packed": {"cu_seqlens": (0, 17, 59, 60, TOKENS)},
    "padded, the last queries": {"queries": 300, "starts": (0, 100, 900), "lengths": (TOKENS, 1000, 1190)},
    "own window keys": {"queries": 500, "own_window": 1100},
}
ONE_HEAD: dict[str, Any] = {"kv_heads": 1, "queries": TOKENS, "keys": TOKENS}
SHORT = {
    name: replace(shape, **ONE_HEAD | BOUNDS.get(name.removeprefix("index, "), {})) for name, shape in REAL.items()
}


def train(name: str, dtype: torch.dtype) -> bool:
    """Both passes of one shape. Rows that are padding hold NaN, which nothing may read."""
    inputs = with_gradients(on_device(make_inputs(SHORT[name], dtype=dtype), "cuda"))
    out = nsa_attention(**inputs, backend="triton")
    out.backward(torch.ones_like(out))
    return bool(out.isfinite().all())


def decode(heads: str, batch: int, queries: int, fill: int, bits: int = 0) -> bool:
    """One step; beyond 32,768 tokens several programs share the blocks of a query. `bits`: of an index's keys."""
    return bool(step(cached_inputs(heads, batch, queries, max(4096, fill), fill, bits=bits))[0].isfinite().all())


def cases() -> dict[str, Callable[[], bool]]:
    found: dict[str, Callable[[], bool]] = {}
    for name in SHORT:
        found[f"train as {name}, bf16"] = partial(train, name, torch.bfloat16)
    for name in ("9:3:64", "packed"):
        found[f"train as {name}, fp32"] = partial(train, name, torch.float32)
    for heads in HEADS:
        for batch, queries, fill in ((1, 1, 4001), (3, 1, 4096), (2, 5, 3000), (1, 1, 20)):
            name = f"decode {heads}, batch {batch}, {queries} queries, {fill} tokens"
            found[name] = partial(decode, heads, batch, queries, fill)
        for batch, queries, fill, bits in ((1, 1, 4001, 16), (3, 1, 4096, 8), (2, 5, 3000, 8)):
            name = f"decode {heads}, index in {bits} bits, batch {batch}, {queries} queries, {fill} tokens"
            found[name] = partial(decode, heads, batch, queries, fill, bits)
    found["decode 9:3:64, 140,000 tokens"] = partial(decode, "9:3:64", 1, 1, 140_000)
    return found


def main() -> None:
    part, parts = map(int, (sys.argv[1] if len(sys.argv) > 1 else "0/1").split("/"))
    if not 0 <= part < parts:
        sys.exit(f"error: a part is 0/N to N-1/N, got {sys.argv[1]}")
    wanted = [(name, case) for name, case in cases().items() if all(word in name for word in sys.argv[2:])]
    for name, case in wanted[part::parts]:
        finite = case()
        torch.cuda.synchronize()
        print(f"{name}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        if not finite:
            sys.exit(1)


if __name__ == "__main__":
    main()
