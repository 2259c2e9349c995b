"""Every kernel once, at the shapes of the GPU tests, for a checker of memory and races to watch. Compares nothing.

python .ci/every_kernel.py              all of them
python .ci/every_kernel.py 0/4          of four equal parts the first
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from attention_inputs import make_inputs, with_gradients
from test_gpu_decode import HEADS, cached_inputs, step
from test_gpu_kernels import REAL
from triton_cases import on_device

from nsa_hf.kernels import nsa_attention


def train(name: str, dtype: torch.dtype) -> bool:
    """Both passes of one shape. Rows that are padding hold NaN, which nothing may read."""
    inputs = with_gradients(on_device(make_inputs(REAL[name], dtype=dtype), "cuda"))
    out = nsa_attention(**inputs, backend="triton")
    out.backward(torch.ones_like(out))
    return bool(out.isfinite().all())


def decode(heads: str, batch: int, queries: int, fill: int) -> bool:
    return bool(step(cached_inputs(heads, batch, queries, 4096, fill))[0].isfinite().all())


def cases() -> dict[str, Callable[[], bool]]:
    found: dict[str, Callable[[], bool]] = {}
    for name in REAL:
        found[f"train {name}, bf16"] = lambda name=name: train(name, torch.bfloat16)
    for name in ("9:3:64", "packed"):
        found[f"train {name}, fp32"] = lambda name=name: train(name, torch.float32)
    for heads in HEADS:
        for batch, queries, fill in ((1, 1, 4001), (3, 1, 4096), (2, 5, 3000), (1, 1, 20)):
            given = (heads, batch, queries, fill)
            found[f"decode {heads}, batch {batch}, {queries} queries, {fill} tokens"] = lambda given=given: decode(
                *given
            )
    return found


def main() -> None:
    part, parts = map(int, (sys.argv[1] if len(sys.argv) > 1 else "0/1").split("/"))
    for name, case in list(cases().items())[part::parts]:
        finite = case()
        torch.cuda.synchronize()
        print(f"{name}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        if not finite:
            sys.exit(1)


if __name__ == "__main__":
    main()
