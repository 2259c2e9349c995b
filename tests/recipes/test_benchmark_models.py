"""The models and caches of the generate benchmark."""

from __future__ import annotations

import pytest
import torch

from nsa_hf.recipes.benchmarks.common import Heads
from nsa_hf.recipes.benchmarks.models import CutLayer, Shape, cut_back, filled_cache, make_model
from nsa_hf.releases import CACHE

HEADS = Heads.parse("6:2:16")
TOKENS = 300


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_same_weights_sparse_and_dense(family: str) -> None:
    shape = Shape(f"{family}:2:48:64:256", HEADS)
    dense, sparse = (make_model(shape, 512, sparse, "cpu") for sparse in (False, True))
    assert type(sparse).__name__ == f"Nsa{type(dense).__name__}"
    state = dense.state_dict()
    assert all(torch.equal(value, sparse.state_dict()[name]) for name, value in state.items())
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    new = {name: value for name, value in sparse.state_dict().items() if name not in state}
    assert new and all(".nsa." in name for name in new)
    gate = new["model.layers.0.self_attn.nsa.gate.down.weight"]
    assert 0.01 < float(gate.float().std()) < 0.03, "gates that open"
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight


def test_the_default_is_an_8b_model() -> None:
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        config = Shape("qwen3:36:4096:12288:32000", Heads.parse("32:8:128")).config(65536)
        model = AutoModelForCausalLM.from_config(config)
    # Qwen3-8B has 8.19e9 with its 151,936 words
    words = (151936 - 32000) * 4096 * 2
    assert model.num_parameters() + words == pytest.approx(8.19e9, rel=0.001)


@pytest.mark.parametrize("sparse", [True, False])
def test_every_cache_continues_alike(sparse: bool) -> None:
    model = make_model(Shape("qwen3:2:48:64:256", HEADS), 512, sparse, "cpu").double()
    torch.manual_seed(0)
    ids = torch.randint(256, (1, TOKENS)).expand(2, -1)
    name = "nsa" if sparse else "dense"
    systems = [name, f"{name}-dynamic"] + ([] if sparse else ["dense-static", "dense-cut"])
    options = {"do_sample": False, "max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        alone = torch.stack(model.generate(ids, **options).logits)
        for system in systems:
            cache = filled_cache(model, ids[:, :-1], system, TOKENS + 12)
            for _ in range(2):
                found = model.generate(ids, **{CACHE: cache}, **options).logits
                torch.testing.assert_close(torch.stack(found), alone, rtol=0, atol=1e-12)
                cut_back(cache, TOKENS - 1)
                assert int(cache.get_seq_length()) == TOKENS - 1
    if not sparse:
        assert isinstance(cache.layers[0], CutLayer) and not cache.is_compileable
