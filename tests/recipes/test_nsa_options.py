"""recipes/nsa_options.py: fields as options, a YAML file of them, RoPE scaling. (Each field: test_cli.py.)"""

from __future__ import annotations

import json

import pytest

from nsa_hf import NsaError
from nsa_hf.recipes.cli import run
from nsa_hf.recipes.exit_codes import WRONG_INPUT
from nsa_hf.recipes.nsa_options import options_of, read_options

SIZES = "kernel_size: 8\nkernel_stride: 4\nnsa_block_size: 16\ntopk: 4\ninit_blocks: 1\nlocal_blocks: 1\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(SIZES + "dense_layers: [0, -1]\nbranch_kv: shared\n")
    return path


def test_a_file_of_options_and_the_command_line_before_it(file, tiny_dense_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["convert", str(tiny_dense_dir), str(out), "--options", str(file), "--topk", "5"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["nsa_kernel_size"], config["nsa_block_size"], config["nsa_topk"]) == (8, 16, 5)
    assert config["nsa_dense_layers"] == [0, 2]
    assert json.loads((out / "manifest.json").read_text())["options"]["nsa_dense_layers"] == [0, -1]


def test_options_go_without_their_prefix(tiny_dense_dir, capsys):
    options = ["--dense-layers", "0,1", "--branch-kv", "independent", "--window-size", "64"]
    assert run(["plan", str(tiny_dense_dir), "--json", *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [layer["becomes"] for layer in said["layers"]] == ["dense", "dense", "nsa"]
    assert said["options"]["nsa_branch_kv"] == "independent" and said["options"]["nsa_window_size"] == 64


def test_rope_scaling(tiny_dense_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["convert", str(tiny_dense_dir), str(out), "--rope-scaling", "yarn:4"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn" and config["rope_parameters"]["factor"] == 4.0
    assert config["max_position_embeddings"] == 4 * 4096
    assert config["rope_parameters"]["original_max_position_embeddings"] == 4096
    assert run(["plan", str(tiny_dense_dir), "--rope-scaling", "ntk:2"]) == WRONG_INPUT
    assert "rope_scaling must be KIND:FACTOR" in capsys.readouterr().err


def test_layers_in_a_file_may_be_written_as_on_the_command_line(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text('dense_layers: "0,1,-1"\nrope_scaling: {rope_type: yarn, factor: 2}\n')
    assert options_of({"options_file": path, "nsa_topk": None}) == {
        "nsa_dense_layers": [0, 1, -1],
        "rope_scaling": {"rope_type": "yarn", "factor": 2},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- topk\n", "must hold options such as `topk: 32`, one a line, got list"),
        ("topk: [\n", "cannot read the options in"),
        ("topk: 4\nnsa_topk: 5\n", "gives nsa_topk twice"),
    ],
)
def test_a_file_that_is_wrong_is_named(text, message, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(NsaError, match=message) as caught:
        read_options(path)
    assert str(path) in str(caught.value)


def test_an_unknown_option_in_a_file_is_refused(tiny_dense_dir, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("top_k: 4\n")
    assert run(["plan", str(tiny_dense_dir), "--options", str(path)]) == WRONG_INPUT
    assert "'top_k': did you mean topk?" in capsys.readouterr().err
    assert run(["plan", str(tiny_dense_dir), "--options", str(tmp_path / "absent.yaml")]) == WRONG_INPUT
