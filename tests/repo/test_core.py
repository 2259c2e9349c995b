"""The core of everything, in half a minute: what `make test-newest` and `make test-oldest` run in CI.

A release that breaks us breaks one of these; the full suite says what else.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from generation_steps import GREEDY, in_steps, left_padded, relative, tokens
from tiny_models import randomize_nsa
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

import nsa_hf
from nsa_hf.kernels import n_blocks
from nsa_hf.releases import CACHE


@pytest.fixture(scope="module")
def converted(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    """The tiny Llama's folder, converted by the public function."""
    out = tmp_path_factory.mktemp("core") / "converted"
    nsa_hf.convert(tiny_dense_dir, out, **tiny_sizes)
    return out


@pytest.fixture
def model(converted):
    loaded = AutoModelForCausalLM.from_pretrained(converted).eval()
    randomize_nsa(loaded)
    return loaded


def test_a_fresh_process_imports_and_loads(converted):
    code = (
        "import sys, nsa_hf; from transformers import AutoModelForCausalLM as Model, AutoTokenizer as Tokenizer\n"
        "print(type(Model.from_pretrained(sys.argv[1])).__name__, len(Tokenizer.from_pretrained(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(converted)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["NsaLlamaForCausalLM", "256"]


def test_the_start_is_exact(converted, tiny_dense_dir, tiny_sizes):
    x = tokens(1)
    with torch.no_grad():
        dense, sparse = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(x).logits for folder in (tiny_dense_dir, converted)
        )
    difference = (dense - sparse).abs().amax((0, 2))
    exact = tiny_sizes["nsa_topk"] * tiny_sizes["nsa_block_size"]
    assert difference[:exact].max() < 1e-4
    assert difference[exact + 2 :].max() > 1e-3


@pytest.mark.parametrize("branches", ["shared", "independent"])
def test_a_dynamic_cache_gives_what_one_pass_gives(tiny_nsa_model, branches):
    model, x = tiny_nsa_model(nsa_branch_kv=branches), tokens()
    inputs = left_padded(x, [0, 13])
    with torch.no_grad():
        whole = model(x, use_cache=False, **inputs).logits
        stepwise = in_steps(model, x, [70, 1, 1, 40, *[1] * 38], DynamicCache(config=model.config), **inputs)
    assert relative(stepwise[0], whole[0]) < 1e-5
    assert relative(stepwise[1, 13:], whole[1, 13:]) < 1e-5


@pytest.mark.parametrize("branches", ["shared", "independent"])
def test_a_static_cache_gives_what_one_pass_gives(tiny_nsa_model, branches):
    model, x = tiny_nsa_model(nsa_branch_kv=branches), tokens()
    inputs = left_padded(x, [0, 13])
    with torch.no_grad():
        whole = model(x, use_cache=False, **inputs).logits
        cache = StaticCache(model.config, max_cache_len=200)
        stepwise = in_steps(model, x, [70, 1, 1, 40, *[1] * 38], cache, **inputs)
    assert relative(stepwise[0], whole[0]) < 1e-5
    assert relative(stepwise[1, 13:], whole[1, 13:]) < 1e-5


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_either_name(model, name):
    """As a keyword and by its place, whatever this release calls it; the tokens before are read from it."""
    x = tokens(1)
    with torch.no_grad():
        whole = model(x, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        model(x[:, :100], **{name: cache})
        got = model.model(x[:, 100:], None, None, cache)
    assert cache.layers[0].compressed_length == x.shape[1]
    assert relative(model.lm_head(got.last_hidden_state), whole[:, 100:]) < 1e-5


@pytest.mark.parametrize("kind", [None, "dynamic", "static"])
def test_padded_prompts_generate_what_they_do_alone(model, kind):
    x = tokens(2, 90)
    inputs = left_padded(x, [0, 21])
    options = {"max_new_tokens": 12, "cache_implementation": kind, "disable_compile": True, **GREEDY}
    together = model.generate(x, attention_mask=inputs["attention_mask"], **options)
    alone = model.generate(x[1:, 21:], attention_mask=torch.ones_like(x[1:, 21:]), **options)
    assert torch.equal(together[1, 21:], alone[0])


def test_every_block_is_compressed_once_while_generating(model, monkeypatch):
    from nsa_hf.cache import dynamic as dynamic_cache

    compressed = []
    real = dynamic_cache.compress
    monkeypatch.setattr(dynamic_cache, "compress", lambda x, *rest: compressed.append(x.shape[1]) or real(x, *rest))
    model.generate(tokens(1, 90), attention_mask=torch.ones(1, 90), max_new_tokens=20, **GREEDY)
    size, stride = model.config.nsa_kernel_size, model.config.nsa_kernel_stride
    blocks = sum(n_blocks(length, size, stride) for length in compressed)
    # the last token is never given to the model
    assert blocks == 2 * model.config.num_hidden_layers * n_blocks(109, size, stride)


def test_a_training_step_moves_every_parameter_and_lowers_the_loss(model):
    x = tokens(2, 130)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(x, labels=x).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    x = tokens(1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_a_cache_that_does_not_reach_the_layers_is_an_error(tiny_nsa_model, monkeypatch):
    """As when a release hands it over in a way of its own: never slowly right, never wrong."""
    from nsa_hf import attention

    model, x = tiny_nsa_model(), tokens(1)
    cache = DynamicCache(config=model.config)
    model(x[:, :90], **{CACHE: cache})
    monkeypatch.setattr(attention, "cache_among", lambda values: None)
    with pytest.raises(nsa_hf.NsaError, match="the cache did not reach the sparse layers"):
        model(x[:, 90:], **{CACHE: cache})
    with pytest.raises(nsa_hf.NsaError, match="the cache did not reach the sparse layers"):
        model(x[:, :90], use_cache=True)


def test_the_tokenizer_is_the_sources(converted, tiny_dense_dir):
    text = "sparse, and exact"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (converted, tiny_dense_dir)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
