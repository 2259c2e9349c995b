"""Launching a kernel again for less of the host's time than Triton's `kernel[grid](...)` takes.

For every launch Triton works out what each argument is specialised on and looks the compiled kernel up by that: 13 us
with 20 to 30 arguments. Here it is looked up by the arguments themselves, in 5 us, and launched by Triton's own
`compiled[grid]`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

# Where of a tensor nothing but its type and whether it begins at a multiple of 16 bytes decides what is compiled:
# these versions, and not on AMD's cards. Elsewhere every launch is Triton's.
REMEMBERS = torch.version.cuda is not None and triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
# Lengths that differ from call to call are other arguments each time.
MOST_REMEMBERED = 1024


class Kernel:
    """A Triton kernel that remembers what it was compiled to.

        @Kernel
        @triton.jit
        def add_kernel(x, y, N, BM: tl.constexpr): ...

        add_kernel[(4,)](x, y, 100, BM=32, num_warps=4)

    In a launch its constants have names and nothing else has, and an argument is of one type in all launches. Triton's
    settings of how kernels are compiled (debugging, instrumentation) must be made before the first launch.

    Attributes:
        jit: Triton's function.
        compiled: by device and arguments, what `jit` was compiled to and the constants.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self.compiled: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        # the interpreter compiles nothing
        remembers = REMEMBERS and isinstance(self.jit, triton.JITFunction)
        return partial(self.launch, grid) if remembers else self.jit[grid]

    def launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        """Launches the kernel on the current device and stream.

        Args:
            grid: one to three numbers of programs.
            *args: tensors, numbers, and None for what there is not.
            **named: constants, and Triton's options.
        """
        what: list[Any] = [driver.active.get_current_device(), tuple(named), *named.values()]
        for x in args:
            if isinstance(x, Tensor):
                what.append(x.dtype)
                what.append(x.data_ptr() % 16)
            else:
                what.append(x)
        key = tuple(what)
        found = self.compiled.get(key)
        if found is None:
            launched = self.jit[grid](*args, **named)
            if isinstance(launched, CompiledKernel):  # not what is still to be compiled
                self.remember(key, launched, len(args), named)
        else:
            compiled, constants = found
            compiled[(*grid, 1, 1)[:3]](*args, *constants)

    def remember(self, key: tuple, compiled: Any, count: int, named: dict[str, Any]) -> None:
        """Keeps what Triton compiled for `count` arguments without a name and these with one."""
        constants = self.jit.params[count:]
        assert all(parameter.is_constexpr for parameter in constants), self.jit
        if len(self.compiled) >= MOST_REMEMBERED:
            self.compiled.clear()
        self.compiled[key] = compiled, tuple(named[parameter.name] for parameter in constants)
