"""Launches that are written down and repeated, with a compiler and a card that are not there."""

from __future__ import annotations

import ctypes
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from attention_inputs import TENSORS, Shape, Sizes, make_inputs, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton_ahead import signature_of
from triton_cases import CASES

from nsa_hf.kernels import nsa_attention

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from nsa_hf.kernels.gpu import launch  # noqa: E402


@launch.Kernel
def copy_kernel(x, y, N, HQ, factor, BM: tl.constexpr, BN: tl.constexpr):
    """Is never compiled."""


class Compiled:
    """Stands for a compiled kernel: remembers its launches."""

    def __init__(self, arguments: tuple) -> None:
        self.arguments, self.launches = arguments, []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args, stream: self.launches.append((grid, args, stream))


def test_a_kernel_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kernel: Any, *args: Any, **named: Any) -> None:
        raise triton.OutOfResources(163840, 101376, "shared memory")

    monkeypatch.setattr(triton.JITFunction, "run", run)
    with pytest.raises(ValueError, match=r"copy_kernel takes 163,840 of shared memory .* this card has 101,376: use b"):
        copy_kernel[(1,)](torch.zeros(1), torch.zeros(1), 1, 1, 1.0, BM=1, BN=1)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What Triton was asked for, in order; its stream is number 7."""
    found: list[Compiled] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        found.append(Compiled((grid, args, named)))
        return found[-1]

    monkeypatch.setattr(triton.JITFunction, "run", run)
    monkeypatch.setattr(launch, "REMEMBERS", True)
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7)))
    return found


def copy(x: torch.Tensor, y: torch.Tensor | None, many: list[torch.Tensor], numbers: list[int], scale: float) -> list:
    """An operator: two launches, of parts of its inputs and of what it makes."""
    made, zeros = x.new_empty(2, 8), x.new_zeros(4)
    copy_kernel[(3,)](x, y, 100, 8, scale, BM=16, BN=32, num_warps=4)
    copy_kernel[(len(x), 2)](made.unbind()[1][3:], many[0].view(-1)[1:], numbers[0], 8, scale, BM=16, BN=64)
    copied = torch.empty_like(zeros)
    copied.copy_(zeros)
    return [copied, made]


X = torch.arange(64, dtype=torch.bfloat16)
ARGUMENTS = (X, None, [torch.zeros(4), torch.zeros(5)], [100, 3], 0.5)


def test_a_second_call_repeats_the_first(compiled: list[Compiled]) -> None:
    operator = launch.remembered(copy)
    first = operator(*ARGUMENTS)
    assert [x.arguments[0] for x in compiled] == [(3,), (64, 2)] and not compiled[0].launches
    assert compiled[0].arguments[2] == {"BM": 16, "BN": 32, "num_warps": 4}

    x, many = torch.ones(64, dtype=torch.bfloat16), [torch.ones(4), torch.ones(5)]
    copied, made = operator(x, None, many, [100, 3], 0.5)
    assert len(compiled) == 2
    # addresses, and the constants in the order of the kernel's parameters, without options
    behind = made.data_ptr() + 2 * (8 + 3)
    assert compiled[0].launches == [((3, 1, 1), (x.data_ptr(), None, 100, 8, 0.5, 16, 32), 7)]
    assert compiled[1].launches == [((64, 2, 1), (behind, many[0].data_ptr() + 4, 100, 8, 0.5, 16, 64), 7)]
    assert copied.tolist() == [0] * 4 and made.shape == (2, 8) and made.dtype == x.dtype
    assert {x.data_ptr() for x in first}.isdisjoint({copied.data_ptr(), made.data_ptr()})


def test_one_tensor_in_two_places(compiled: list[Compiled]) -> None:
    """Where they were one, they need not be the next time."""
    operator = launch.remembered(copy)
    operator(X, X, *ARGUMENTS[2:])
    other = torch.ones(64, dtype=torch.bfloat16)
    operator(X, other, *ARGUMENTS[2:])
    assert len(compiled) == 2 and compiled[0].launches[0][1][:2] == (X.data_ptr(), other.data_ptr())


def test_what_is_not_needed_is_given_back(compiled: list[Compiled]) -> None:
    operator = launch.remembered(copy)
    operator(*ARGUMENTS)
    repeat = mock.Mock(side_effect=launch.Recorded.repeat)
    with mock.patch.object(launch.Recorded, "repeat", lambda self, inputs: repeat(self, inputs)):
        operator(*ARGUMENTS)
    (recorded, _), _ = repeat.call_args
    kinds = [(type(step).__name__, free) for step, free in recorded.steps]
    # three inputs: tensors 0 to 2; the zeros are number 4
    assert kinds == [("Made", []), ("Made", []), ("Launch", []), ("Launch", []), ("Made", []), ("Copy", [4])]


def test_what_is_still_to_be_compiled_is_not_remembered(compiled: list[Compiled], monkeypatch) -> None:
    monkeypatch.setattr(launch, "CompiledKernel", dict)  # of another kind is what Triton gives then
    operator = launch.remembered(copy)
    for _ in range(2):
        operator(*ARGUMENTS)
    assert len(compiled) == 4 and not compiled[0].launches


LISTS = ARGUMENTS[2:]
OTHERS = {
    "another type": (X.float(), None, *LISTS),
    "another shape": (X.view(8, 8), None, *LISTS),
    "begins elsewhere": (torch.cat([X[:1], X])[1:], None, *LISTS),
    "a tensor in the place of nothing": (X, X, *LISTS),
    "another number": (X, None, LISTS[0], [1, 3], 0.5),
    "another scale": (X, None, *LISTS[:2], 0.25),
    "one more tensor": (X, None, [*LISTS[0], X], *LISTS[1:]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_arguments_are_written_down_anew(compiled: list[Compiled], name: str) -> None:
    operator = launch.remembered(copy)
    for _ in range(2):
        operator(*ARGUMENTS)
        operator(*OTHERS[name])
    assert len(compiled) == 4 and [len(x.launches) for x in compiled] == [1] * 4


def test_tensors_that_begin_elsewhere_one_or_the_other(compiled: list[Compiled]) -> None:
    shifted = torch.cat([X[:1], X])[1:]
    operator = launch.remembered(copy)
    operator(shifted, X, *LISTS)
    operator(X, shifted, *LISTS)
    assert len(compiled) == 4


def test_lengths_that_always_differ_are_forgotten(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_REMEMBERED", 5)
    operator = launch.remembered(copy)
    for count in range(1, 18):
        operator(torch.zeros(count), None, *LISTS)
    operator(torch.zeros(17), None, *LISTS)
    operator(torch.zeros(1), None, *LISTS)
    assert len(compiled) == 2 * 18


def test_other_versions_launch_by_themselves(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "REMEMBERS", False)
    operator = launch.remembered(copy)
    for _ in range(2):
        operator(*ARGUMENTS)
    assert len(compiled) == 4 and not compiled[0].launches


def add(x: torch.Tensor) -> list[torch.Tensor]:
    """Does something beside what can be repeated, and launches with what it gives."""
    other = x + 1
    copy_kernel[(3,)](other[1:], x, 100, 8, 0.5, BM=16, BN=32)
    return [x.new_empty(3)]


def copy_part(x: torch.Tensor) -> list[torch.Tensor]:
    made = x.new_empty(4)
    made[:2].copy_(x[:2])
    return [made]


@pytest.mark.parametrize("function", [add, copy_part])
def test_what_cannot_be_repeated_is_done_again(compiled: list[Compiled], function: Any) -> None:
    """Once it may be a signal handler's, which runs at any time; always is no accident, and slow."""
    operator = launch.remembered(function)
    with mock.patch.object(launch.Recorded, "repeat") as repeat:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            operator(X)
        with pytest.warns(UserWarning, match="worked out anew at each call, which is slower: aten"):
            operator(X)
    assert not repeat.called


