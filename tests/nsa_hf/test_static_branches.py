"""The static cache of branches with keys and values of their own: the same logits as the dynamic one, in one graph."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from generation_steps import GREEDY, LENGTH, check_dense_prefill, in_steps, left_padded, relative, tokens
from tiny_families import VOCABULARY, sparse_of, tiny_dense
from tiny_models import TINY_SIZES, randomize_nsa, tiny_dense_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from nsa_hf import NsaError, from_dense
from nsa_hf.cache.static_branches import NsaStaticIndependentLayer
from nsa_hf.kernels import n_blocks
from nsa_hf.releases import CACHE

CHANNELS = {"nsa_selector": "channels", "nsa_selector_bits": 8}


@pytest.fixture(params=[{}, CHANNELS], ids=["compressed", "channels"])
def model(tiny_nsa_model, request):
    return tiny_nsa_model(nsa_branch_kv="independent", **request.param)


def of_one_layer(**fields):
    """To compile no more than is needed."""
    model = from_dense(tiny_dense_model(num_hidden_layers=1), **TINY_SIZES | fields, nsa_branch_kv="independent")
    randomize_nsa(model)
    return model.eval()


def buffers(cache: StaticCache) -> dict[str, torch.Tensor]:
    names = ("keys", "values", *NsaStaticIndependentLayer.EXTRA)
    held = {f"{index}.{name}": getattr(one, name) for index, one in enumerate(cache.layers) for name in names}
    return {name: buffer for name, buffer in held.items() if buffer is not None}


def poison(cache: StaticCache) -> None:
    """What stands behind the tokens held may be anything."""
    length = int(cache.get_seq_length())
    done = n_blocks(length, TINY_SIZES["nsa_kernel_size"], TINY_SIZES["nsa_kernel_stride"])
    for name, buffer in buffers(cache).items():
        behind = buffer[:, done:] if ".compressed_" in name else buffer[:, :, length:]
        behind.fill_(float("nan") if buffer.is_floating_point() else 127)


@pytest.mark.parametrize("prefill", [1, 7, 25, 65, 120])
def test_in_steps_it_gives_what_a_dynamic_cache_and_one_pass_give(prefill, model):
    x, steps = tokens(length=prefill + 27), [1] * 20 + [5, 2]
    static, dynamic = StaticCache(model.config, max_cache_len=LENGTH), DynamicCache()
    with torch.no_grad():
        first, _ = (in_steps(model, x, [prefill], cache) for cache in (static, dynamic))
        where = {name: (buffer.data_ptr(), buffer.shape) for name, buffer in buffers(static).items()}
        poison(static)
        rest, expected = (in_steps(model, x[:, prefill:], steps, cache) for cache in (static, dynamic))
        assert relative(rest, expected) < 1e-5
        assert relative(torch.cat([first, rest], dim=1), model(x, use_cache=False).logits) < 1e-5
    assert {name: (buffer.data_ptr(), buffer.shape) for name, buffer in buffers(static).items()} == where
    shape = (2, 2, LENGTH, 8)
    assert all(buffer.shape == shape for name, buffer in buffers(static).items() if ".window" in name)


@pytest.mark.parametrize("dense", [False, True])
def test_left_padded_rows_in_steps(dense, model):
    x, starts = tokens(3, 120), [0, 37, 90]
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    with torch.no_grad(), model.dense_attention() if dense else nullcontext():
        stepped = in_steps(model, x, [41, 1, 55] + [1] * 23, cache, **left_padded(x, starts))
        for row, start in enumerate(starts):
            assert relative(stepped[row, start:], model(x[row : row + 1, start:]).logits[0]) < 1e-5


def test_cropped_reordered_and_reset_in_place(model):
    x, cache = tokens(), StaticCache(model.config, max_cache_len=LENGTH)
    with torch.no_grad():
        model((x[:, :110] + 1) % 250, **{CACHE: cache})  # of which nothing may be left
        cache.reset()
        where = [buffer.data_ptr() for buffer in buffers(cache).values()]
        assert not any(buffer.any() for buffer in buffers(cache).values())
        wrong = torch.cat([x[:, :50], (x[:, 50:110] + 1) % 250], dim=1)
        model(wrong, **{CACHE: cache})
        cache.crop(-60)
        model(x[:, 50:100], **{CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 1]))
        got = in_steps(model, x[[1, 1], 100:], [1] * 10 + [40], cache)
        assert relative(got, model(x[[1, 1]]).logits[:, 100:]) < 1e-5
    assert [buffer.data_ptr() for buffer in buffers(cache).values()] == where


@pytest.mark.parametrize("model_type", ["olmo2", "gemma3_text", "stablelm"])
def test_other_families(model_type):
    """With norms of keys; layers with a sliding window of their own; RoPE of some channels."""
    model = sparse_of(tiny_dense(model_type), random=True, **TINY_SIZES, nsa_branch_kv="independent")
    x = tokens() % VOCABULARY
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    with torch.no_grad():
        stepped = in_steps(model, x, [20, 50, *[1] * 40], cache, **left_padded(x, [0, 31]))
        assert relative(stepped[0], model(x[:1, :110]).logits[0]) < 1e-5
        assert relative(stepped[1, 31:], model(x[1:, 31:110]).logits[0]) < 1e-5


def test_a_dense_prefill_can_be_continued_sparse(model):
    caches = (StaticCache(model.config, max_cache_len=LENGTH) for _ in range(2))
    check_dense_prefill(model, caches, NsaStaticIndependentLayer.EXTRA)


def test_the_decoding_step_is_one_graph_for_all_steps():
    model, x, starts, filled = of_one_layer(**CHANNELS), tokens(), [0, 37], 90
    mask = torch.zeros(2, LENGTH, dtype=torch.long)
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for row, start in enumerate(starts):
        mask[row, start:filled] = 1
    with torch.no_grad():
        logits = [model(x[:, :filled], attention_mask=mask[:, :filled], **{CACHE: cache}).logits]
        for place in range(filled, 115):
            mask[:, place] = 1
            logits.append(step(x[:, place : place + 1], attention_mask=mask.clone(), **{CACHE: cache}).logits)
        stepped = torch.cat(logits, dim=1)
        for row, start in enumerate(starts):
            assert relative(stepped[row, start:], model(x[row : row + 1, start:115]).logits[0]) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"prefill_chunk_size": 7},
    ],
    ids=["beams", "samples", "chunks"],
)
def test_generate_gives_the_tokens_of_the_dynamic_cache(options, model):
    x, out = tokens(2, 70), []
    mask = left_padded(x, [0, 29])["attention_mask"]
    for kind in ("static", None):
        torch.manual_seed(0)
        given = {**GREEDY, "max_new_tokens": 14, "cache_implementation": kind, **options}
        out.append(model.generate(x, attention_mask=mask, **given))
    assert torch.equal(*out)


def test_generate_compiles_the_prompts_pieces_and_the_steps():
    model, x = of_one_layer(), tokens(2, 70)
    given = {**GREEDY, "attention_mask": left_padded(x, [0, 29])["attention_mask"], "max_new_tokens": 8}
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    options = {"cache_implementation": "static", "compile_config": compiled, "prefill_chunk_size": 35}
    assert torch.equal(model.generate(x, **options, **given), model.generate(x, **given))


def test_caches_of_other_models_are_refused(model, tiny_nsa_model, monkeypatch):
    x = tokens(1, 20)
    for maker, user in ((tiny_dense_model(), model), (tiny_nsa_model(), model), (model, tiny_nsa_model())):
        cache = StaticCache(model.config, max_cache_len=30)
        with torch.no_grad():
            maker(x, **{CACHE: cache})
            with pytest.raises(NsaError, match="neither can continue the other's cache: start with an empty one"):
                user(x[:, :1], **{CACHE: cache})
    cache = StaticCache(model.config, max_cache_len=30)
    with torch.no_grad():
        tiny_dense_model()(x, **{CACHE: cache})
    # a graph cannot look (PyTorch 2.11 does not compile this at all)
    monkeypatch.setattr("nsa_hf.cache.static_branches.in_a_graph", lambda: True)
    with pytest.raises(RuntimeError, match="neither can continue the other's cache"):
        NsaStaticIndependentLayer.adopt(cache.layers[0], model.model.layers[0].self_attn.extras())
