import shutil

import pytest
import torch
from tiny_runs import converted

import nsa_hf
from nsa_hf.errors import NsaError
from nsa_hf.recipes.load import check_token_ids, load_nsa_model, load_tokenizer, pick_device


@pytest.fixture(scope="module")
def nsa_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    return converted(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes)


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
