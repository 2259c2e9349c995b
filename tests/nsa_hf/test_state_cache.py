"""nsa_hf/cache/state.py and the families whose layers carry a state: several tokens at once, and tokens removed."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_families import SIZES, TABLE, VOCABULARY, sparse_of, tiny_dense
from transformers import DynamicCache

from nsa_hf.discovery import causal_model_types, find_family
from nsa_hf.errors import NotPlain, NsaError
from nsa_hf.modeling import ONE_TOKEN
from nsa_hf.registration import PREFIX
from nsa_hf.releases import CACHE, cache_among

ROWS = [line.split(",") for line in TABLE.read_text().splitlines()]
EXACT = {name for name, result, *_ in ROWS if result == "exact"} & {*causal_model_types()}


def is_recurrent(model_type: str) -> bool:
    try:
        return find_family(model_type).is_recurrent
    except NotPlain:  # in an older release
        return False


FAMILIES = sorted(filter(is_recurrent, EXACT))
IDS = torch.randint(3, VOCABULARY - 6, (1, 48), generator=torch.Generator().manual_seed(1))


def sparse(model_type: str):
    return sparse_of(tiny_dense(model_type), random=True, **SIZES).eval()


@torch.no_grad()
def in_runs(model, *sizes: int, cache=None, start: int = 0) -> torch.Tensor:
    """The logits of runs of tokens, one after another with a cache."""
    logits = []
    for size in sizes:
        # Bamba's forward begins at 0 where nobody says otherwise
        place = torch.arange(start, start + size)[None]
        out = model(IDS[:, start : start + size], position_ids=place, use_cache=True, **{CACHE: cache})
        cache, start = cache_among(out.values()), start + size
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_several_tokens_over_a_filled_cache_are_one_pass_or_refused(model_type):
    model = sparse(model_type)
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
    if f"{PREFIX}{model_type}" not in ONE_TOKEN:
        assert (in_runs(model, 20, 3, 25) - whole).abs().max() < 1e-4
        return
    with pytest.raises(NsaError, match=f"{model_type}.* one token at a time .*, got 3"):
        in_runs(model, 20, 3)
    with model.dense_attention(), pytest.raises(NsaError, match="one token at a time"):
        in_runs(model, 20, 3)
    assert (in_runs(model, 45, 1, 1, 1) - whole).abs().max() < 1e-4


def test_chunked_prefill_of_a_family_of_single_tokens_is_refused():
    model = sparse("jamba")
    with pytest.raises(NsaError, match="one token at a time"):
        model.generate(IDS, max_new_tokens=2, do_sample=False, prefill_chunk_size=7)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] > IDS.shape[1]


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "qwen3_next", "jamba"])
def test_a_recurrent_state_does_not_go_back(model_type):
    model = sparse(model_type)
    cache = DynamicCache(config=model.config)
    in_runs(model, 20, cache=cache)
    kept = copy.deepcopy(cache)
    cache.activate_past_recording()
    expected = in_runs(model, 1, 1, cache=cache, start=20)
    with pytest.raises(NsaError, match="a recurrent state, which cannot go back"):
        cache.crop(-1)
    assert torch.allclose(in_runs(model, 1, 1, cache=kept, start=20), expected, atol=1e-5)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_crop_that_stopped_at_a_state_is_not_gone_on_with(recorded):
    """The attention's layer stands before the state's, and has lost the tokens by then."""
    model = sparse_of(tiny_dense("olmo_hybrid", layer_types=["full_attention", "linear_attention"]), **SIZES).eval()
    cache = DynamicCache(config=model.config)
    in_runs(model, 20, cache=cache)
    if recorded:
        cache.activate_past_recording()
    with pytest.raises((NsaError, RuntimeError)):
        cache.crop(-1)
    with pytest.raises(NsaError, match="holds 19 tokens and a state after 20"):
        in_runs(model, 1, cache=cache, start=19)
    cache.reset()
    in_runs(model, 20, 1, cache=cache)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name in ("lfm2_moe", "lfm3")])
def test_convolutions_alone_go_back(model_type):
    model = sparse(model_type)
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    in_runs(model, 20, cache=cache)
    cache.activate_past_recording()
    in_runs(model, 4, cache=cache, start=20)
    cache.crop(-3)
    assert (in_runs(model, 1, 1, cache=cache, start=21) - whole[:, 21:23]).abs().max() < 1e-4
