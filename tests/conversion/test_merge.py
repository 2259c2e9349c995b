"""conversion/merge.py: an adapter merged into a model, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import tiny_dense
from tiny_runs import converted
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.adapters import NEW_MODULES
from nsa_hf.conversion import export_dense, manifest, merge, verify
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.errors import NsaError
from nsa_hf.model_cards.card import render_card
from nsa_hf.recipes import cli

IDS = torch.randint(256, (1, 150), generator=torch.Generator().manual_seed(0))
LORA = LoraConfig(task_type="CAUSAL_LM", modules_to_save=[*NEW_MODULES])
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def nsa_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    return converted(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes)


def adapter_for(model_dir, out, config):
    """A saved adapter with random values, in training mode when it was saved, and what the model with it computes."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(out)
    return out


@torch.no_grad()
def logits(model):
    return model.eval()(IDS % model.config.vocab_size).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("config", [LORA, IA3Config(task_type="CAUSAL_LM")], ids=["lora", "ia3"])
def test_merged_is_unmerged(config, nsa_dir, tiny_dense_dir, tmp_path):
    adapter = adapter_for(nsa_dir, tmp_path / "adapter", config)
    out = merge(nsa_dir, adapter, tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(load(nsa_dir), adapter))
    torch.testing.assert_close(logits(load(out)), expected, atol=1e-4, rtol=0)
    assert (expected - logits(load(nsa_dir))).abs().max() > 1e-2
    assert not hasattr(load(out), "peft_config") and "adapter_config.json" not in os.listdir(out)
    assert (
        AutoTokenizer.from_pretrained(out)("a b").input_ids == AutoTokenizer.from_pretrained(nsa_dir)("a b").input_ids
    )


ON_EMBEDDINGS = {
    "head": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]),
    "embeddings": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]),
    "whole head": LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    "some tokens": LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[1, 5]),
}


