"""Kernels, and operators whose launches are written down the first time and only repeated from then on.

What an operator launches follows from the shapes and types of its arguments alone. To work it out, and each launch anew
in Triton, takes the host longer than a short text takes the GPU: 2.3 ms for a forward and a backward pass on a slow
one. Repeating takes the addresses of the tensors and nothing else.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from threading import local
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

# Where nothing of a tensor but its type and whether it begins at a multiple of 16 bytes decides what is compiled, and a
# launch takes addresses as well: these versions, and not on AMD's cards. Elsewhere everything is worked out each time.
REMEMBERS = torch.version.cuda is not None and triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
# Recordings of an operator, about 20 KB each: lengths that differ from call to call are other ones each time.
MOST_REMEMBERED = 256
# Numbers that a model does not change. A kernel is compiled for what they are divisible by; other numbers follow the
# length of the text, and one kernel serves them all.
OF_THE_MODEL = ("HQ", "HK", "HI", "HJ")

thread = local()


class Kernel:
    """A Triton kernel, from the function that Triton compiles.

        @Kernel
        def add_kernel(x, y, N, BM: tl.constexpr): ...

        add_kernel[(4,)](x, y, 100, BM=32, num_warps=4)

    Parameters in capitals are whole numbers, and those that end in `_ptr` tensors that begin anywhere, as a row of the
    layout does. In a launch the constants have names and nothing else has.

    Attributes:
        jit: Triton's function.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        values = [name for name, one in inspect.signature(function).parameters.items() if one.annotation is one.empty]
        self.jit = triton.jit(
            function,
            do_not_specialize=[name for name in values if name.isupper() and name not in OF_THE_MODEL],
            do_not_specialize_on_alignment=[name for name in values if name.endswith("_ptr")],
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        """Launches the kernel on the current device and stream.

        Args:
            grid: one to three numbers of programs.
            *args: tensors, numbers, and None for what there is not.
            **named: constants, and Triton's options.

        Raises:
            ValueError: the kernel does not fit on the card.
        """
        try:
            launched = self.jit[grid](*args, **named)
        except triton.OutOfResources as error:
            raise ValueError(
                f"{self.jit.__name__} takes {error.required:,} of {error.name} for these heads, and this card has "
                f"{error.limit:,}: use bfloat16 instead of float32, smaller heads, or backend='reference'"
            ) from error
        if recording := getattr(thread, "recording", None):
            constants = [named[parameter.name] for parameter in self.jit.params[len(args) :]]
            recording.add_launch(launched, (*grid, 1, 1)[:3], [*args, *constants])


class Made(NamedTuple):
    """A tensor that was made, with one value everywhere or (None) any."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: float | None


class Launch(NamedTuple):
    """A launch, and of its arguments those that are addresses: where, in which tensor, and how far behind its begin."""

    run: Callable[..., None]
    arguments: list[Any]
    addresses: list[tuple[int, int, int]]


class Copy(NamedTuple):
    """One tensor's numbers written into another."""

    target: int
    source: int


Step = Made | Launch | Copy
MAKES = ("empty", "new_empty", "empty_like", "new_zeros", "new_full")


class Recording(TorchDispatchMode):
    """What an operator does between its inputs and its outputs, while it runs.

    Attributes:
        steps: in order.
        complete: whether it can be repeated: every kernel was compiled when it was launched, and PyTorch's operations
            only made tensors, looked at them from elsewhere, or copied whole ones.
        foreign: the last operation that was none of these.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.complete, self.foreign = True, ""
        self.inputs = len(inputs)
        # by tensor its number, a view's is that of what it is a view of; and by number where it began
        self.numbers, self.begins = WeakIdKeyDictionary(), [x.data_ptr() for x in inputs]
        self.counts = [x.numel() for x in inputs]
        for number, x in enumerate(inputs):
            self.numbers[x] = number

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view:
            for view in out if isinstance(out, (list, tuple)) else [out]:
                if args[0] in self.numbers:
                    self.numbers[view] = self.numbers[args[0]]
        elif name in MAKES and out.is_contiguous():
            value = {"new_zeros": 0, "new_full": args[-1]}.get(name)
            self.steps.append(Made(len(self.begins), tuple(out.shape), out.dtype, value))
            self.numbers[out] = len(self.begins)
            self.begins.append(out.data_ptr())
            self.counts.append(out.numel())
        elif name == "copy_" and all(self.is_whole(x) for x in args[:2]):
            self.steps.append(Copy(*(self.numbers[x] for x in args[:2])))
        else:  # not the operator's: of a signal handler, or of what the garbage collector ends
            self.complete, self.foreign = False, str(function)
        return out

    def is_whole(self, x: Tensor) -> bool:
        """Whether a tensor is all that was made, or given, at once."""
        number = self.numbers.get(x, -1)
        return number >= 0 and x.data_ptr() == self.begins[number] and x.numel() == self.counts[number]

    def add_launch(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> None:
        """Adds a launch of what Triton compiled."""
        known = all(x in self.numbers for x in arguments if isinstance(x, Tensor))
        if not isinstance(compiled, CompiledKernel) or not known:  # the first: still to be compiled
            self.complete = False
            return
        addresses = []
        for place, x in enumerate(arguments):
            if isinstance(x, Tensor):
                number = self.numbers[x]
                addresses.append((place, number, x.data_ptr() - self.begins[number] if x.numel() else 0))
                arguments[place] = None
        self.steps.append(Launch(compiled[grid], arguments, addresses))

    def end(self, outputs: Sequence[Tensor]) -> Recorded:
        """All steps, and where a tensor is needed for the last time.

        Raises:
            NotImplementedError: an output is a part of a tensor, or an input.
        """
        numbers = [self.numbers[x] for x in outputs]
        if not all(number >= self.inputs and self.is_whole(x) for number, x in zip(numbers, outputs, strict=True)):
            raise NotImplementedError("an operator's outputs are tensors that it makes, and not parts of them")
        last = {}
        for place, step in enumerate(self.steps):
            if isinstance(step, Made):
                last[step.number] = place
            else:
                used = step if isinstance(step, Copy) else [number for _, number, _ in step.addresses]
                last |= dict.fromkeys(used, place)
        free: list[list[int]] = [[] for _ in self.steps]
        for number, place in last.items():
            if number >= self.inputs and number not in numbers:
                free[place].append(number)
        return Recorded(list(zip(self.steps, free, strict=True)), len(self.begins), numbers)


class Recorded(NamedTuple):
    """What is to be done again.

    Attributes:
        steps: each with the numbers of the tensors that are not needed any more.
        size: number of tensors, the inputs first.
        outputs: their numbers.
    """

    steps: list[tuple[Step, list[int]]]
    size: int
    outputs: list[int]

    def repeat(self, inputs: list[Tensor]) -> list[Tensor]:
        """Does it on the current device and stream; returns the outputs."""
        first = inputs[0]
        stream = driver.active.get_current_stream(first.device.index)
        tensors: list[Any] = [*inputs, *[None] * (self.size - len(inputs))]
        begins = [0 if x is None else x.data_ptr() for x in tensors]
        for step, free in self.steps:
            if isinstance(step, Launch):
                arguments = step.arguments.copy()
                for place, number, behind in step.addresses:
                    arguments[place] = begins[number] + behind
                step.run(*arguments, stream=stream)
            elif isinstance(step, Made):
                number, shape, dtype, value = step
                if value is None:
                    tensors[number] = first.new_empty(shape, dtype=dtype)
                elif value == 0:  # no kernel
                    tensors[number] = first.new_zeros(shape, dtype=dtype)
                else:
                    tensors[number] = first.new_full(shape, value, dtype=dtype)
                begins[number] = tensors[number].data_ptr()
            else:
                tensors[step.target].copy_(tensors[step.source])
            for number in free:
                tensors[number] = None
        return [tensors[number] for number in self.outputs]


def remembered(operator: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The operator, which repeats what was written down where shapes, types and numbers are those of an earlier call.

    It makes tensors and launches kernels; which ones must follow from these alone. Its arguments are contiguous
    tensors of one device, None, numbers and lists of these. Triton's settings of how kernels are compiled (debugging,
    instrumentation) must be made before the first call.
    """
    recorded: dict[tuple, Recorded] = {}
    failed: tuple = ()  # the last key that something foreign kept from being remembered

    @wraps(operator)
    def run(*args: Any) -> list[Tensor]:
        nonlocal failed
        if not remembers():
            return operator(*args)
        key, tensors = describe(args)
        if found := recorded.get(key):
            return found.repeat(tensors)
        # each argument a tensor of its own, though several be the same
        inputs = [x.detach() for x in tensors]
        remaining = iter(inputs)
        thread.recording = recording = Recording(inputs)
        try:
            with recording:
                outputs = operator(*(replace(x, remaining) for x in args))
        finally:
            thread.recording = None
        if recording.complete:
            if len(recorded) >= MOST_REMEMBERED:
                recorded.clear()
            recorded[key] = recording.end(outputs)
        elif recording.foreign:
            if key == failed:  # twice is no accident
                warnings.warn(
                    f"{operator.__name__} is worked out anew at each call, which is slower: {recording.foreign} cannot "
                    "be repeated",
                    stacklevel=2,
                )
            failed = key
        return outputs

    return run


def remembers() -> bool:
    """Whether there are compiled kernels to be launched again."""
    return REMEMBERS and not triton.knobs.runtime.interpret


def describe(args: tuple) -> tuple[tuple, list[Tensor]]:
    """What of an operator's arguments decides what is launched, and the tensors in them.

    Raises:
        ValueError: the tensors are not on one device.
    """
    tensors: list[Tensor] = []
    key: list[Any] = []
    for x in args:
        if isinstance(x, Tensor):
            tensors.append(x)
            key.append(Tensor)
        elif isinstance(x, list):
            many = [one for one in x if isinstance(one, Tensor)]
            tensors += many
            key.append(len(many) or tuple(x))
        else:
            key.append(x)
    bits, device = 0, tensors[0].device
    for x in tensors:
        if x.device != device:  # repeated launches take addresses, whatever they are of
            raise ValueError(f"all tensors must be on one device, got {device} and {x.device}: move them")
        key.append(x.shape)
        key.append(x.dtype)
        bits |= x.data_ptr()
    if bits % 16:
        key += [x.data_ptr() % 16 for x in tensors]
    key.append(device)
    return tuple(key), tensors


def replace(x: Any, tensors: Iterator[Tensor]) -> Any:
    """The argument with the next tensors in the places of its own."""
    if isinstance(x, Tensor):
        return next(tensors)
    return [replace(one, tensors) for one in x] if isinstance(x, list) else x
