"""recipes/training/launch.py: what `accelerate launch` sets, and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import result_of, tiny_run

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.loop import train


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "2",
            r"accumulate is 1 in the run file, and 2 by .*ACCUMULATION_STEPS",
        ),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x", "accumulate is 1 in the run file, and x by"),
        (
            "ACCELERATE_MIXED_PRECISION",
            "bf16",
            "mixed_precision is no in the run file, and bf16 by `accelerate launch`",
        ),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision is no in the run file, and fp8 by"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "asks for torch.compile"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for tensor, context or sequence parallelism"),
    ],
)
def test_the_run_file_is_the_one_home_of_settings(nsa_dir, texts, tmp_path, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(NsaError, match=message):
        train(tiny_run(nsa_dir, texts, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_what_the_launcher_sets_by_itself_does_not_matter(nsa_dir, texts, tmp_path, monkeypatch, finished):
    for variable, value in [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_USE_CPU", "False"),
    ]:
        monkeypatch.setenv(variable, value)
    out = train(tiny_run(nsa_dir, texts, tmp_path / "out"))
    assert (out / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_two_processes_train_as_one_with_twice_the_batch(nsa_dir, texts, tmp_path):
    one = tiny_run(nsa_dir, texts, tmp_path / "one", batch_size=2)
    two = tiny_run(nsa_dir, texts, tmp_path / "two")
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(two.as_dict()))
    # what `accelerate launch` runs on GPUs; on CPUs it would need an MPI launcher
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "nsa_hf.recipes.train", str(run)]
    subprocess.run(launch, check=True, timeout=300, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    alone, together = result_of(train(one)), result_of(Path(two.out))
    assert together["processes"] == 2
    for a, b in zip(alone["curve"], together["curve"], strict=True):
        assert a["ce"] == pytest.approx(b["ce"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    with pytest.raises(NsaError, match="processes: 2 -> 1"):
        train(two)