@pytest.mark.parametrize("function", [lambda x: [x.new_empty(3, 2)[1]], lambda x: [x.detach()], lambda x: [x]])
def test_outputs_are_whole_tensors(compiled: list[Compiled], function: Any) -> None:
    with pytest.raises(NotImplementedError, match="not parts of them"):
        launch.remembered(function)(X)
    launch.remembered(copy)(*ARGUMENTS)  # and nothing is left of it
    assert len(compiled) == 2


def test_tensors_are_on_one_device(compiled: list[Compiled]) -> None:
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        launch.remembered(copy)(X, X.to("meta"), *LISTS)


class Interpreted:
    """Stands for what Triton compiled: the interpreter, given addresses."""

    def __init__(self, jit: Any, args: tuple, named: dict) -> None:
        self.jit, self.named = jit, named
        self.types = [x.dtype if isinstance(x, torch.Tensor) else None for x in args]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*arguments: Any, stream: int) -> None:
            values = [tensor_at(x, dtype) if dtype else x for x, dtype in zip(arguments, self.types, strict=False)]
            self.jit[grid](*values, **self.named)

        return run


def tensor_at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of one number, which says where it is."""
    if not address:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def launch_interpreted(kernel: launch.Kernel, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    with _disable_current_modes():  # the interpreter's own operations are not the operator's
        kernel.jit[grid](*args, **named)
    if recording := getattr(launch.thread, "recording", None):
        recording.add_launch(Interpreted(kernel.jit, args, named), (*grid, 1, 1)[:3], list(args))


def gradients(shape: Shape, seed: int) -> list[torch.Tensor]:
    inputs = with_gradients(make_inputs(shape, seed, torch.float32))
    out, selection = nsa_attention(**inputs, backend="triton", return_selection=True)
    out.backward(torch.ones_like(out))
    return [out.detach(), selection, *(inputs[name].grad for name in TENSORS if inputs.get(name) is not None)]


def repeated(name: str) -> tuple[bool, int]:
    """Whether repeated launches do what the first ones do, and how often they were repeated."""
    expected, repeats = gradients(CASES[name], 2), Counter()
    repeat = launch.Recorded.repeat
    with (
        mock.patch.object(launch, "remembers", return_value=True),
        mock.patch.object(launch, "CompiledKernel", Interpreted),
        mock.patch.object(launch, "driver"),
        mock.patch.object(launch.Kernel, "launch", launch_interpreted),
        mock.patch.object(launch.Recorded, "repeat", lambda *args: repeats.update("r") or repeat(*args)),
    ):
        gradients(CASES[name], 1)
        found = gradients(CASES[name], 2)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), repeats["r"]


@pytest.mark.parametrize(
    "name",
    [
        "groups of three",
        "groups of twelve, ragged and left-padded",
        "one token",
        "shorter than one compressed block",
        "forced blocks only",
        "more blocks asked than there are",
        "enough queries to be split over programs",
        "large blocks",
        "packed, own window",
        "left-padded, the last queries",
        "local blocks in the window, large ones",
        "index, no compressed branch",
        "index, packed",
    ],
)
def test_repeated_launches_do_the_same(process: ProcessPoolExecutor, name: str) -> None:
    assert process.submit(repeated, name).result() == (True, 2)


@pytest.mark.parametrize("x", [X, X[8:], X[::2], X.view(8, 8).t(), X[:0], torch.nn.Parameter(X)], ids=str)
def test_what_triton_looks_at(x: torch.Tensor) -> None:
    """Of a tensor of one type that begins at a multiple of 16 bytes Triton sees the same, whatever else it is."""
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    assert x.data_ptr() % 16 == 0
    assert specialize(backend, x, False, True, True) == specialize(backend, X, False, True, True)
    assert specialize(backend, X[1:], False, True, True) != specialize(backend, X, False, True, True)


class Operations(TorchDispatchMode):
    """Counts PyTorch's own operations, but for those that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and "empty" not in name:
            self.found[name] += 1
        return function(*args, **kwargs or {})


