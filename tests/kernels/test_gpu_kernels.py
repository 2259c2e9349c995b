"""The Triton kernels on a GPU, at real shapes, against the float64 reference. `make gpu` runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_inputs import EMPTY, TENSORS, Shape, Sizes, check_empty, make_inputs, run_empty, with_gradients
from torch.utils.checkpoint import checkpoint
from triton_cases import CASES, compare, in_float64, on_device

from nsa_hf.kernels import nsa_attention

pytestmark = pytest.mark.gpu

PAPER = Sizes(32, 16, 64, 16, 1, 2, 512)
REAL = {
    "9:3:64": Shape(PAPER, 1, 2100, 2100, 3, 3, 64, 64),
    "32:8:128": Shape(PAPER, 1, 3001, 3001, 8, 4, 128, 128),
    "64:4:128": Shape(PAPER, 1, 2500, 2500, 4, 16, 128, 128),
    "16:2:192/128": Shape(PAPER, 1, 2200, 2200, 2, 8, 192, 128),
    "5:1:80, two rows": Shape(PAPER, 2, 1900, 1900, 1, 5, 80, 80),
    "7:1:96": Shape(PAPER, 1, 2100, 2100, 1, 7, 96, 96),
    "24:2:32": Shape(PAPER, 1, 2100, 2100, 2, 12, 32, 32),
    "2:2:256": Shape(PAPER, 1, 2100, 2100, 2, 1, 256, 256),
    "4:2:8": Shape(PAPER, 1, 2100, 2100, 2, 2, 8, 8),
    "71:1:64": Shape(PAPER, 1, 1500, 1500, 1, 71, 64, 64),
    "packed": Shape(PAPER, 1, 4000, 4000, 2, 2, 64, 64, cu_seqlens=(0, 17, 1200, 1201, 3333, 4000)),
    "padded, the last queries": Shape(
        PAPER, 3, 700, 3000, 2, 2, 64, 64, starts=(0, 100, 2500), lengths=(3000, 2000, 2900)
    ),
    "large blocks": Shape(Sizes(64, 16, 256, 6, 2, 1, 300), 1, 2500, 2500, 2, 2, 64, 64),
    "index, 9:3:64": Shape(PAPER, 1, 2100, 2100, 3, 3, 64, 64, index=(3, 0, 32), compressed=False),
    "index, 32:8:128": Shape(PAPER, 1, 3001, 3001, 8, 4, 128, 128, index=(4, 0, 32), compressed=False),
    "index, 64:4:128": Shape(PAPER, 1, 2500, 2500, 4, 16, 128, 128, index=(16, 0, 64), compressed=False),
    "index, 2:2:256": Shape(PAPER, 1, 2100, 2100, 2, 1, 256, 256, index=(1, 0, 128), compressed=False),
    "index and compressed branch, one key": Shape(PAPER, 1, 2100, 2100, 2, 2, 64, 64, index=(1, 1, 24)),
    "index in 8 bits, 32:8:128": Shape(
        PAPER, 1, 3001, 3001, 8, 4, 128, 128, index=(4, 0, 32), eight_bits=True, compressed=False
    ),
    "index, packed": Shape(
        PAPER,
        1,
        4000,
        4000,
        2,
        2,
        64,
        64,
        cu_seqlens=(0, 17, 1200, 1201, 3333, 4000),
        index=(2, 0, 32),
        compressed=False,
    ),
    "index, padded, the last queries": Shape(
        PAPER,
        3,
        700,
        3000,
        2,
        2,
        64,
        64,
        starts=(0, 100, 2500),
        lengths=(3000, 2000, 2900),
        index=(2, 0, 32),
        compressed=False,
    ),
    "index, large blocks": Shape(
        Sizes(64, 16, 320, 6, 2, 1, 300), 1, 4500, 4500, 2, 2, 64, 64, index=(2, 0, 32), compressed=False
    ),
    "own window keys": Shape(PAPER, 2, 900, 2500, 2, 2, 64, 64, own_window=1500),
}
SMALL = ["groups of three", "each token in three blocks", "packed, own window", "ragged and left-padded, own window"]


def assert_as_good_as_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    """A tensor's error, as a part of its norm, is at most the reference's in the same precision and one rounding more:
    probabilities and partial results are rounded once more on their way, to numbers that are averaged."""
    inputs = on_device(make_inputs(shape, 1, dtype), "cuda")
    gradients(on_device(make_inputs(shape, 2, dtype), "cuda"))  # what is compared then repeats these launches
    found = {}
    for name, backend, kind in (("mine", "triton", dtype), ("low", "reference", dtype), ("truth", "reference", None)):
        these = with_gradients(in_float64(inputs) if kind is None else inputs)
        out, selection = nsa_attention(**these, backend=backend, return_selection=True)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        out.backward(dout.to(out.dtype))
        found[name] = {"out": out.detach(), **{key: these[key].grad for key in TENSORS if these.get(key) is not None}}
        found[name]["selection"] = selection
    # a query whose selection differs has another output: few do, at ties within rounding
    same = (found["mine"]["selection"] == found["truth"]["selection"]).all(-1).double().mean()
    assert same >= (0.9995 if dtype == torch.float32 else 0.999)
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 4e-6
    for name, truth in found["truth"].items():
        if name != "selection" and truth.numel():
            error, low = (float((found[who][name].double() - truth).norm() / truth.norm()) for who in ("mine", "low"))
            assert error <= low + rounding, f"{name}: off by {error:.2e}, the reference by {low:.2e}"


@pytest.mark.parametrize("name", REAL)
def test_bfloat16(name: str) -> None:
    assert_as_good_as_the_reference(REAL[name], torch.bfloat16)


@pytest.mark.parametrize("name", ["9:3:64", "16:2:192/128", "2:2:256", "packed", "large blocks", "index, packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    assert_as_good_as_the_reference(REAL[name], dtype)


@pytest.mark.parametrize("name", SMALL)
def test_small_sizes(name: str) -> None:
    errors, same = compare(CASES[name], device="cuda")
    assert same == 1
    assert all(error <= 5e-6 for error in errors.values()), errors


def gradients(inputs: dict, function=nsa_attention) -> list[torch.Tensor]:
    inputs = with_gradients(inputs)
    out = function(**inputs)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(inputs[name].grad for name in TENSORS if inputs.get(name) is not None)]


@pytest.mark.parametrize("name", ["32:8:128", "index, 32:8:128"])
def test_the_same_inputs_give_the_same_bits(name: str) -> None:
    inputs = on_device(make_inputs(REAL[name], dtype=torch.bfloat16), "cuda")
    first, second = gradients(inputs), gradients(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["9:3:64", "index, 9:3:64"])
def test_compiled_checkpointed_and_under_autocast(name: str) -> None:
    inputs = on_device(make_inputs(REAL[name], dtype=torch.bfloat16), "cuda")
    expected = gradients(inputs)

    def checkpointed(q: torch.Tensor, **rest) -> torch.Tensor:
        return checkpoint(lambda x: nsa_attention(x, **rest), q, use_reentrant=False)

    for function in (torch.compile(nsa_attention, fullgraph=True), checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(gradients(inputs, function), expected, strict=True))
    with torch.autocast("cuda", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(inputs), expected, strict=True))


@pytest.mark.parametrize("name", ["9:3:64", "16:2:192/128", "packed", "index, padded, the last queries"])
def test_repeated_launches_are_those_that_were_written_down(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another stream and in a graph too; and they hold no more memory."""
    from nsa_hf.kernels.gpu import launch

    first, second = (on_device(make_inputs(REAL[name], seed, torch.bfloat16), "cuda") for seed in (1, 2))
    repeat, repeated = launch.Recorded.repeat, []
    monkeypatch.setattr(launch.Recorded, "repeat", lambda self, inputs: repeated.append(self) or repeat(self, inputs))
    monkeypatch.setattr(launch, "REMEMBERS", False)
    gradients(second)

    def peak_of_gradients() -> tuple[int, list[torch.Tensor]]:
        # what was asked for: a block that was given back is used again though up to 1 MiB larger
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        found = gradients(second)
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, found

    peak, expected = peak_of_gradients()
    assert not repeated
    monkeypatch.setattr(launch, "REMEMBERS", True)
    gradients(first)
    del repeated[:]
    peak_repeated, found = peak_of_gradients()
    assert peak_repeated <= peak and len(repeated) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = gradients(second)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad(), torch.cuda.graph(graph):
        out = nsa_attention(**first)
    for key in TENSORS:
        if first.get(key) is not None:
            first[key].copy_(second[key])
    if first.get("q_index") is not None:
        first["q_index"].copy_(second["q_index"])
        first["k_index"].copy_(second["k_index"])
    graph.replay()
    assert len(repeated) == 5 and torch.equal(out, expected[0])


