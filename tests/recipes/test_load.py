import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import nsa_hf
from nsa_hf.conversion import export_dense
from nsa_hf.conversion.files.loading import load_whole
from nsa_hf.errors import NsaError
from nsa_hf.recipes.load import check_token_ids, load_nsa_model, load_tokenizer, pick_device


def edit_config(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


def test_a_converted_model(nsa_dir):
    model = load_nsa_model(nsa_dir, dtype="bfloat16")
    assert isinstance(model, nsa_hf.NsaLlamaForCausalLM)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert load_tokenizer(nsa_dir)("ab")["input_ids"] == load_tokenizer(str(nsa_dir))("ab")["input_ids"]


def test_other_folders_are_named(nsa_dir, tiny_dense_dir, tmp_path):
    damaged = shutil.copytree(nsa_dir, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    (damaged / "tokenizer.json").write_text("{")
    lacking = shutil.copytree(nsa_dir, tmp_path / "lacking")
    (lacking / "model.safetensors").unlink()
    for folder, message in [
        (tmp_path, "holds no model"),
        (tiny_dense_dir, r"holds a dense model \(llama\)"),
        (damaged, "damaged"),
        (lacking, "lacking"),
    ]:
        with pytest.raises(NsaError, match=message):
            load_nsa_model(folder)
    with pytest.raises(NsaError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    for load in (load_nsa_model, load_tokenizer):
        with pytest.raises(NsaError, match="none does not exist: expected a folder that `nsa-hf convert`"):
            load(tmp_path / "none")
        with pytest.raises(NsaError, match=r"config\.json is a file: expected a folder"):
            load(nsa_dir / "config.json")
    with pytest.raises(NsaError, match="damaged"):
        load_tokenizer(damaged)


def test_made_up_weights_are_not_passed_over(nsa_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(nsa_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match="q_proj"):
        load_nsa_model(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama' instead of 'nsa_llama'"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1 instead of 3"),
        ({"nsa_dense_layers": [1]}, r"nsa_dense_layers \[1\] instead of \[\]"),
        # sizes of the tensors stay the same: nothing else would say a word
        ({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}, "num_attention_heads 3 instead of 6"),
    ],
)
def test_a_config_of_another_model_is_refused_by_name(change, said, nsa_dir, tmp_path):
    folder = shutil.copytree(nsa_dir, tmp_path / "model")
    edit_config(folder, change)
    for load in (load_nsa_model, load_whole, lambda out: export_dense(out, tmp_path / "dense")):
        with pytest.raises(NsaError, match=f"config.json is not of the model in this folder.*{said}"):
            load(folder)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, nsa_hf.NsaLlamaForCausalLM, AutoModel])
def test_our_classes_refuse_half_a_model_wherever_they_are_loaded(auto, nsa_dir, tmp_path):
    folder = shutil.copytree(nsa_dir, tmp_path / "model")
    edit_config(folder, {"num_hidden_layers": 1})
    with pytest.raises(NsaError, match="num_hidden_layers 1 instead of 3"):
        auto.from_pretrained(folder)
    # without a manifest our commands still see what is left over
    (folder / "manifest.json").unlink()
    with pytest.raises(NsaError, match=r"holds 42 tensors that its config does not ask for, model.layers.1"):
        load_nsa_model(folder)


def test_what_is_not_the_models_shape_may_be_edited(nsa_dir, tmp_path):
    folder = shutil.copytree(nsa_dir, tmp_path / "model")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    edit_config(folder, {"nsa_topk": 5, "rope_parameters": scaled, "max_position_embeddings": 4096})
    model = load_nsa_model(folder)
    assert (model.config.nsa_topk, model.config.rope_parameters["factor"]) == (5, 2.0)
    # saved over itself by Transformers
    model.save_pretrained(folder)
    assert load_nsa_model(folder).config.nsa_topk == 5
    # what another program calls manifest.json is none of ours
    (folder / "manifest.json").write_text('{"name": "an app"}')
    edit_config(folder, {"nsa_topk": 6})
    assert AutoModelForCausalLM.from_pretrained(folder).config.nsa_topk == 6
    for damaged in ("{", "[" * 100_000):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(NsaError, match=r"manifest.json is damaged"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_devices():
    assert pick_device(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == "cpu"
    with pytest.raises(NsaError, match="no device 'warp' here"):
        pick_device("warp")


def test_ids_beyond_the_vocabulary(tiny_nsa_model):
    model = tiny_nsa_model()
    check_token_ids(model, torch.tensor([[0, 255]]))
    check_token_ids(model, [])
    with pytest.raises(NsaError, match="gives token 256, and the model's vocabulary ends at 255"):
        check_token_ids(model, [3, 256])
