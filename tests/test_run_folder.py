import json
from pathlib import Path

import pytest
from tiny_runs import converted, tiny_run

from nsa_hf.errors import NsaError
from nsa_hf.recipes.load import load_nsa_model
from nsa_hf.recipes.run_folder import (
    RunFolderError,
    fingerprint,
    finished_run,
    machine,
    open_run_folder,
    save_trained,
    unfinished,
)


@pytest.fixture(scope="module")
def nsa_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    return converted(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes)


def test_what_decides_the_weights_is_in_the_fingerprint(nsa_dir, tmp_path, tiny_dense_dir, tiny_sizes):
    print_ = fingerprint(tiny_run(nsa_dir, tmp_path, tmp_path / "out"))
    # where it goes and how often it is saved do not matter
    assert print_ == fingerprint(tiny_run(nsa_dir, tmp_path, tmp_path / "other", save_every=7, keep=3, log_every=2))
    assert print_ != fingerprint(tiny_run(nsa_dir, tmp_path, tmp_path / "out", seed=1))
    other = converted(tiny_dense_dir, tmp_path / "nsa", {**tiny_sizes, "nsa_topk": 5})
    assert print_ != fingerprint(tiny_run(other, tmp_path, tmp_path / "out"))


def test_an_unfinished_run_is_found_again(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "deep" / "out")
    folder = open_run_folder(config)
    assert folder == tmp_path / "deep" / "out.unfinished" == unfinished(config)
    before = (folder / "run.json").read_bytes()
    assert open_run_folder(config) == folder
    assert (folder / "run.json").read_bytes() == before
    with pytest.raises(RunFolderError, match="seed: 0 -> 1"):
        open_run_folder(tiny_run(nsa_dir, tmp_path, config.out, seed=1))
    assert not finished_run(config)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '"x"'])
def test_a_damaged_record_is_named(nsa_dir, tmp_path, content):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    (open_run_folder(config) / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match="is damaged"):
        open_run_folder(config)


def test_a_folder_that_cannot_be_made_is_named(nsa_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot make"):
        open_run_folder(tiny_run(nsa_dir, tmp_path, tmp_path / "file" / "out"))


def test_saving_ends_the_unfinished_run(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    open_run_folder(config)
    save_trained(load_nsa_model(nsa_dir), config, {"curve": []})
    assert not unfinished(config).exists()
    result = json.loads((tmp_path / "out" / "training.json").read_text())
    assert result["fingerprint"] == fingerprint(config)
    assert result["hardware"]["cpu"]
    assert finished_run(config)
    # what a kill between the two left behind goes as well
    unfinished(config).mkdir()
    assert finished_run(config)
    assert not unfinished(config).exists()


def test_a_save_that_fails_leaves_the_run_as_it_was(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    open_run_folder(config)
    with pytest.raises(ValueError, match="JSON"):
        save_trained(load_nsa_model(nsa_dir), config, {"curve": [float("nan")]})
    assert not Path(config.out).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]


def test_only_converted_models_have_runs(tiny_dense_dir, tmp_path):
    with pytest.raises(NsaError, match=r"holds a dense model"):
        fingerprint(tiny_run(tiny_dense_dir, tmp_path, tmp_path / "out"))


def test_the_machine_is_described():
    found = machine()
    assert found["hardware"]["threads"] >= 1
    assert {"python", "torch", "transformers", "accelerate", "nsa-hf"} <= set(found["versions"])
