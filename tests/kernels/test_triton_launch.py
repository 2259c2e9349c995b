"""Launches that find again what was compiled, with a compiler and a card that are not there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from attention_inputs import Shape, Sizes, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from nsa_hf.kernels.gpu import launch  # noqa: E402


@triton.jit
def copy_kernel(x, y, N, factor, BM: tl.constexpr, BN: tl.constexpr):
    """Is never compiled."""


class Compiled:
    """Stands for a compiled kernel: remembers its launches."""

    def __init__(self, arguments: tuple) -> None:
        self.arguments, self.launches = arguments, []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.launches.append((grid, args))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What Triton was asked for, in order."""
    found: list[Compiled] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        found.append(Compiled((grid, args, named)))
        return found[-1]

    class Driver:
        device = 0

        def get_current_device(self) -> int:
            return self.device

    monkeypatch.setattr(triton.JITFunction, "run", run)
    monkeypatch.setattr(launch, "REMEMBERS", True)
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "driver", type("Active", (), {"active": Driver()}))
    return found


X = torch.zeros(64, dtype=torch.bfloat16)
ARGUMENTS = (X, None, 100, 0.5)
CONSTANTS = {"BN": 32, "BM": 16, "num_warps": 4}


def test_a_second_launch_is_of_what_was_compiled(compiled: list[Compiled]) -> None:
    kernel, other = launch.Kernel(copy_kernel), torch.ones(3, 5, dtype=torch.bfloat16)
    kernel[(3,)](*ARGUMENTS, **CONSTANTS)
    assert [x.arguments for x in compiled] == [((3,), ARGUMENTS, CONSTANTS)]
    kernel[(7, 2)](other, None, 100, 0.5, **CONSTANTS)
    assert len(compiled) == 1
    # in the order of the kernel's parameters, without the options
    assert compiled[0].launches == [((7, 2, 1), (other, None, 100, 0.5, 16, 32))]


def test_what_is_still_to_be_compiled_is_not_remembered(compiled: list[Compiled], monkeypatch) -> None:
    monkeypatch.setattr(launch, "CompiledKernel", dict)  # of another kind is what Triton gives then
    kernel = launch.Kernel(copy_kernel)
    for _ in range(2):
        kernel[(3,)](*ARGUMENTS, **CONSTANTS)
    assert len(compiled) == 2 and not compiled[0].launches


OTHERS = {
    "another type": ((X.float(), *ARGUMENTS[1:]), CONSTANTS),
    "begins elsewhere": ((X[1:], *ARGUMENTS[1:]), CONSTANTS),
    "a tensor in the place of nothing": ((X, X, 100, 0.5), CONSTANTS),
    "another number": ((X, None, 1, 0.5), CONSTANTS),
    "another constant": (ARGUMENTS, CONSTANTS | {"BM": 32}),
    "another option": (ARGUMENTS, CONSTANTS | {"num_warps": 8}),
    "one more option": (ARGUMENTS, CONSTANTS | {"num_stages": 2}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_arguments_are_compiled_for(compiled: list[Compiled], name: str) -> None:
    args, named = OTHERS[name]
    kernel = launch.Kernel(copy_kernel)
    for _ in range(2):
        kernel[(3,)](*ARGUMENTS, **CONSTANTS)
        kernel[(3,)](*args, **named)
    assert [x.arguments for x in compiled] == [((3,), ARGUMENTS, CONSTANTS), ((3,), args, named)]
    assert [len(x.launches) for x in compiled] == [1, 1]


def test_another_card_is_compiled_for(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = launch.Kernel(copy_kernel)
    kernel[(3,)](*ARGUMENTS, **CONSTANTS)
    monkeypatch.setattr(launch.driver.active, "device", 1)
    kernel[(3,)](*ARGUMENTS, **CONSTANTS)
    assert len(compiled) == 2


def test_numbers_that_always_differ_are_forgotten(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_REMEMBERED", 5)
    kernel = launch.Kernel(copy_kernel)
    for count in range(17):
        kernel[(3,)](X, None, count, 0.5, **CONSTANTS)
        assert len(kernel.compiled) <= 5
    assert len(compiled) == 17


def test_other_versions_launch_by_themselves(compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "REMEMBERS", False)
    kernel = launch.Kernel(copy_kernel)
    for _ in range(2):
        kernel[(3,)](*ARGUMENTS, **CONSTANTS)
    assert len(compiled) == 2 and not kernel.compiled


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


@pytest.mark.parametrize(
    ("index", "packed", "expected"), [(False, False, (11, 11)), (True, False, (10, 8)), (True, True, (11, 8))]
)
def test_launches_of_both_passes(
    monkeypatch: pytest.MonkeyPatch, index: bool, packed: bool, expected: tuple[int, int]
) -> None:
    """Small models are bound by them."""
    from nsa_hf.kernels.gpu import op

    launched: Counter[str] = Counter()

    def count(kernel: launch.Kernel, grid: tuple[int, ...]) -> Any:
        return lambda *args, **named: launched.update([kernel.jit.__name__])

    monkeypatch.setattr(launch.Kernel, "__getitem__", count)
    shape = Shape(Sizes(32, 16, 64, 16, 1, 2, 512), 1, 2048, 2048, 3, 3, 64, 64)
    inputs = make_inputs(shape, dtype=torch.bfloat16)
    tensors = [inputs[name] for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates")] + [None] * 7
    if index:
        tensors[3:5], tensors[8:10] = [None, None], [inputs["q"], inputs["k"]]
    if packed:
        tensors[10] = torch.tensor([0, 700, 2048], dtype=torch.int32)
    numbers, found = list(shape.sizes.__dict__.values()), []
    with Operations() as forward:
        _, selection, *saved = op.forward_op._init_fn(*tensors, numbers, 0.1)
    found.append(launched.total() + forward.found.total())
    launched.clear()
    with Operations() as backward:
        op.backward_op._init_fn(inputs["q"], *tensors[:8], packed, selection, saved, numbers, 0.1)
    found.append(launched.total() + backward.found.total())
    assert tuple(found) == expected, (launched, forward.found, backward.found)


def test_operators_run_on_the_card_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_hf.kernels.gpu import common, op
    from nsa_hf.kernels.gpu.decode.op import decode_op

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
    assert all(each._init_fn.__code__ is guarded for each in (op.forward_op, op.backward_op, decode_op))
