"""A sparse model gives with the Triton kernels what it gives with the reference: padding, packing, cache, gradients.

Here the kernels are interpreted; the tests marked `gpu` run the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from tiny_models import SELECTORS, tiny_sparse_model
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from triton_cases import interpreter

import nsa_hf
import nsa_hf.attention
from nsa_hf.recipes.training.compiling import compile_layers
from nsa_hf.releases import CACHE

pytest.importorskip("triton")

TOKENS = 80


def rows(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    return {"logits": model(x).logits}


def packed(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    positions = torch.arange(TOKENS, device=x.device)[None] % 50
    return {"logits": model(x[:1], position_ids=positions, use_cache=False).logits}


def padded_and_cached(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor, cache: Cache | None = None) -> dict[str, Tensor]:
    mask = torch.ones_like(x)
    mask[1, :30] = 0
    cache, logits = DynamicCache() if cache is None else cache, []
    for first, last in ((0, TOKENS - 3), (TOKENS - 3, TOKENS - 2), (TOKENS - 2, TOKENS)):
        out = model(x[:, first:last], attention_mask=mask[:, :last], **{CACHE: cache})
        logits.append(out.logits)
    return {"logits": torch.cat(logits, dim=1) * mask[..., None]}


def padded_and_static(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    return padded_and_cached(model, x, StaticCache(model.config, max_cache_len=TOKENS + 9))


def with_own_keys(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> nsa_hf.NsaLlamaForCausalLM:
    fields = {"nsa_selector": model.config.nsa_selector, "nsa_selector_bits": model.config.nsa_selector_bits}
    return tiny_sparse_model(x.device.type, nsa_branch_kv="independent", **fields)


def own_keys_and_cached(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    return padded_and_cached(with_own_keys(model, x), x)


def own_keys_and_static(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    return padded_and_static(with_own_keys(model, x), x)


def gradients(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    with torch.enable_grad():
        model(x[:1], labels=x[:1], use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def largest_difference(run: Callable[..., dict[str, Tensor]], device: str, selector: str) -> float:
    """Of the kernels' results from the reference's, as a part of each result's norm."""
    x = torch.randint(3, 256, (2, TOKENS), generator=torch.Generator().manual_seed(3)).to(device)
    runs = []
    for backend in ("reference", "triton"):
        nsa_hf.attention.IMPLEMENTATIONS["nsa"] = backend
        try:
            with torch.no_grad():
                runs.append(run(tiny_sparse_model(device, **SELECTORS[selector]), x))
        finally:
            nsa_hf.attention.IMPLEMENTATIONS["nsa"] = "auto"
    differences = [
        (mine - truth).norm() / truth.norm() for truth, mine in zip(*(f.values() for f in runs), strict=True)
    ]
    return float(torch.stack(differences).max())


RUNS = [rows, packed, padded_and_cached, padded_and_static, gradients]


INTERPRETED = [*((run, "compressed") for run in RUNS), (padded_and_static, "channels-8")]


@pytest.mark.parametrize("run, selector", INTERPRETED)
def test_interpreted(run: Callable[..., dict[str, Tensor]], selector: str) -> None:
    with interpreter() as pool:
        assert pool.submit(largest_difference, run, "cpu", selector).result() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("run", [*RUNS, own_keys_and_cached, own_keys_and_static])
def test_on_a_gpu(run: Callable[..., dict[str, Tensor]], selector: str) -> None:
    # the model's own matrix products round differently there, so a selection may differ at a tie: none does here
    assert largest_difference(run, "cuda", selector) < 1e-4


def choose_with_checkpointing(device: str, selector: str, reentrant: bool, compiles: bool) -> tuple[int, float]:
    """How often the layers choose in a forward and a backward pass, and the largest difference of the gradients from
    those without gradient checkpointing."""
    from nsa_hf.kernels.gpu import op

    choose = "select_by_compressed" if selector == "compressed" else "select_by_index"
    x = torch.randint(3, 256, (2, TOKENS), generator=torch.Generator().manual_seed(3)).to(device)
    found = []
    with (
        mock.patch.dict(nsa_hf.attention.IMPLEMENTATIONS, nsa="triton"),
        mock.patch.object(op, choose, wraps=getattr(op, choose)) as chosen,
        mock.patch("nsa_hf.kernels.gpu.launch.REMEMBERS", False),  # what is remembered does not come by here
    ):
        for checkpoints in (False, True):
            model = tiny_sparse_model(device, **SELECTORS[selector]).train()
            if checkpoints:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            if compiles:
                compile_layers(model)
            chosen.reset_mock()
            found.append(gradients(model, x))
    return chosen.call_count, max(float((a - b).abs().max()) for a, b in zip(*(f.values() for f in found), strict=True))


