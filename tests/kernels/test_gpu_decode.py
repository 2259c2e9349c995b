"""The decode kernels on a GPU, at real shapes and fills, against the float64 reference. `make gpu` runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_inputs import TENSORS, Inputs
from tiny_models import tiny_sparse_model
from torch import Tensor
from transformers import StaticCache
from triton_cases import in_float64

from nsa_hf.kernels import n_blocks, nsa_attention, quantize_index_keys
from nsa_hf.recipes.benchmarks import models as benchmark_model
from nsa_hf.recipes.benchmarks.common import Heads
from nsa_hf.recipes.benchmarks.generate import graphs, rounded_as_uncompiled
from nsa_hf.recipes.benchmarks.logits import check
from nsa_hf.releases import CACHE

pytestmark = pytest.mark.gpu

# query heads, KV heads, Dk, Dv
HEADS = {
    "64:4:128": (64, 4, 128, 128),
    "32:8:128": (32, 8, 128, 128),
    "9:3:64": (9, 3, 64, 64),
    "64:4:192/128": (64, 4, 192, 128),
    "5:1:80": (5, 1, 80, 80),
    "8:8:256": (8, 8, 256, 256),
}


def cached_inputs(
    heads: str, batch: int, queries: int, capacity: int, fill: int, dtype: torch.dtype = torch.bfloat16, bits: int = 0
) -> Inputs:
    """A step with a static cache, `[B, Hk, S, D]` seen as `[B, S, Hk, D]`: rows of about `fill` tokens, NaN behind.

    With `bits` (16 or 8) blocks are chosen by an index of half of the channels, and there is no compressed branch.
    """
    query_heads, kv_heads, key_dim, value_dim = HEADS[heads]
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=random, device="cuda", dtype=dtype)

    lengths = torch.tensor(
        [max(queries, fill - 37 * row % fill) for row in range(batch)], dtype=torch.int32, device="cuda"
    )
    entries = n_blocks(capacity, 32, 16)
    inputs: Inputs = {"q": 2 * normal(batch, queries, query_heads, key_dim), "lengths": lengths}
    for name, dim in (("k", key_dim), ("v", value_dim)):
        cache = normal(batch, kv_heads, capacity, dim)
        compressed = normal(batch, entries, kv_heads, dim)
        for row, length in enumerate(lengths.tolist()):
            cache[row, :, length:] = float("nan")
            compressed[row, n_blocks(length, 32, 16) :] = float("nan")
        inputs |= {name: cache.transpose(1, 2), f"{name}_cmp": compressed}
    inputs["gates"] = normal(batch, queries, query_heads, 3).float().sigmoid()
    if bits:
        inputs |= {"k_cmp": None, "v_cmp": None, "q_index": inputs["q"][..., : key_dim // 2].contiguous()}
        # as a cache has it: in a tensor of its own
        inputs["k_index"] = inputs["k"][..., : key_dim // 2].transpose(1, 2).contiguous().transpose(1, 2)
        inputs["gates"][..., 0] = float("nan")
    if bits == 8:
        inputs["k_index"], inputs["k_index_scales"] = quantize_index_keys(inputs["k_index"])
    return inputs


def step(inputs: Inputs, backend: str = "triton") -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return nsa_attention(**inputs, backend=backend, return_selection=True)  # type: ignore[return-value]


def assert_as_good_as_the_reference(inputs: Inputs, alike: float = 0.98) -> None:
    """The error, as a part of the norm, is at most the reference's in the same precision and one rounding more. Where
    two blocks tie within rounding the selection may differ, in few places; there the output is another one."""
    dtype = inputs["q"].dtype
    out, selection = step(inputs)
    low, _ = step(inputs, "reference")
    truth, expected = step(in_float64(inputs), "reference")
    # [B, T, Hk]
    same = (selection == expected).all(-1)
    assert same.double().mean() >= alike
    same = same.repeat_interleave(out.shape[2] // same.shape[2], dim=2)[..., None]
    error, reference = (float(((x.double() - truth) * same).norm() / truth.norm()) for x in (out, low))
    assert error <= reference + (torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 4e-6)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("batch", "queries", "fill"), [(1, 1, 65536), (16, 1, 8192), (1, 4, 65536), (2, 16, 8192), (1, 1, 65521)]
)
def test_bfloat16(heads: str, batch: int, queries: int, fill: int) -> None:
    capacity = 65536 if batch < 16 else 16384  # the reference needs six copies in float64
    assert_as_good_as_the_reference(cached_inputs(heads, batch, queries, capacity, fill))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("batch", "queries", "fill"), [(1, 1, 65536), (16, 1, 8192), (2, 16, 8192), (1, 3, 65521)])
def test_an_index(heads: str, batch: int, queries: int, fill: int, bits: int) -> None:
    capacity = 65536 if batch < 16 else 16384
    assert_as_good_as_the_reference(cached_inputs(heads, batch, queries, capacity, fill, bits=bits))


@pytest.mark.parametrize("queries", [1, 3, 16])
def test_an_index_and_a_compressed_branch(queries: int) -> None:
    """In one chain of launches, with queries that are a view, as a model has them."""
    inputs = cached_inputs("32:8:128", 2, queries, 8192, 8000)
    indexed = cached_inputs("32:8:128", 2, queries, 8192, 8000, bits=8)
    inputs |= {name: x for name, x in indexed.items() if "index" in name}
    inputs["q_index"] = inputs["q_index"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_good_as_the_reference(inputs)


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", ["32:8:128", "64:4:192/128", "8:8:256"])
def test_other_precisions(heads: str, dtype: torch.dtype, bits: int) -> None:
    assert_as_good_as_the_reference(cached_inputs(heads, 2, 2, 8192, 8000, dtype, bits))


def test_a_full_batch() -> None:
    assert_as_good_as_the_reference(cached_inputs("64:4:128", 16, 1, 65536, 65536))


def test_many_rows() -> None:
    assert_as_good_as_the_reference(cached_inputs("32:8:128", 256, 1, 2048, 2048))


@pytest.mark.parametrize("bits", [0, 8])
def test_more_blocks_than_are_ranked_at_once(bits: int) -> None:
    assert_as_good_as_the_reference(cached_inputs("9:3:64", 1, 2, 524288, 500000, bits=bits))


@pytest.mark.parametrize("topk", [12, 20, 24])
def test_nearly_all_blocks(topk: int) -> None:
    """Where as many blocks are kept as a program ranks."""
    inputs = cached_inputs("9:3:64", 2, 1, 64 * (topk + 2), 64 * (topk + 2) - 5)
    assert_as_good_as_the_reference({**inputs, "topk": topk})


@pytest.mark.parametrize("bits", [0, 8])
def test_whichever_program_is_the_last_the_selection_is_the_same(bits: int) -> None:
    """131,072 tokens are four programs a query, of which the last one ranks what all of them wrote. Two inputs in turn:
    what a program reads too early is of the other one."""
    one = cached_inputs("64:4:128", 16, 1, 131072, 131072, bits=bits)
    other = {**one, **{name: -one[name].flip(0) for name in ("q", "q_index") if name in one}}
    expected = [step(inputs) for inputs in (one, other)]
    assert_as_good_as_the_reference({name: x if x is None else x[:1] for name, x in one.items()})
    for _ in range(100):
        for inputs, (out, selection) in zip((one, other), expected, strict=True):
            again, selection_again = step(inputs)
            assert torch.equal(selection, selection_again) and torch.equal(out, again)


@pytest.mark.parametrize("bits", [0, 16])
@pytest.mark.parametrize("fill", [1, 31, 32, 33, 64, 511, 513, 1024, 1025, 1090])
def test_at_the_borders(fill: int, bits: int) -> None:
    assert_as_good_as_the_reference(cached_inputs("32:8:128", 2, 1, 2048, fill, bits=bits))


def test_starts_and_own_window_keys() -> None:
    inputs = cached_inputs("32:8:128", 2, 3, 4096, 4096)
    starts = torch.tensor([0, 1000], dtype=torch.int32, device="cuda")
    turned = {f"{name}_win": inputs[name].flip(2) for name in ("k", "v")}
    assert_as_good_as_the_reference({**inputs, **turned, "starts": starts})
    del inputs["lengths"]
    whole = {name: x.nan_to_num() if name in TENSORS else x for name, x in inputs.items()}
    assert_as_good_as_the_reference({**whole, **{name: x[:, -600:].nan_to_num() for name, x in turned.items()}})


@pytest.mark.parametrize("bits", [0, 8])
def test_one_graph_serves_every_fill(bits: int) -> None:
    inputs = cached_inputs("64:4:128", 2, 1, 131072, 131072, bits=bits)
    inputs = {name: x.nan_to_num() if name in TENSORS and x is not None else x for name, x in inputs.items()}
    step(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, selection = step(inputs)
    for fill in (131072, 40000, 33000, 32768, 9000, 700, 33, 1):
        inputs["lengths"].fill_(fill)
        graph.replay()
        expected, expected_selection = step(inputs)
        assert torch.equal(out, expected) and torch.equal(selection, expected_selection)
        assert_as_good_as_the_reference(inputs)


@pytest.mark.parametrize("bits", [0, 8])
def test_compiled_into_one_graph(bits: int) -> None:
    inputs = cached_inputs("32:8:128", 2, 1, 4096, 4000, bits=bits)
    expected = step(inputs)
    for mode in (None, "reduce-overhead"):
        compiled = torch.compile(nsa_attention, fullgraph=True, mode=mode)
        for _ in range(3):
            with torch.no_grad():
                found = compiled(**inputs, return_selection=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bits", [0, 16, 8])
def test_a_step_waits_for_nothing_and_copies_no_cache(bits: int) -> None:
    inputs = cached_inputs("32:8:128", 4, 1, 32768, 30000, bits=bits)
    step(inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < inputs["k"].numel() * 2 / 8


def test_a_models_step_with_a_static_cache_waits_for_nothing() -> None:
    model = tiny_sparse_model("cuda")
    cache = StaticCache(model.config, max_cache_len=128)
    tokens = torch.arange(100, device="cuda").reshape(2, 50)
    with torch.no_grad():
        for first in (0, 48, 49):  # the prompt, and two steps in which everything is compiled and allocated
            model(tokens[:, first : 48 if first == 0 else first + 1], **{CACHE: cache})
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(tokens[:, :1], **{CACHE: cache})
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_generate_compiles_steps_over_a_long_static_cache() -> None:
    """Where they round alike, compiled steps give what the same steps without compiling do, at full length and batch;
    a rounding elsewhere chooses a few other blocks, which random weights turn into other logits."""
    tokens, shape = 65536, benchmark_model.Shape("qwen3:2:4096:12288:32000", Heads.parse("32:8:128"))
    model = benchmark_model.make_model(shape, tokens + 64, True, "cuda")
    ids = torch.randint(32000, (1, tokens), device="cuda").expand(4, -1)
    torch._dynamo.reset()
    graphs()
    with torch.no_grad(), rounded_as_uncompiled():
        cache = benchmark_model.filled_cache(model, ids[:, :-1], "nsa", tokens + 64)
        compiled, kernels, _ = check(model, ids, cache)
    assert graphs() == "1 graphs compiled, 0 breaks, 0 CUDA graphs skipped"
    assert compiled < 0.005 and kernels < 0.05


ANOTHER_MASK = """
import torch
from tiny_models import tiny_sparse_model
from transformers import StaticCache
from nsa_hf.releases import CACHE
model = tiny_sparse_model("cuda")
cache = StaticCache(model.config, max_cache_len=64)
tokens, mask = torch.arange(100, device="cuda").reshape(2, 50), torch.ones(2, 50, device="cuda", dtype=torch.long)
mask[1, :3] = 0
with torch.no_grad():
    model(tokens[:, :48], **{CACHE: cache}, attention_mask=mask[:, :48])
    model(tokens[:, 48:49], **{CACHE: cache}, attention_mask=mask[:, :49])
    torch.cuda.synchronize()
    print("right", flush=True)
    mask[1, MASKED] = 0
    model(tokens[:, 49:], **{CACHE: cache}, attention_mask=mask)
    torch.cuda.synchronize()
print("wrong")
"""


@pytest.mark.parametrize(
    ("masked", "message"),
    [("7", "attention_mask has holes"), ("3:5", "rows begin at other tokens than when this cache was filled")],
)
def test_a_step_stops_at_a_wrong_mask(masked: str, message: str) -> None:
    """In a process of its own: what fails on a GPU ends all work there."""
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths}
    script = ANOTHER_MASK.replace("MASKED", masked)
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ran.returncode != 0 and ran.stdout == "right\n"
    assert message in ran.stderr