def run_both(shape: Shape, launches: Any, documents: list[int] | None = None) -> list[int]:
    """Launches nothing, but calls `launches` instead; returns PyTorch's own operations of each pass."""
    from nsa_hf.kernels.gpu import op

    inputs = make_inputs(shape, dtype=torch.bfloat16)
    tensors = [inputs[name] for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates")] + [None] * 7
    if shape.index is not None:
        tensors[8:10] = inputs["q_index"], inputs["k_index"]
    if documents:
        tensors[10] = torch.tensor(documents, dtype=torch.int32)
    numbers = list(shape.sizes.__dict__.values())
    with mock.patch.object(launch.Kernel, "launch", launches):
        with Operations() as forward:
            _, selection, *saved = op.run_forward(*tensors, numbers, 0.1)
        with Operations() as backward:
            op.run_backward(inputs["q"], *tensors[:8], bool(documents), selection, saved, numbers, 0.1)
    return [forward.found.total(), backward.found.total()]


PAPER = Sizes(32, 16, 64, 16, 1, 2, 512)
NSA = Shape(PAPER, 1, 2048, 2048, 3, 3, 64, 64)
INDEX = Shape(PAPER, 1, 2048, 2048, 3, 3, 64, 64, index=(3, 0, 32), compressed=False)


@pytest.mark.parametrize(
    ("shape", "documents", "expected"), [(NSA, None, 21), (INDEX, None, 17), (INDEX, [0, 700, 2048], 18)]
)
def test_launches_of_both_passes(shape: Shape, documents: list[int] | None, expected: int) -> None:
    """Small models are bound by them."""
    launched: Counter[str] = Counter()
    others = run_both(shape, lambda kernel, grid, *args, **named: launched.update([kernel.jit.__name__]), documents)
    assert launched.total() + sum(others) == expected, launched


@pytest.mark.parametrize("shape", [NSA, INDEX], ids=["compressed", "index"])
def test_one_kernel_for_all_lengths(shape: Shape) -> None:
    """What is compiled does not depend on the text's length, but for how the past is cut in sections."""
    found: list[set[str]] = []

    def launches(kernel: launch.Kernel, grid: tuple[int, ...], *values: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in named}
        arguments = dict(zip((one.name for one in kernel.jit.params), values, strict=False)) | named
        found[-1].add(str((kernel.jit.__name__, signature_of(kernel.jit, arguments), options)))

    for tokens in (2048, 2033, 1999):
        found.append(set())
        run_both(Shape(**{**vars(shape), "queries": tokens, "keys": tokens}), launches)
    assert found[0] == found[1] == found[2] and len(found[0]) >= 14


def test_operators_run_on_the_card_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_hf.kernels.gpu import common, op
    from nsa_hf.kernels.gpu.decode.op import run_decode

    current = ["cuda:0"]

    class Card:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            current.append(self.name)

        def __exit__(self, *_: Any) -> None:
            current.pop()

    class Elsewhere:
        is_cuda, device = True, "cuda:3"

    monkeypatch.setattr(torch.cuda, "device", Card)
    assert common.on_its_card(lambda x, y: (y, current[-1]))(Elsewhere(), 5) == (5, "cuda:3")
    assert current == ["cuda:0"]
    assert common.on_its_card(lambda x: current[-1])(torch.zeros(1)) == "cuda:0"
    guarded = common.on_its_card(len).__code__
    assert all(each.__code__ is guarded for each in (op.run_forward, op.run_backward, run_decode))
