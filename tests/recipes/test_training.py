import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, tiny_dense_model
from tiny_runs import converted, folder_hashes, tiny_run, write_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa_hf
from nsa_hf.conversion import export_dense, manifest
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint, hash_file
from nsa_hf.errors import NsaError
from nsa_hf.recipes.train import main
from nsa_hf.recipes.training.checkpoints import Checkpoints
from nsa_hf.recipes.training.folder import RunFolderError
from nsa_hf.recipes.training.loop import TrainingError, run_steps, train


@pytest.fixture(scope="module")
def nsa_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    return converted(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(True)


def result_of(folder):
    return json.loads((folder / "training.json").read_text())


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def finished(nsa_dir, texts, tmp_path_factory):
    """A finished run, and the converted folder's hashes before it."""
    before = folder_hashes(nsa_dir)
    config = tiny_run(nsa_dir, texts, tmp_path_factory.mktemp("runs") / "trained")
    return train(config), config, before


def test_a_run_ends_as_a_whole_model(finished, nsa_dir):
    out, _, before = finished
    assert folder_hashes(nsa_dir) == before
    assert not list(out.parent.glob("*unfinished*"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, nsa_hf.NsaLlamaForCausalLM)
    ids = AutoTokenizer.from_pretrained(out)("the of", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    old, new = weights_of(nsa_dir), weights_of(out)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"} <= changed
    assert any(".nsa.gate." in name for name in changed)


def test_its_manifest_is_of_a_trained_model(finished, nsa_dir):
    out, config, _ = finished
    trained, untrained = manifest.read(out), manifest.read(nsa_dir)
    assert trained["trained"] is True
    assert trained["exact_up_to"] is None
    assert trained["source"] == untrained["source"]
    assert trained["training"]["steps"] == config.steps
    assert manifest.differences(trained, SafetensorsCheckpoint(out).tensors()) == []
    assert {name: entry["from"] for name, entry in trained["tensors"].items()} == {
        name: entry["from"] for name, entry in untrained["tensors"].items()
    }


def test_every_tensor_and_file_of_it_has_its_hash(finished):
    out, _, _ = finished
    record = manifest.read(out)
    assert manifest.is_trained(record) and manifest.changed_files(record, out) == []
    beside = {path.name for path in out.iterdir()} - {"manifest.json", "model.safetensors"}
    assert record["files"].keys() == beside and "training.json" in beside


def test_it_starts_from_a_folder_that_was_saved_elsewhere(nsa_dir, texts, tmp_path):
    """As Trainer, TRL and a merged adapter leave it: no manifest.json."""
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(nsa_dir).save_pretrained(saved)
    AutoTokenizer.from_pretrained(nsa_dir).save_pretrained(saved)
    config = tiny_run(saved, texts, tmp_path / "out", steps=1)
    record = manifest.read(train(config))
    assert (record["source"]["name"], record["source"]["kind"]) == (str(saved), "a folder without manifest.json")
    assert manifest.is_trained(record)
    assert "source" not in record["tensors"]["model.norm.weight"]
    assert manifest.differences(record, SafetensorsCheckpoint(tmp_path / "out").tensors()) == []
    report = export_dense(tmp_path / "out", tmp_path / "dense")
    assert (report["trained"], report["as_in_source"]) == (True, None)
    # other weights are another run
    weights = weights_of(saved)
    weights["model.norm.weight"] += 1
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFolderError, match="weights"):
        train(config)


def test_its_result_holds_what_was_measured(finished):
    out, config, _ = finished
    result = result_of(out)
    assert result["config"] == config.as_dict()
    assert [row["step"] for row in result["curve"]] == [1, 2, 3, 4]
    for row in result["curve"]:
        assert row["loss"] == pytest.approx(row["ce"] + row["kl"])
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
    held_out = result["held_out"]
    assert held_out["names"] == ["0.txt", "1.txt"]
    assert [(row["from"], row["to"]) for row in held_out["before"]] == [(0, 64), (64, 128)]
    # before training the exact range is exact, and only it
    assert held_out["before"][0]["kl"] < 1e-7
    assert held_out["before"][1]["kl"] > 1e-4
    kl = [row["kl"] for row in held_out["after"]]
    assert held_out["kl_after"] == pytest.approx(sum(kl) / 2)
    assert held_out["kl_after_beyond"] == pytest.approx(kl[1])
    for after, own in zip(held_out["after"], held_out["after_own_dense"], strict=True):
        assert after["ppl"] == pytest.approx(own["ppl"])
    assert result["parameters"]["nsa"] == sum(t.numel() for n, t in weights_of(out).items() if ".nsa." in n)
    assert result["hardware"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
def test_a_finished_run_that_has_lost_a_file_is_not_called_finished(finished, tmp_path, name):
    out, config, _ = finished
    (out / name).rename(tmp_path / name)
    try:
        with pytest.raises(RunFolderError, match=rf"held this run, finished, and is not whole .*{name}.*put that back"):
            train(config)
        assert (out / "training.json").is_file()
    finally:
        (tmp_path / name).rename(out / name)


def test_a_finished_run_is_not_run_again(finished, capsys):
    out, config, _ = finished
    before = folder_hashes(out)
    assert train(config) == out
    assert "finished: nothing to do" in capsys.readouterr().out
    assert folder_hashes(out) == before


def test_other_settings_do_not_go_into_a_finished_folder(finished, nsa_dir, texts):
    out = finished[0]
    with pytest.raises(RunFolderError, match=r"steps: 4 -> 5.*give another out="):
        train(tiny_run(nsa_dir, texts, out, steps=5))


def test_a_folder_with_something_else_is_left_alone(nsa_dir, texts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NsaError, match="not empty"):
        train(tiny_run(nsa_dir, texts, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(NsaError):
        train(tiny_run(nsa_dir, texts, nsa_dir))


def test_kl_to_the_teacher_falls_when_it_is_the_loss(nsa_dir, texts, tmp_path):
    config = tiny_run(nsa_dir, texts, tmp_path / "out", steps=60, ce_weight=0.0, lr_backbone=1e-4, lr_nsa=1e-3)
    held_out = result_of(train(config))["held_out"]
    assert held_out["kl_after"] < 0.8 * held_out["kl_before"]


def test_next_token_loss_falls(nsa_dir, texts, tmp_path):
    config = tiny_run(nsa_dir, texts, tmp_path / "out", steps=12, kl_weight=0.0, lr_backbone=1e-2)
    curve = result_of(train(config))["curve"]
    assert curve[-1]["ce"] < curve[0]["ce"] - 0.5
    assert all(row["kl"] == 0 for row in curve)


def test_rate_zero_freezes(nsa_dir, texts, tmp_path):
    old, new = weights_of(nsa_dir), weights_of(train(tiny_run(nsa_dir, texts, tmp_path / "out", lr_backbone=0.0)))
    for name in old:
        if ".nsa." not in name:
            assert torch.equal(old[name], new[name]), name
    assert not torch.equal(
        old["model.layers.0.self_attn.nsa.gate.down.weight"], new["model.layers.0.self_attn.nsa.gate.down.weight"]
    )


def test_accumulated_windows_count_as_one_batch(nsa_dir, texts, tmp_path):
    batch = result_of(train(tiny_run(nsa_dir, texts, tmp_path / "a", batch_size=2)))
    accumulated = result_of(train(tiny_run(nsa_dir, texts, tmp_path / "b", accumulate=2)))
    for one, other in zip(batch["curve"], accumulated["curve"], strict=True):
        assert one["ce"] == pytest.approx(other["ce"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_gradient_checkpointing_changes_memory_only(nsa_dir, texts, tmp_path, finished):
    for every in (1, 2):
        out = train(tiny_run(nsa_dir, texts, tmp_path / str(every), gradient_checkpointing=every))
        for one, other in zip(result_of(out)["curve"], result_of(finished[0])["curve"], strict=True):
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_bf16_autocast_keeps_fp32_weights(nsa_dir, texts, tmp_path, finished):
    out = train(tiny_run(nsa_dir, texts, tmp_path / "a", mixed_precision="bf16"))
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.float32}
    bf16, fp32 = (result_of(folder)["curve"][0]["ce"] for folder in (out, finished[0]))
    assert bf16 == pytest.approx(fp32, rel=2e-2)
    assert bf16 != fp32


def test_the_gates_blend_in(tiny_dense_dir, tiny_sizes, texts, tmp_path):
    model = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes, gate="blend")
    out = train(tiny_run(model, texts, tmp_path / "out", gate_blend_steps=2))
    assert AutoModelForCausalLM.from_pretrained(out).config.nsa_gate_blend == 1.0
    assert AutoModelForCausalLM.from_pretrained(model).config.nsa_gate_blend == 0.0


def test_what_cannot_be_trained_is_named(nsa_dir, texts, tmp_path, tiny_dense_dir):
    for settings, message in [
        ({"gate_blend_steps": 2}, "gate_blend_steps needs nsa_gate 'blend', the model has 'residual'"),
        ({"model": str(tiny_dense_dir)}, r"holds a dense model"),
        ({"model": str(tmp_path / "none")}, "none does not exist"),
        ({"length": 4000}, "tokens"),
        ({"data": str(tmp_path / "nowhere")}, "no text at"),
        ({"lr_nsa": 1e30, "lr_backbone": 1e30}, "the loss is not finite at step"),
    ]:
        with pytest.raises(NsaError, match=message):
            train(tiny_run(**{"model": nsa_dir, "texts": texts, "out": tmp_path / f"o{len(message)}", **settings}))


def test_what_saving_or_a_step_would_stop_at_is_refused_before_the_first(nsa_dir, texts, tmp_path):
    (tmp_path / "secret").write_text("mine")
    linked = Path(shutil.copytree(nsa_dir, tmp_path / "linked"))
    (linked / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(NsaError, match="LICENSE is a link out of its folder"):
        train(tiny_run(linked, tmp_path / "no text", tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(nsa_dir)
    tokenizer.add_tokens(["beyond"])
    other = Path(shutil.copytree(nsa_dir, tmp_path / "other"))
    tokenizer.save_pretrained(other)
    (tmp_path / "data.txt").write_text("and beyond it, " * 100)
    with pytest.raises(NsaError, match="the tokenizer gives token 256, and the model's vocabulary ends at 255"):
        train(tiny_run(other, texts, tmp_path / "out", data=str(tmp_path / "data.txt")))
    assert not list(tmp_path.glob("out*"))


def test_main_prints_errors_without_a_traceback(tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text("model: a\nout: b\n")
    for arguments, message in [
        ([], "give a run file"),
        ([str(tmp_path / "none.yaml")], "no run file"),
        ([str(run), "stpes=1"], "did you mean steps?"),
        ([str(tmp_path)], "cannot read the run file"),
        ([str(run), "steps='"], "cannot read the value of steps"),
    ]:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert message in captured.err
        assert "Traceback" not in captured.err
        assert captured.err.count("\n") == 1


def test_main_ends_quietly_on_ctrl_c(nsa_dir, texts, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(tiny_run(nsa_dir, texts, tmp_path / "out").as_dict()))
    monkeypatch.setattr("nsa_hf.recipes.training.loop.final_states", interrupted)
    assert main([str(run)]) == 130
    assert "stopped: the same command goes on" in capsys.readouterr().err


def start(config, folder: Path) -> subprocess.Popen:
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump(config.as_dict()))
    command = [sys.executable, "-m", "nsa_hf.recipes.train", str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def test_killed_and_started_again_it_ends_with_the_same_weights(nsa_dir, texts, tmp_path):
    settings = {"steps": 7, "save_every": 2, "accumulate": 2}
    undisturbed = train(tiny_run(nsa_dir, texts, tmp_path / "undisturbed", **settings))
    config = tiny_run(nsa_dir, texts, tmp_path / "disturbed", **settings)
    out, work = Path(config.out), Path(config.out + ".unfinished")
    first_steps = []
    for kill_at in ("step 3/7", "step 6/7", None):
        process = start(config, tmp_path)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if kill_at and line.startswith(kill_at):
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == (-signal.SIGKILL if kill_at else 0)
        assert out.exists() == (kill_at is None)
        assert work.exists() == (kill_at is not None)
        first_steps.append(next(line.split()[1] for line in lines if line.startswith("step ")))
    # it went on, and did not start over
    assert first_steps == ["1/7", "3/7", "5/7"] or first_steps == ["1/7", "3/7", "7/7"]
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    figures = ("step", "loss", "ce", "kl", "grad_norm", "lr_nsa", "lr_backbone")
    curves = [
        [{key: row[key] for key in figures} for row in result_of(folder)["curve"]] for folder in (out, undisturbed)
    ]
    assert curves[0] == curves[1]
    assert result_of(out)["held_out"] == result_of(undisturbed)["held_out"]


@pytest.fixture
def stopped(monkeypatch):
    """Runs a run until it has saved a checkpoint at step `at`, and stops it there."""

    def run_until(config, at):
        save = Checkpoints.save

        def save_and_stop(self, accelerator, step, state):
            save(self, accelerator, step, state)
            if step == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Checkpoints, "save", save_and_stop)
            train(config)
        return Path(f"{config.out}.unfinished")

    return run_until


def test_an_unfinished_run_is_not_continued_with_other_settings(nsa_dir, texts, tmp_path, stopped, capsys):
    stopped(tiny_run(nsa_dir, texts, tmp_path / "out"), at=2)
    assert "stopped: the same command goes on from the last checkpoint" in capsys.readouterr().err
    with pytest.raises(RunFolderError, match=r"lr_nsa: 0.01 -> 0.02"):
        train(tiny_run(nsa_dir, texts, tmp_path / "out", lr_nsa=0.02))


def edit_text(model, texts, held_out):
    (texts / "3.txt").write_text((texts / "3.txt").read_text().replace("which", "witch"))


def edit_held_out(model, texts, held_out):
    (held_out / "0.txt").write_text("a" + (held_out / "0.txt").read_text()[1:])


def edit_tokenizer(model, texts, held_out):
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    path.write_text(json.dumps(tokenizer))


def edit_weights(model, texts, held_out):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def edit_config(model, texts, held_out):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "nsa_topk": config["nsa_topk"] + 1}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_text, "the training text, data=.* has changed"),
        (edit_held_out, "the held-out text, held_out=.* has changed"),
        (edit_tokenizer, "the tokenizer in .* has changed"),
        (edit_weights, "the weights in .* have changed"),
        (edit_config, "config.json in .* has changed"),
    ],
)
def test_a_run_goes_on_only_with_what_it_began_with(nsa_dir, tmp_path, stopped, edit, message):
    model = shutil.copytree(nsa_dir, tmp_path / "nsa")
    texts, held_out = write_texts(tmp_path / "texts"), write_texts(tmp_path / "held_out", seed=1)
    config = tiny_run(model, texts, tmp_path / "out", held_out=str(held_out))
    stopped(config, at=2)
    edit(model, texts, held_out)
    with pytest.raises(RunFolderError, match=message):
        train(config)
    assert not Path(config.out).exists()


def test_a_damaged_checkpoint_is_not_gone_on_from(nsa_dir, texts, tmp_path, stopped, capsys, finished):
    """It ends with the weights of an undisturbed run all the same."""
    config = tiny_run(nsa_dir, texts, tmp_path / "out", save_every=1)
    work = stopped(config, at=3)
    for file in ("model.safetensors", "optimizer.bin"):
        path = work / "checkpoints" / "step-00000003" / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    out = train(config)
    said = capsys.readouterr()
    assert "step-00000003 is damaged (model.safetensors, optimizer.bin not as written)" in said.err
    assert f"going on from {work / 'checkpoints' / 'step-00000002'}" in said.out
    assert (out / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_a_state_of_more_steps_than_the_run_has_ends_nothing(nsa_dir, texts, tmp_path, stopped):
    config = tiny_run(nsa_dir, texts, tmp_path / "out")
    checkpoint = stopped(config, at=2) / "checkpoints" / "step-00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "step": 99}))
    with pytest.raises(NsaError, match=r"damaged \(step-00000002: state.json not as written\)"):
        train(config)
    # and when all that says so agrees
    noted = json.loads((checkpoint / "files.json").read_text())
    noted["files"]["state.json"] = hash_file(checkpoint / "state.json")
    (checkpoint / "files.json").write_text(json.dumps(noted))
    checkpoint.rename(checkpoint.with_name("step-00000099"))
    with pytest.raises(TrainingError, match="step-00000099 says that 99 of 4 steps are done"):
        train(config)
    assert not Path(config.out).exists()


def test_two_at_once_on_one_out(nsa_dir, texts, tmp_path, monkeypatch):
    config = tiny_run(nsa_dir, texts, tmp_path / "out")
    steps = run_steps

    def the_other_comes(*args):
        with pytest.raises(RunFolderError, match=r"another process trains .*out now: wait until it is done"):
            train(config)
        steps(*args)

    monkeypatch.setattr("nsa_hf.recipes.training.loop.run_steps", the_other_comes)
    assert [row["step"] for row in result_of(train(config))["curve"]] == [1, 2, 3, 4]


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
    with pytest.raises(TrainingError, match=message):
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


def test_attention_dropout_is_refused_before_anything_is_computed(tmp_path, tiny_sizes, texts, monkeypatch):
    dense = tiny_dense_model(attention_dropout=0.1)
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    model = converted(tmp_path / "dense", tmp_path / "nsa", tiny_sizes)
    monkeypatch.setattr("nsa_hf.recipes.training.loop.final_states", None)
    with pytest.raises(TrainingError, match=r"attention_dropout is 0.1, .* has no dropout: set it to 0"):
        train(tiny_run(model, texts, tmp_path / "out"))
    assert not (tmp_path / "out.unfinished").exists()


def test_weights_that_give_nan_are_named(nsa_dir, texts, tmp_path, monkeypatch):
    """Before training, and after it, when the last step was one too far."""
    model = shutil.copytree(nsa_dir, tmp_path / "nsa")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match=r"logits are not finite \(positions 0-64, 64-128\)"):
        train(tiny_run(model, texts, tmp_path / "out"))
    steps = run_steps

    def too_far(accelerator, model, optimizer, loader, student, *others):
        steps(accelerator, model, optimizer, loader, student, *others)
        student.get_input_embeddings().weight.data.fill_(float("inf"))

    monkeypatch.setattr("nsa_hf.recipes.training.loop.run_steps", too_far)
    with pytest.raises(NsaError, match="logits are not finite"):
        train(tiny_run(nsa_dir, texts, tmp_path / "out", save_every=0))
    assert [path.name for path in tmp_path.iterdir()] == ["nsa"]


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
    with pytest.raises(RunFolderError, match="processes: 2 -> 1"):
        train(two)


def test_errors_are_of_the_packages_kind():
    assert issubclass(TrainingError, NsaError)
    assert issubclass(RunFolderError, NsaError)