def test_one_kernel_for_all_lengths() -> None:
    """What was compiled for a length serves the next one."""
    from nsa_hf.kernels.gpu import interval, interval_backward, layout, selected

    kernels = [
        interval.interval_forward_kernel,
        layout.layout_kernel,
        selected.selected_forward_kernel,
        selected.selected_backward_kernel,
        selected.merge_kernel,
        interval_backward.interval_dkv_kernel,
    ]

    def count() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.jit.device_caches.values())

    counts = []
    for tokens in (1600, 1601, 1610, 1648, 2047):
        shape = replace(REAL["9:3:64"], queries=tokens, keys=tokens)
        gradients(on_device(make_inputs(shape, dtype=torch.bfloat16), "cuda"))
        counts.append(count())
    assert len(set(counts)) == 1, counts


def test_inputs_that_begin_anywhere() -> None:
    """What was compiled for inputs at multiples of 16 bytes is not launched for others, nor the other way round."""
    aligned = on_device(make_inputs(REAL["9:3:64"], dtype=torch.bfloat16), "cuda")

    def behind_one_number(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    shifted = {name: behind_one_number(x) if isinstance(x, torch.Tensor) else x for name, x in aligned.items()}
    assert all(x.data_ptr() % 16 == 2 for x in shifted.values() if isinstance(x, torch.Tensor))
    first, *others = (gradients(inputs) for inputs in (aligned, shifted, aligned, shifted))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_the_counting_sort() -> None:
    """Against a stable sort, of a text whose tiles of queries are counted in several steps."""
    from nsa_hf.kernels import Placement
    from nsa_hf.kernels.gpu import gather, layout

    tokens, parts, slots = 40_000, 625, PAPER.topk - PAPER.local_blocks
    inputs = on_device(make_inputs(replace(REAL["9:3:64"], queries=tokens, keys=tokens), dtype=torch.bfloat16), "cuda")
    with torch.no_grad():
        _, selection = nsa_attention(**inputs, return_selection=True)
    where = layout.find_layout(*(inputs[name] for name in "qkv"), tokens, layout.Sizes(), Placement())
    chunks = gather.cut_queries(1, tokens, 3, parts, slots, 384, 1 << 30)
    found = gather.gather_queries(selection, layout.Layout.of(*where, 64, 64, False), layout.Sizes(), chunks)
    picks = torch.arange(tokens * slots, dtype=torch.int32, device="cuda").view(tokens, slots)
    past = torch.arange(tokens, device="cuda")[:, None] // PAPER.block_size - PAPER.local_blocks
    for head in range(3):
        part = selection[0, :, head, :slots]
        used = (part >= 0) & (part <= past)
        borders = found.offsets[head]
        assert torch.equal(borders.diff(), part[used].bincount(minlength=parts).int())
        assert torch.equal(found.order[borders[0] : borders[-1]], picks[used][part[used].argsort(stable=True)])


def test_on_the_last_card() -> None:
    """Of several it is not the current one."""
    card = f"cuda:{torch.cuda.device_count() - 1}"
    for queries in (300, 1):  # the second: decoding
        inputs = on_device(make_inputs(replace(REAL["9:3:64"], queries=queries), dtype=torch.bfloat16), card)
        with torch.set_grad_enabled(queries > 1):
            inputs = with_gradients(inputs)
            out = nsa_attention(**inputs, backend="triton")
        if queries > 1:
            out.sum().backward()
            assert inputs["q"].grad.isfinite().all()
        truth = nsa_attention(**in_float64(inputs), backend="reference")
        assert (out.double() - truth).norm() <= 0.01 * truth.norm()
        assert torch.cuda.current_device() == 0


def test_two_sizes_in_one_process() -> None:
    one = on_device(make_inputs(REAL["9:3:64"], dtype=torch.bfloat16), "cuda")
    other = {**one, "topk": 8, "window_size": 100}
    before = nsa_attention(**one)
    assert not torch.equal(nsa_attention(**other), before)
    assert torch.equal(nsa_attention(**one), before)


def test_sizes_far_beyond_the_text_cost_what_the_text_needs() -> None:
    shape = REAL["9:3:64"]
    sizes = replace(PAPER, topk=33, window_size=2100)
    one = on_device(make_inputs(replace(shape, sizes=sizes), dtype=torch.bfloat16), "cuda")
    for far in ({"topk": 20_000_000, "window_size": 2**31 - 1}, {"topk": 2**31 - 1}):
        for queries in (2100, 1):
            these = {**one, "q": one["q"][:, -queries:], "gates": one["gates"][:, -queries:]}
            expected = nsa_attention(**these) if queries == 1 else gradients(these)
            torch.cuda.reset_peak_memory_stats()
            other = {**these, **far}
            found = nsa_attention(**other) if queries == 1 else gradients(other)
            assert torch.cuda.max_memory_allocated() < 2**30
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", EMPTY)
def test_no_rows_or_no_queries_give_nothing(name: str) -> None:
    found = run_empty(nsa_attention, EMPTY[name], "triton", "cuda")
    assert all(x.is_cuda for x in found)
    check_empty(EMPTY[name], found)


def test_many_tokens() -> None:
    """262,144 tokens of 32:8:128, forward and backward, on one card of 80 GB; elements are counted beyond 2^30."""
    tokens = 262144
    random = torch.Generator("cuda").manual_seed(0)
    blocks = (tokens - 32) // 16 + 1

    def normal(*dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=random, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = normal(1, tokens, 32, 128), normal(1, tokens, 8, 128), normal(1, tokens, 8, 128)
    k_cmp, v_cmp, gates = normal(1, blocks, 8, 128), normal(1, blocks, 8, 128), normal(1, tokens, 32, 3)
    out = nsa_attention(q, k, v, k_cmp, v_cmp, gates)
    out.backward(torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() < 75 * 2**30
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v, k_cmp, v_cmp, gates))
    # the last queries see what they see in a shorter call with the same keys
    last = nsa_attention(q[:, -64:], k, v, k_cmp, v_cmp, gates[:, -64:])
    torch.testing.assert_close(out[:, -64:], last, rtol=2e-2, atol=2e-2)


def test_no_grad_keeps_nothing() -> None:
    inputs = on_device(make_inputs(replace(REAL["9:3:64"], queries=1), dtype=torch.bfloat16), "cuda")
    with torch.no_grad():
        assert not nsa_attention(**inputs).requires_grad
