"""conversion/files/loading.py: configs that ask for too much, whoever reads them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from nsa_hf.conversion import convert, export_dense, plan, verify
from nsa_hf.conversion.files.loading import check_counts
from nsa_hf.errors import NsaError
from nsa_hf.recipes.load import load_nsa_model


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def soon():
    began = time.perf_counter()
    yield
    assert time.perf_counter() - began < 10


@pytest.fixture
def dense_dir(tiny_dense_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))


# as Qwen3 makes a list as long as there are layers when it reads its config
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("layers", ["1000000000", "1e300", "9" * 5000])
def test_a_billion_layers_are_refused_at_once(dense_dir, tmp_path, soon, family, layers):
    edit_config(dense_dir, model_type=family, layer_types=None)
    text = (dense_dir / "config.json").read_text()
    (dense_dir / "config.json").write_text(text.replace('"num_hidden_layers": 3', f'"num_hidden_layers": {layers}'))
    expected = r"(num_hidden_layers is .*no model has more than 1,024|config.json: Exceeds the limit \(4300)"
    for run in (plan, lambda src: convert(src, tmp_path / "out")):
        with pytest.raises(NsaError, match=expected):
            run(dense_dir)
    assert not (tmp_path / "out").exists()


def test_nor_are_they_made_of_a_converted_model(tiny_dense_dir, tmp_path, soon):
    out = convert(tiny_dense_dir, tmp_path / "out")
    edit_config(out, num_hidden_layers=10**9)
    for run in (lambda: verify(tiny_dense_dir, out), lambda: export_dense(out, tmp_path / "dense")):
        with pytest.raises(NsaError, match="num_hidden_layers is 1,000,000,000, and no model has more"):
            run()
    with pytest.raises(NsaError, match="num_hidden_layers is 1,000,000,000, and no model has more"):
        load_nsa_model(out)


@pytest.mark.parametrize("name", ["n_layer", "num_layers", "num_experts", "n_routed_experts", "num_local_experts"])
def test_every_family_s_name_for_them_wherever_it_stands(name):
    check_counts({"text_config": [{name: 512}]}, "config.json")
    with pytest.raises(NsaError, match=f"config.json: {name} is 999,999, and no model has more than"):
        check_counts({"text_config": [{name: 999_999}]}, "config.json")


def test_nor_a_billion_names_of_labels(dense_dir, soon):
    edit_config(dense_dir, num_labels=10**9)
    with pytest.raises(NsaError, match="num_labels is 1,000,000,000, and no model has more than 1,048,576"):
        plan(dense_dir)


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_key_value_heads", "pad_token_id"]
)
@pytest.mark.parametrize("value", [10**18, 2**70, -5])
def test_sizes_that_cannot_be_end_in_one_line_too(dense_dir, tmp_path, soon, field, value):
    edit_config(dense_dir, **{field: value})
    for run in (plan, lambda src: convert(src, tmp_path / "out")):
        if (field, value) != ("pad_token_id", -5):  # the first from behind
            with pytest.raises(NsaError):
                run(dense_dir)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "nested",
    ['{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 100_000 + "]" * 100_000, "[" * 100_000],
    ids=["objects", "lists", "lists that do not end"],
)
def test_depth_is_no_traceback(dense_dir, tmp_path, soon, name, nested):
    (dense_dir / name).write_text(nested)
    if name == "model.safetensors.index.json":
        (dense_dir / "model.safetensors").rename(dense_dir / "model-00001-of-00001.safetensors")
    with pytest.raises(NsaError, match=f"{name}"):
        convert(dense_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
