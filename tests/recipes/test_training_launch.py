"""recipes/training/launch.py: what `accelerate launch` sets, and several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from peft import PeftModel
from processes import ACCELERATE, launcher_environment, started_run
from tiny_runs import result_of, tiny_run, weights_of
from transformers import AutoModelForCausalLM

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.loop import train
from nsa_hf.recipes.training.sharding import layer_classes


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
        ("ACCELERATE_USE_FSDP", "true", r"asks for FSDP 1 \(FSDP_VERSION\)"),
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


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", r"asks for FSDP 1 \(FSDP_VERSION\), this training has FSDP2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "set fsdp_cpu_ram_efficient_loading to false"),
        ("FSDP_OFFLOAD_PARAMS", "true", "set fsdp_offload_params to false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "write gradient_checkpointing=1 there"),
    ],
)
def test_of_fsdp_there_is_the_second_with_weights_on_the_gpu(
    nsa_dir, texts, tmp_path, monkeypatch, variable, value, message
):
    for name, usual in launcher_environment("fsdp2").items():
        monkeypatch.setenv(name, usual)
    monkeypatch.setenv(variable, value)
    with pytest.raises(NsaError, match=message):
        train(tiny_run(nsa_dir, texts, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_fsdp_is_not_tried_with_fp16(nsa_dir, texts, tmp_path, monkeypatch):
    for name, usual in launcher_environment("fsdp2").items():
        monkeypatch.setenv(name, usual)
    with pytest.raises(NsaError, match="mixed_precision=fp16 does not work with FSDP2 here: take bf16"):
        train(tiny_run(nsa_dir, texts, tmp_path / "out", mixed_precision="fp16"))


def test_the_launcher_asks_how_many_processes():
    for name in ("ddp", "fsdp2"):
        arguments = ["--config_file", str(ACCELERATE / f"{name}.yaml"), "run"]
        with pytest.raises(ValueError, match="manually pass in `--num_processes`"):
            launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))


# An adapter beside the NSA parameters, which is merged; then all is trained; in the third the gates are not in use.
STAGES = [
    {"trains": "lora", "lora_rank": 3, "steps": 2},
    {"trains": "all", "steps": 2, "accumulate": 2, "gradient_checkpointing": 2},
    {"attention": "dense", "steps": 1},
]


@pytest.fixture(scope="module")
def alone(nsa_dir, texts, tmp_path_factory):
    """The folder of a run of one process with two windows a batch."""
    folder = tmp_path_factory.mktemp("alone")
    with started_run(
        tiny_run(nsa_dir, texts, folder / "out", batch_size=2, stages=STAGES, held_out_documents=3), folder
    ) as run:
        run.finish()
    return folder / "out"


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_with_twice_the_batch(nsa_dir, texts, tmp_path, alone, name):
    config = tiny_run(nsa_dir, texts, tmp_path / "out", stages=STAGES, held_out_documents=3)
    with started_run(config, tmp_path, name) as run:
        said = run.finish()
    assert said.count("step 1/5") == said.count("trained model:") == 1
    one, two = result_of(alone), result_of(tmp_path / "out")
    assert (two["processes"], two["sharded"]) == (2, name == "fsdp2")
    assert two["parameters"] == one["parameters"]
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a["ce"] == pytest.approx(b["ce"], rel=1e-4)
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    # each process reads every second held-out text, and they are put together in their order
    for which in ("before", "after", "after_own_dense"):
        for a, b in zip(one["held_out"][which], two["held_out"][which], strict=True):
            assert a == pytest.approx(b, rel=2e-3, abs=1e-6)
    assert (one["held_out"]["before"] == two["held_out"]["before"]) or name == "fsdp2"
    # the same names and files; AdamW makes of a rounding in a tiny gradient a step of some size
    weights, others = weights_of(alone), weights_of(tmp_path / "out")
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        assert (tensor - others[key]).abs().max() < 2e-4, key
    assert {path.name for path in alone.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape == (256, 48)
    with pytest.raises(NsaError, match="processes: 2 -> 1"):
        train(config)


def test_bf16_is_autocast_where_the_model_is_in_parts_too(nsa_dir, texts, tmp_path):
    losses = []
    for name, batch_size in (("fsdp2", 1), (None, 2)):
        config = tiny_run(
            nsa_dir, texts, tmp_path / f"{name}", steps=1, batch_size=batch_size, mixed_precision="bf16", save_every=0
        )
        with started_run(config, tmp_path, name) as run:
            run.finish()
        losses.append(result_of(Path(config.out))["curve"][0])
    for key in ("ce", "kl", "grad_norm"):
        assert losses[0][key] == pytest.approx(losses[1][key], rel=2e-4), key


def test_of_a_model_in_parts_the_adapter_is_saved_whole(nsa_dir, texts, tmp_path):
    settings = {"trains": "lora", "lora_rank": 3, "lr_nsa": 0.0, "lr_backbone": 1e-2, "steps": 2}
    config = tiny_run(nsa_dir, texts, tmp_path / "out", **settings)
    with started_run(config, tmp_path, "fsdp2") as run:
        run.finish()
    converted, merged = (AutoModelForCausalLM.from_pretrained(folder) for folder in (nsa_dir, config.out))
    ids = torch.randint(3, 256, (1, 200), generator=torch.Generator().manual_seed(0))
    before, after = converted(ids).logits, merged(ids).logits
    adapted = PeftModel.from_pretrained(converted, tmp_path / "out" / "adapter")
    assert torch.allclose(adapted(ids).logits, after, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-2)


def test_a_model_whose_layers_have_no_known_class_is_not_sharded():
    student = torch.nn.Linear(1, 1)
    student._no_split_modules = ["Layer"]
    with pytest.raises(NsaError, match="Linear names no class of its layers"):
        layer_classes(student)
