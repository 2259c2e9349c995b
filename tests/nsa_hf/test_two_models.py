"""Several models in one process and in threads: nothing of one is another's. And nothing is kept that is not needed."""

from __future__ import annotations

import gc
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from generation_steps import GREEDY, relative
from tiny_families import sparse_of, tiny_dense, tokens
from transformers import DynamicCache

from nsa_hf.releases import CACHE

# Of other families, sizes and ways to choose blocks.
MODELS = {
    "small": ("llama", {"nsa_topk": 4}),
    "wide": ("llama", {"nsa_kernel_size": 8, "nsa_block_size": 16, "nsa_topk": 2, "nsa_window_size": 11}),
    "by channels": ("qwen3", {"nsa_selector": "channels", "nsa_compression": "none"}),
    "per branch": ("gemma3_text", {"nsa_branch_kv": "independent", "nsa_gate": "sigmoid"}),
}


@pytest.fixture(scope="module")
def models() -> dict:
    return {name: sparse_of(tiny_dense(family), random=True, **fields) for name, (family, fields) in MODELS.items()}


def work(model, dense: bool) -> list[torch.Tensor]:
    """Logits, the same by a cache, greedy tokens, and gradients."""
    x = tokens(2)
    with model.dense_attention() if dense else nullcontext():
        with torch.no_grad():
            cache, whole = DynamicCache(config=model.config), model(x, use_cache=False).logits
            pieces = [model(piece, **{CACHE: cache}, use_cache=True).logits for piece in x.split([37, 1, 1, 21], 1)]
            said = model.generate(x[:, :30], max_new_tokens=8, **GREEDY)
        weights = [model.get_input_embeddings().weight]
        gradients = torch.autograd.grad(model(x, labels=x, use_cache=False).loss, weights)
    assert relative(torch.cat(pieces, 1), whole) < 1e-5
    return [whole, said, *gradients]


def test_models_in_threads_compute_what_each_does_alone(models):
    """Two threads share a model, one of them dense."""
    jobs = [(name, dense) for name in MODELS for dense in (False, True)]
    alone = {job: work(models[job[0]], job[1]) for job in jobs}
    assert relative(alone["small", True][0], alone["small", False][0]) > 1e-3, "dense and sparse must differ"
    with ThreadPoolExecutor(4) as pool:
        for job, got in zip(jobs * 2, pool.map(lambda job: work(models[job[0]], job[1]), jobs * 2), strict=True):
            assert torch.equal(got[1], alone[job][1]), job
            assert all(relative(*pair) < 1e-5 for pair in zip(got[::2], alone[job][::2], strict=True)), job


def held() -> tuple[int, int]:
    """How many tensors there are, and their elements."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return len(found), sum(one.numel() for one in found)


def resident() -> int:
    """The memory that this process has now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def train(model, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        x = tokens(2, seed=step)
        model.train()(x, labels=x, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def generate(model, new: int) -> None:
    """In answers of 50 tokens."""
    for _ in range(new // 50):
        model.generate(tokens(1, 20), max_new_tokens=50, **GREEDY)


SHORT, LONG = (4, 100), pytest.param(500, 5000, marks=pytest.mark.slow)


@pytest.mark.parametrize("steps, new", [SHORT, LONG])
@pytest.mark.parametrize("name", ["small", "per branch"])
def test_memory_stays_flat(name, steps, new):
    family, fields = MODELS[name]
    model = sparse_of(tiny_dense(family), random=True, **fields)
    train(model, 2)
    generate(model, 50)
    tensors, memory = held(), resident()
    for _ in range(2):
        train(model, steps // 2)
        generate(model, new // 2)
        assert held() == tensors
    assert resident() - memory < 24  # MB, which the allocator may keep
