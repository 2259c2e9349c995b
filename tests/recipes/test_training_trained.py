"""recipes/training/trained.py: what a stage trains, and adapters (LoRA)."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peft import PeftModel
from tiny_runs import result_of, stop_at, tiny_run, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.conversion import export_dense, manifest, verify
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.config import make_run_config
from nsa_hf.recipes.training.loop import train
from nsa_hf.recipes.training.trained import check_stage, is_all_that_is_trained

LORA = {"trains": "lora", "lora_rank": 4, "lr_nsa": 0.0, "lr_backbone": 1e-2}


def changed(before, after):
    old, new = weights_of(before), weights_of(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize(
    ("trains", "parts"),
    [
        ("nsa", (".nsa.",)),
        ("qk", (".nsa.", "self_attn.q_proj.", "self_attn.k_proj.")),
        ("qkvo", (".nsa.", "self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.", "self_attn.o_proj.")),
    ],
)
def test_only_that_is_trained(nsa_dir, texts, tmp_path, trains, parts):
    names = changed(nsa_dir, train(tiny_run(nsa_dir, texts, tmp_path / "out", trains=trains, steps=2)))
    assert all(any(part in name for part in parts) for name in names)
    assert all(any(part in name for name in names) for part in parts)


@pytest.fixture(scope="module")
def lora(nsa_dir, texts, tmp_path_factory):
    """A finished run that trained an adapter."""
    return train(tiny_run(nsa_dir, texts, tmp_path_factory.mktemp("lora") / "out", **LORA))


def test_an_adapter_is_merged(lora, nsa_dir):
    """The folder is a plain model, whose projections alone have changed."""
    names = changed(nsa_dir, lora)
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not hasattr(AutoModelForCausalLM.from_pretrained(lora), "peft_config")


def test_the_adapter_alone_is_the_whole_difference(lora, nsa_dir):
    merged, converted = (AutoModelForCausalLM.from_pretrained(folder) for folder in (lora, nsa_dir))
    adapted = PeftModel.from_pretrained(converted, lora / "adapter")
    ids = AutoTokenizer.from_pretrained(lora)("the of and to " * 40, return_tensors="pt").input_ids
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    assert not torch.allclose(merged(ids).logits, AutoModelForCausalLM.from_pretrained(nsa_dir)(ids).logits, atol=1e-2)
    files = {path.name for path in (lora / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_its_manifest_knows_the_adapter_and_verify_is_content(lora, nsa_dir, tiny_dense_dir, tmp_path):
    record = manifest.read(lora)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= record["files"].keys()
    assert manifest.differences(record, SafetensorsCheckpoint(lora).tensors()) == []
    text = [("a", "the of and to " * 40)]
    assert verify(tiny_dense_dir, lora, length=128, documents=1, texts=text)["changed_files"] == []
    export_dense(lora, tmp_path / "dense")
    assert not (tmp_path / "dense" / "adapter").exists()
    assert train(tiny_run(nsa_dir, result_of(lora)["config"]["data"], lora, **LORA)) == lora
    weights = lora / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert manifest.changed_files(record, lora) == ["adapter/adapter_model.safetensors"]
    finally:
        weights.write_bytes(content)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_stages_with_an_adapter_go_on_where_they_were(nsa_dir, texts, tmp_path, step):
    stages = [{"steps": 2}, {**LORA, "steps": 2}, {"steps": 2, "trains": "qk"}]
    whole = train(tiny_run(nsa_dir, texts, tmp_path / "whole", stages=stages))
    config = tiny_run(nsa_dir, texts, tmp_path / "stopped", stages=stages, save_every=1)
    stop_at(config, step)
    assert (train(config) / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # of several stages it is not the whole difference
    assert not (whole / "adapter").exists()


def test_beside_nsa_parameters_it_is_not_the_whole_difference(nsa_dir, texts, tmp_path):
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", **{**LORA, "lr_nsa": 1e-2, "steps": 2}))
    assert any(".nsa." in name for name in changed(nsa_dir, out))
    assert not (out / "adapter").exists()


def test_targets_by_name(nsa_dir, texts, tmp_path):
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", **LORA, lora_targets=["down_proj"], steps=2))
    assert {name.split(".")[-2] for name in changed(nsa_dir, out)} == {"down_proj"}
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["base_model_name_or_path"]) == (4, 32.0, str(nsa_dir))
    with pytest.raises(NsaError, match=r"lora_targets: no linear layer 'qkv_proj' in this model; it has down_proj,"):
        train(tiny_run(nsa_dir, texts, tmp_path / "other", **LORA, lora_targets=["down_proj", "qkv_proj"]))


def test_a_later_stage_is_refused_before_the_first(nsa_dir, texts, tmp_path, monkeypatch):
    stages = [{"steps": 2}, {"steps": 2, **LORA, "lora_targets": ["nowhere"]}]
    with pytest.raises(NsaError, match="stage 2: lora_targets: no linear layer 'nowhere'"):
        train(tiny_run(nsa_dir, texts, tmp_path / "out", stages=stages))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(NsaError, match="needs the package `peft`: pip install"):
        train(tiny_run(nsa_dir, texts, tmp_path / "out", **LORA))
    assert not list(tmp_path.iterdir())


def test_gradients_are_recomputed_alike_with_an_adapter(lora, nsa_dir, texts, tmp_path):
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out", gradient_checkpointing=1, **LORA))
    for one, other in zip(result_of(out)["curve"], result_of(lora)["curve"], strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_an_adapter_beside_gates_that_open_is_not_the_whole_difference():
    one = {"model": "a", "out": "b", "trains": "lora", "lr_nsa": 0.0}
    assert is_all_that_is_trained(make_run_config(one))
    assert not is_all_that_is_trained(make_run_config({**one, "gate_blend_steps": 5}))


def test_a_model_in_parts_gets_no_adapter_in_a_later_stage(tiny_nsa_model):
    stage = make_run_config({"model": "a", "out": "b", "trains": "lora"})
    check_stage(tiny_nsa_model(), stage, sharded=True)
    with pytest.raises(NsaError, match="works with FSDP2 in the first stage only"):
        check_stage(tiny_nsa_model(), stage, sharded=True, number=2)


def test_a_stage_of_a_family_without_gradient_checkpointing_is_refused_before_the_first(tiny_nsa_model):
    model = tiny_nsa_model()
    stage = make_run_config({"model": "a", "out": "b", "gradient_checkpointing": 1})
    check_stage(model, stage, sharded=False)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()), "as it was"
    model.supports_gradient_checkpointing = False
    with pytest.raises(NsaError, match="Transformers has none for"):
        check_stage(model, stage, sharded=False)
