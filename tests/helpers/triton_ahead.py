"""Triton's compiler called ahead, for a card that is not there, where a kernel would be launched."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch
from attention_inputs import Sizes

triton = pytest.importorskip("triton")

# KiB of shared memory that a program may use, from the CUDA programming guide's table of compute capabilities.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
TENSOR_MEMORY = 512  # columns, of Blackwell's; what needs more compiles to a trap
PAPER = Sizes(32, 16, 64, 16, 1, 2, 512)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def signature_of(kernel, arguments: dict) -> tuple[dict, dict, dict]:
    """What Triton's launcher would find: types, constants, and what is divisible by 16."""
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        x = arguments[parameter.name]
        special = type(x) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (special and x == 1):
            types[parameter.name], constants[(index,)] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            types[parameter.name] = "*" + TYPES[x.dtype]
            if x.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "fp32" if isinstance(x, float) else "i32"
            if special and x % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def scattered_reductions(ttgir: str) -> list[str]:
    """Reductions that Triton compiles wrongly, without a word: those over numbers of a row that lie in lanes of a warp
    which are no neighbours.

    It exchanges numbers between lanes 2^i apart, `i` rising from the axis' first bit of the lane's number on (3.6 and
    3.7). A layout may have other bits in between.
    """
    aliases = dict(re.findall(r"^(#\w+) = (#ttg\.(?:linear|blocked)<.*>)$", ttgir, re.M))
    found = []
    for axis, body in re.findall(r'"tt.reduce"\(.*?\) <\{axis = (\d+) : i32\}>(.*?\}\) : \(.*?\) ->)', ttgir, re.S):
        for layout in re.findall(r"tensor<[\dx]+\w+, (.*?)>[,)]", body.rpartition("}) : (")[2]):
            lanes = lane_bits(layout + ">" * (layout.count("<") - layout.count(">")), aliases)
            bits = [bit for bit, base in enumerate(lanes) if base[int(axis)]]
            if bits and bits != list(range(bits[0], bits[0] + len(bits))):
                found.append(f"axis {axis} of {layout}: bits {bits} of the lane")
    return found


def lane_bits(layout: str, aliases: dict[str, str]) -> list[list[int]]:
    """Where each bit of the lane's number leads, by dimension; of layouts of products nothing is said."""
    if sliced := re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", layout):
        dim = int(sliced[1])
        return [base[:dim] + base[dim + 1 :] for base in lane_bits(sliced[2], aliases)]
    text = aliases.get(layout, layout)
    if "#ttg.linear" in text:
        lanes = re.search(r"lane = \[(\[.*?\])\]", text)
        assert lanes is not None, text
        return [[int(x) for x in base.split(",")] for base in re.findall(r"\[([\d, ]+)\]", lanes[1])]
    if "#ttg.blocked" not in text:
        return []
    sizes, threads, order = (
        [int(x) for x in re.search(name + r" = \[([\d, ]+)\]", text)[1].split(",")]
        for name in ("sizePerThread", "threadsPerWarp", "order")
    )
    bits = []
    for dim in order:
        for bit in range(threads[dim].bit_length() - 1):
            bits.append([sizes[dim] << bit if one == dim else 0 for one in range(len(order))])
    return bits


def compile_for(monkeypatch: pytest.MonkeyPatch, card: int, *modules: ModuleType) -> dict[str, int]:
    """From now on a launch compiles, for that card; the shared memory in bytes of every kernel by its name is filled in
    (the most, where several). `modules` ask for the card's kind and shared memory."""
    from nsa_hf.kernels.gpu import launch

    found: dict[str, int] = {}
    done = set()

    def compile_instead(kernel, *values, grid, warmup, **named) -> None:
        names = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
        options = {name: named.pop(name) for name in names if name in named}
        arguments = dict(zip((parameter.name for parameter in kernel.params), values, strict=False)) | named
        types, constants, attributes = signature_of(kernel, arguments)
        key = str((kernel.fn.__name__, types, constants, options))
        if key not in done:
            done.add(key)
            source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
            target = triton.backends.compiler.GPUTarget("cuda", card, 32)
            compiled = triton.compile(source, target=target, options=options)
            name = kernel.fn.__name__
            assert compiled.metadata.tmem_size <= TENSOR_MEMORY, name
            assert not scattered_reductions(compiled.asm["ttgir"]), name
            found[name] = max(found.get(name, 0), compiled.metadata.shared)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_instead)
    monkeypatch.setattr(launch, "REMEMBERS", False)
    for module in modules:
        monkeypatch.setattr(module, "shared_memory", lambda device: SHARED_MEMORY[card] * 1024)
        monkeypatch.setattr(module, "hopper", lambda device: card == 90, raising=False)
    return found
