"""Sparse models loaded in 8 and 4 bits, adapters trained on them, and what such a model is refused for."""

from __future__ import annotations

import pytest
import torch
import torchao.quantization as torchao
from generation_steps import relative, tokens
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny_models import TINY_SIZES, randomize_nsa, tiny_dense_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import nsa_hf
from nsa_hf import NsaError
from nsa_hf.conversion import export_dense, merge, verify

EXACT = TINY_SIZES["nsa_topk"] * TINY_SIZES["nsa_block_size"]
# By what is loaded so: the options, and how far the activations' rounding puts gradients off.
KINDS = {
    "torchao int8": (lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()), 1e-4),
    "torchao int4": (
        lambda: TorchAoConfig(torchao.IntxWeightOnlyConfig(torch.int4, torchao.granularity.PerGroup(32))),
        1e-4,
    ),
    "bitsandbytes int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.1),
    "bitsandbytes nf4": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 1e-4),
}
LORA = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, modules_to_save=["nsa.gate"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model and its sparse one: wide enough for groups of 32 weights; with keys and values per branch."""
    dense, folder = tiny_dense_model(hidden_size=64, num_attention_heads=4, head_dim=16), tmp_path_factory.mktemp("few")
    dense.save_pretrained(folder / "dense")
    sizes = {**TINY_SIZES, "nsa_branch_kv": "independent", "nsa_compression": "mlp"}
    nsa_hf.from_dense(dense, **sizes).save_pretrained(folder / "nsa")
    return folder


def loaded(folder, kind: str | None = None):
    options = {} if kind is None else {"quantization_config": KINDS[kind][0]()}
    # on a CPU bitsandbytes has weights of 4 bits in evaluation in an order of which there are no gradients
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()


def is_backbone(name: str) -> bool:
    """Whether this is what was to be quantised."""
    return name.endswith("_proj.weight") and ".nsa." not in name


@torch.no_grad()
def with_weights_of(quantised, plain):
    """The plain model with the weights that the quantised one computes with: what its layers make of unit vectors."""
    for name, weight in filter(lambda item: is_backbone(item[0]), plain.named_parameters()):
        layer = quantised.get_submodule(name.removesuffix(".weight"))
        weight.copy_(layer(torch.eye(weight.shape[1])).T)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_exact_and_the_new_parameters_are_whole(kind, folders):
    sparse, dense, plain = loaded(folders / "nsa", kind), loaded(folders / "dense", kind), loaded(folders / "nsa")
    for name, parameter in plain.named_parameters():
        got = sparse.get_parameter(name)
        whole = type(got) is torch.nn.Parameter and got.dtype == torch.float32 and torch.equal(got, parameter)
        assert whole is not is_backbone(name), name
    x = tokens(2)
    with torch.no_grad():
        got, expected = sparse(x).logits, dense(x).logits
        assert relative(got[:, :EXACT], expected[:, :EXACT]) < 1e-5 < relative(got, expected)
        assert relative(got[:, :EXACT], plain(x).logits[:, :EXACT]) > 1e-3, "else nothing was quantised"


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_as_on_the_weights_that_there_are(kind, folders, tmp_path):
    base, again, plain = (loaded(folders / "nsa", bits) for bits in (kind, kind, None))
    for model in (base, again, plain):
        randomize_nsa(model)
    plain, x = with_weights_of(base, plain), tokens(2, 100)
    adapted = get_peft_model(prepare_model_for_kbit_training(base), LORA)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    where = {name.partition(".self_attn.")[2].partition(".lora_")[0].partition(".modules")[0] for name in trained}
    assert where == {"q_proj", "v_proj", "nsa.compressed.v_proj", "nsa.window.v_proj", "nsa.gate"}
    adapted.save_pretrained(tmp_path / "begun")
    expected = PeftModel.from_pretrained(plain, tmp_path / "begun", is_trainable=True).train()
    loss, expected_loss = (model(input_ids=x, labels=x).loss for model in (adapted, expected))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=KINDS[kind][1])
    loss.backward()
    expected_loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) is (name in trained), name
    for name, parameter in trained.items():
        assert relative(parameter.grad, expected.get_parameter(name).grad) < KINDS[kind][1], name
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    with torch.no_grad():
        after = adapted(input_ids=x, labels=x)
        assert after.loss < loss
        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(again, tmp_path / "adapter").train()
        torch.testing.assert_close(again(input_ids=x).logits, after.logits)


def test_what_needs_plain_weights_refuses_a_folder_that_was_saved_quantised(folders, tmp_path):
    few, adapter, out = (tmp_path / name for name in ("few", "adapter", "out"))
    loaded(folders / "nsa", "torchao int8").save_pretrained(few)
    get_peft_model(loaded(few), LORA).save_pretrained(adapter)
    for command in (
        lambda: merge(few, adapter, out),
        lambda: export_dense(few, out),
        lambda: verify(folders / "dense", few),
    ):
        with pytest.raises(NsaError, match=r"few is quantised \(torchao\): expected plain weights"):
            command()
        assert not out.exists()