@pytest.mark.parametrize("selector", ["compressed", "channels"])
def test_a_layer_that_is_computed_again_keeps_its_blocks(selector: str) -> None:
    with interpreter() as pool:
        assert pool.submit(choose_with_checkpointing, "cpu", selector, False, False).result() == (2, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_layer_that_is_computed_again_keeps_its_blocks_on_a_gpu(
    selector: str, compiles: bool, reentrant: bool
) -> None:
    times, difference = choose_with_checkpointing("cuda", selector, reentrant, compiles)
    assert times == 2 and difference < 1e-6
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_compiled_model_trains_on_a_gpu(selector: str) -> None:
    model = tiny_sparse_model("cuda", **SELECTORS[selector])
    x = torch.randint(3, 256, (1, TOKENS), device="cuda", generator=torch.Generator("cuda").manual_seed(6))
    plain = gradients(model, x)
    model.zero_grad()
    model.compile()
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-4, rtol=1e-3, msg=name)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
def test_generation_on_a_gpu_is_that_on_the_cpu(selector: str) -> None:
    x = torch.randint(3, 256, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(x)
    mask[1, :30] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = tiny_sparse_model("cpu", **SELECTORS[selector]).generate(x, attention_mask=mask, **options)
    # "static" is compiled by Transformers, into CUDA graphs
    for kind in (None, "static", "offloaded"):
        model = tiny_sparse_model("cuda", **SELECTORS[selector])
        generated = model.generate(x.cuda(), attention_mask=mask.cuda(), cache_implementation=kind, **options)
        assert torch.equal(generated.cpu(), expected), kind
    fields = {**SELECTORS[selector], "nsa_compression": "mlp", "nsa_branch_kv": "independent"}
    independent = [tiny_sparse_model(device, **fields) for device in ("cpu", "cuda")]
    expected = independent[0].generate(x, attention_mask=mask, **options)
    for kind in (None, "static", "offloaded"):
        generated = independent[1].generate(x.cuda(), attention_mask=mask.cuda(), cache_implementation=kind, **options)
        assert torch.equal(generated.cpu(), expected), kind


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
def test_generation_from_a_long_padded_text(selector: str) -> None:
    """Transformers compiles the steps over a static cache; a mask of so many tokens is reduced in a loop."""
    x = torch.randint(3, 256, (2, 1500), generator=torch.Generator().manual_seed(7)).cuda()
    mask = torch.ones_like(x)
    mask[1, :300] = 0
    model = tiny_sparse_model("cuda", **SELECTORS[selector])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    expected = model.generate(x, **options)
    assert torch.equal(model.generate(x, cache_implementation="static", **options), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("padding", [None, 7])
def test_a_static_decoding_step_waits_for_nothing(padding: int | None, selector: str) -> None:
    """No value is read off the device, and the step can be captured as a CUDA graph by hand."""
    model = tiny_sparse_model("cuda", **SELECTORS[selector])
    x = torch.randint(3, 256, (2, TOKENS), device="cuda")
    room = TOKENS + 20
    cache, eager = (StaticCache(model.config, max_cache_len=room) for _ in range(2))
    mask = None
    if padding is not None:
        mask = (torch.arange(room, device="cuda") < 50).long().expand(2, room).contiguous()
        mask[1, :padding] = 0
    with torch.no_grad():
        for filled in (cache, eager):
            model(x[:, :50], attention_mask=None if mask is None else mask[:, :50], **{CACHE: filled})
        token, position = x[:, 50:51].clone(), torch.full((2, 1), 50, device="cuda")

        def step(filled: Cache) -> Tensor:
            return model(token, attention_mask=mask, position_ids=position, **{CACHE: filled}).logits

        def move_to(place: int) -> None:
            token.copy_(x[:, place : place + 1])
            position.fill_(place)
            if mask is not None:
                mask[:, 50 : place + 1] = 1
                position[1] -= padding

        move_to(50)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(eager), step(cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        cache.crop(-1), eager.crop(-1)
        with torch.cuda.graph(graph, stream=side):
            captured = step(cache)
        for place in range(50, TOKENS):
            move_to(place)
            graph.replay()
            torch.testing.assert_close(captured, step(eager), atol=1e-4, rtol=1e-4)
