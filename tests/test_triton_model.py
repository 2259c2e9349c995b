"""A sparse model gives with the Triton kernels what it gives with the reference: padding, packing, cache, gradients.

Here the kernels are interpreted; the tests marked `gpu` run the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import TINY_SIZES, randomize_nsa, tiny_dense_model
from torch import Tensor
from transformers import DynamicCache
from triton_cases import interpreter

import nsa_hf
import nsa_hf.attention

pytest.importorskip("triton")

TOKENS = 80


def make_model(device: str) -> nsa_hf.NsaLlamaForCausalLM:
    dense = tiny_dense_model(num_hidden_layers=2)
    model = nsa_hf.NsaLlamaForCausalLM(nsa_hf.nsa_config_from_dense(dense.config, **TINY_SIZES)).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    randomize_nsa(model)
    return model.to(device)


def rows(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    return {"logits": model(x).logits}


def packed(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    positions = torch.arange(TOKENS, device=x.device)[None] % 50
    return {"logits": model(x[:1], position_ids=positions, use_cache=False).logits}


def padded_and_cached(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(x)
    mask[1, :30] = 0
    cache, logits = DynamicCache(), []
    for first, last in ((0, TOKENS - 3), (TOKENS - 3, TOKENS - 2), (TOKENS - 2, TOKENS)):
        out = model(x[:, first:last], attention_mask=mask[:, :last], past_key_values=cache)
        logits.append(out.logits)
    return {"logits": torch.cat(logits, dim=1) * mask[..., None]}


def gradients(model: nsa_hf.NsaLlamaForCausalLM, x: Tensor) -> dict[str, Tensor]:
    with torch.enable_grad():
        model(x[:1], labels=x[:1], use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def largest_difference(run: Callable[..., dict[str, Tensor]], device: str) -> float:
    """Of the kernels' results from the reference's, as a part of each result's norm."""
    x = torch.randint(3, 256, (2, TOKENS), generator=torch.Generator().manual_seed(3)).to(device)
    found = []
    for backend in ("reference", "triton"):
        nsa_hf.attention.IMPLEMENTATIONS["nsa"] = backend
        try:
            with torch.no_grad():
                found.append(run(make_model(device), x))
        finally:
            nsa_hf.attention.IMPLEMENTATIONS["nsa"] = "auto"
    differences = [
        (mine - truth).norm() / truth.norm() for truth, mine in zip(*(f.values() for f in found), strict=True)
    ]
    return float(torch.stack(differences).max())


RUNS = [rows, packed, padded_and_cached, gradients]


@pytest.mark.parametrize("run", RUNS)
def test_interpreted(run: Callable[..., dict[str, Tensor]]) -> None:
    with interpreter() as pool:
        assert pool.submit(largest_difference, run, "cpu").result() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS)
def test_on_a_gpu(run: Callable[..., dict[str, Tensor]]) -> None:
    # the model's own matrix products round differently there, so a selection may differ at a tie: none does here
    assert largest_difference(run, "cuda") < 1e-4


@pytest.mark.gpu
def test_generation_on_a_gpu_is_that_on_the_cpu() -> None:
    x = torch.randint(3, 256, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    found = [
        make_model(device).generate(x.to(device), attention_mask=torch.ones_like(x, device=device), **options).cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*found)
