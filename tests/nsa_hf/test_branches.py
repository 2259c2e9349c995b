"""Keys and values of their own for each branch: they start as the dense model's, and are then their own."""

from __future__ import annotations

import copy

import pytest
import torch
from generation_steps import left_padded, relative, tokens
from safetensors.torch import load_file
from tiny_families import VOCABULARY, tiny_dense
from tiny_models import TINY_SIZES, byte_tokenizer, randomize_nsa, tiny_dense_model
from transformers import AutoModelForCausalLM

from nsa_hf import NsaError, nsa_config_from_dense
from nsa_hf.branches import copy_dense_keys, dense_twin
from nsa_hf.conversion import convert
from nsa_hf.families import family_of

# biases; norms of keys by head, over all heads, of another kind; partial and no rotary; experts; sliding layers
FAMILIES = ["llama", "qwen2", "qwen3", "olmo2", "phi", "stablelm", "cohere", "smollm3", "qwen3_moe", "gemma3_text"]


def sparse_of(dense, **fields):
    config = nsa_config_from_dense(dense.config, **{**TINY_SIZES, **fields})
    model = family_of(config).causal_lm_class(config).eval()
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and all(".nsa." in name for name in missing)
    return model


def logits_of(model, x, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(x, use_cache=False, **inputs).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_copies_of_the_dense_keys_give_what_shared_ones_give(model_type):
    dense, x = tiny_dense(model_type), tokens() % VOCABULARY
    shared, independent = sparse_of(dense), sparse_of(dense, nsa_branch_kv="independent")
    randomize_nsa(shared)
    independent.load_state_dict(shared.state_dict(), strict=False)
    assert relative(logits_of(independent, x), logits_of(shared, x)) > 1e-3, "their keys are not the dense ones yet"
    copy_dense_keys(independent)
    assert relative(logits_of(independent, x), logits_of(shared, x)) < 1e-5
    inputs = left_padded(x, [0, 61])
    assert relative(logits_of(independent, x, **inputs)[1, 61:], logits_of(shared, x[1:, 61:])[0]) < 1e-5


def test_the_new_parameters_are_named_after_the_dense_ones():
    dense = tiny_dense("qwen3")
    independent = sparse_of(dense, nsa_branch_kv="independent", nsa_dense_layers=[0])
    names = {name for name, _ in independent.named_parameters() if dense_twin(name)}
    parts = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
    assert names == {
        f"model.layers.1.self_attn.nsa.{branch}.{part}" for branch in ("compressed", "window") for part in parts
    }
    assert {dense_twin(name) for name in names} == {f"model.layers.1.self_attn.{part}" for part in parts}


def test_attention_with_fused_projections_is_refused():
    with pytest.raises(
        NsaError, match=r"needs a k_proj and a v_proj, and this attention has .*qkv_proj.*: use 'shared'"
    ):
        sparse_of(tiny_dense("phi3"), nsa_branch_kv="independent")


@pytest.mark.parametrize("branch, gate", [("compressed", 0), ("window", 2)])
def test_every_branch_reads_its_own_keys_and_values(branch, gate, tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_branch_kv="independent"), tokens()
    before = logits_of(model, x)
    for part in ("k_proj", "v_proj"):
        changed = copy.deepcopy(model)
        for layer in changed.model.layers:
            getattr(layer.self_attn.nsa, branch)[part].weight.data.mul_(1.1)
        assert relative(logits_of(changed, x), before) > 1e-4
    # with its gate shut (tanh(0) = 0) a branch's values do not matter
    for layer in model.model.layers:
        down = layer.self_attn.nsa.gate.down
        down.weight.data.unflatten(0, (-1, 3))[:, gate] = 0
        down.bias.data.unflatten(0, (-1, 3))[:, gate] = 0
    before = logits_of(model, x)
    for layer in model.model.layers:
        getattr(layer.self_attn.nsa, branch)["v_proj"].weight.data.mul_(1.1)
    assert torch.equal(logits_of(model, x), before)


def test_packed_documents_equal_each_alone(tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_branch_kv="independent"), tokens(1)
    positions = torch.cat([torch.arange(70), torch.arange(80)])[None]
    packed = logits_of(model, x, position_ids=positions)
    assert relative(packed[:, :70], logits_of(model, x[:, :70])) < 1e-5
    assert relative(packed[:, 70:], logits_of(model, x[:, 70:])) < 1e-5


def test_dense_mode_uses_the_dense_keys(tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_branch_kv="independent"), tokens()
    with model.dense_attention():
        got = logits_of(model, x)
    assert relative(got, logits_of(tiny_dense_model(), x)) < 1e-5


def test_gradients_reach_every_new_parameter(tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_branch_kv="independent"), tokens()
    model(x, labels=x).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not without


def test_compiled_as_one_graph(tiny_nsa_model):
    model, x = tiny_nsa_model(nsa_branch_kv="independent", nsa_dense_layers=[1, 2]), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x, labels=x, use_cache=False).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x, labels=x, use_cache=False).loss.backward()
    for got, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def test_replaced_modules_are_seen(tiny_nsa_model):
    """As adapters replace them, after the model has run."""
    model, x = tiny_nsa_model(nsa_branch_kv="independent"), tokens()
    before = logits_of(model, x)
    projections = model.model.layers[0].self_attn.nsa.window
    projections["v_proj"] = torch.nn.Sequential(projections["v_proj"], torch.nn.Tanh())
    assert relative(logits_of(model, x), before) > 1e-3
    assert relative(logits_of(copy.deepcopy(model).double(), x).float(), logits_of(model, x)) < 1e-4


def test_a_conversion_copies_them_bit_for_bit(tmp_path):
    tiny_dense_model().bfloat16().save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    out = convert(tmp_path / "dense", tmp_path / "out", branch_kv="independent", **TINY_SIZES)
    stored = load_file(out / "model.safetensors")
    copies = [name for name in stored if dense_twin(name)]
    assert len(copies) == 3 * 2 * 2
    assert all(torch.equal(stored[name], stored[dense_twin(name)]) for name in copies)
    x = tokens(length=64)
    sparse, dense = (
        logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), x)
        for folder in (out, tmp_path / "dense")
    )
    assert relative(sparse, dense) < 1e-5


def test_an_unconverted_model_draws_every_branch_anew():
    """A model that is not loaded starts as its family's do, with branches of their own."""
    config = sparse_of(tiny_dense("qwen3"), nsa_branch_kv="independent").config
    config.initializer_range = 0.3
    model = family_of(config).causal_lm_class(config)
    parameters = dict(model.named_parameters())
    drawn = [name for name in parameters if dense_twin(name) and name.endswith("proj.weight")]
    assert len(drawn) == 2 * 2 * 2
    for name in drawn:
        assert not torch.equal(parameters[name], parameters[dense_twin(name)])
        assert 0.2 < float(parameters[name].detach().std()) < 0.4