@pytest.fixture(scope="module")
def tied_dir(tiny_sizes, tmp_path_factory):
    """A model whose head is its embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    tiny_dense("llama", tie_word_embeddings=True).save_pretrained(folder / "dense")
    return converted(folder / "dense", folder / "model", tiny_sizes)


@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_an_adapter_on_tied_embeddings_is_merged_right_or_not_at_all(name, tied_dir, tmp_path):
    adapter = adapter_for(tied_dir, tmp_path / "adapter", ON_EMBEDDINGS[name])
    if name == "some tokens":  # PEFT puts these into both
        expected = logits(PeftModel.from_pretrained(load(tied_dir), adapter))
        merged = load(merge(tied_dir, adapter, tmp_path / "out"))
        torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
        assert merged.config.tie_word_embeddings
        names = [{name for name, _ in SafetensorsCheckpoint(each).tensors()} for each in (tied_dir, tmp_path / "out")]
        assert names[0] == names[1]
    else:
        with pytest.raises(NsaError, match="which are one in this model"):
            merge(tied_dir, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_its_manifest_says_so_and_verify_reads_it(nsa_dir, tiny_dense_dir, tmp_path, capsys):
    adapter = adapter_for(nsa_dir, tmp_path / "adapter", LORA)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as left:
        cli.main(["merge", str(nsa_dir), str(adapter), str(out)])
    assert not left.value.code and f"next: nsa-hf verify SRC {out}" in capsys.readouterr().out
    record = manifest.read(out)
    assert manifest.is_trained(record) and record["source"] == manifest.read(nsa_dir)["source"]
    assert record["training"]["fingerprint"].keys() == {"adapter_config.json", WEIGHTS}
    assert manifest.differences(record, SafetensorsCheckpoint(out).tensors()) == []
    texts = {"length": 128, "documents": 1, "texts": [("a", "the of and to " * 40)]}
    result = verify(tiny_dense_dir, out, **texts)
    assert (result["trained"], result["exact"], result["changed_files"]) == (True, None, [])
    render_card(out)
    export_dense(out, tmp_path / "dense")
    # once more, on top of it: what was there before is noted
    again = merge(out, adapter_for(out, tmp_path / "second", LoraConfig(task_type="CAUSAL_LM")), tmp_path / "again")
    assert manifest.read(again)["training"]["before"] == record["training"]
    weights = load_file(out / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert verify(tiny_dense_dir, out, **texts)["exact"] is False


def test_an_adapter_of_the_dense_source(nsa_dir, tiny_dense_dir, tiny_sizes, tmp_path):
    adapter = adapter_for(tiny_dense_dir, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM"))
    out = merge(nsa_dir, adapter, tmp_path / "out")
    # as merged first and converted then
    PeftModel.from_pretrained(load(tiny_dense_dir), adapter).merge_and_unload().save_pretrained(tmp_path / "dense")
    other = converted(tmp_path / "dense", tmp_path / "other", tiny_sizes)
    torch.testing.assert_close(logits(load(out)), logits(load(other)), atol=1e-4, rtol=0)
    branches = converted(tiny_dense_dir, tmp_path / "branches", tiny_sizes, branch_kv="independent")
    with pytest.raises(NsaError, match=r"lacks 12 tensors.*merge it into the dense model and convert that"):
        merge(branches, adapter, tmp_path / "refused")


def test_weights_in_16_bits_are_rounded_once(tiny_dense_dir, tiny_sizes, tmp_path):
    half = converted(tiny_dense_dir, tmp_path / "half", tiny_sizes, dtype="bfloat16")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4)
    adapter = adapter_for(half, tmp_path / "adapter", config)
    name = "model.layers.0.self_attn.q_proj"
    merged = load_file(merge(half, adapter, tmp_path / "out") / "model.safetensors")[f"{name}.weight"]
    parts = load_file(adapter / WEIGHTS)
    down, up = (parts[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    weight = load_file(half / "model.safetensors")[f"{name}.weight"].float()
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (weight + up @ down).bfloat16())


def lose_a_tensor(adapter):
    tensors = load_file(adapter / WEIGHTS)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, adapter / WEIGHTS)


def add_a_tensor(adapter):
    tensors = load_file(adapter / WEIGHTS)
    one = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, one.replace("layers.0", "layers.7"): tensors[one].clone()}, adapter / WEIGHTS)


def another_shape(adapter):
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor[:-1].contiguous() for name, tensor in tensors.items()}, adapter / WEIGHTS)


def not_a_number(adapter):
    save_file({name: tensor * float("nan") for name, tensor in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)


def unknown_layers(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nowhere"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_tensor, "lacks 1 tensors beside this model, .*merge it into the model that it was trained on"),
        (add_a_tensor, r"has besides 1 tensors beside this model, .*layers\.7"),
        (another_shape, "is no adapter of this model: .*size mismatch"),
        (not_a_number, "cannot merge .*NaN"),
        (unknown_layers, "is no adapter of this model: .*nowhere"),
        (lambda adapter: (adapter / WEIGHTS).write_bytes(b"no"), "is no adapter of this model"),
        (lambda adapter: (adapter / WEIGHTS).unlink(), "has no adapter_model.safetensors: expected a folder that PEFT"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "cannot read .*adapter_config.json"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(damage, message, nsa_dir, tmp_path):
    adapter = adapter_for(nsa_dir, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM"))
    damage(adapter)
    with pytest.raises(NsaError, match=message):
        merge(nsa_dir, adapter, tmp_path / "out")
    assert os.listdir(tmp_path) == ["adapter"]


def test_killed_while_writing_it_leaves_nothing(nsa_dir, tmp_path, monkeypatch):
    adapter = adapter_for(nsa_dir, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM"))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(nsa_dir, adapter, tmp_path / "out")
    assert os.listdir(tmp_path) == ["adapter"]


def test_what_is_no_merge_is_refused(nsa_dir, tiny_dense_dir, tmp_path):
    adapter = adapter_for(nsa_dir, tmp_path / "adapter", LoraConfig(task_type="CAUSAL_LM"))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(NsaError, match="a PROMPT_TUNING adapter, which cannot be merged"):
        merge(nsa_dir, adapter_for(nsa_dir, tmp_path / "prompts", prompts), tmp_path / "out")
    with pytest.raises(NsaError, match="holds a dense model"):
        merge(tiny_dense_dir, adapter, tmp_path / "out")
    trained = shutil.copytree(nsa_dir, tmp_path / "trained")
    shutil.copytree(adapter, trained / "adapter")
    with pytest.raises(NsaError, match="which `nsa-hf train` has merged it into"):
        merge(trained, trained / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
