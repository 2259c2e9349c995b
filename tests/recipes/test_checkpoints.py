import random
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.checkpoints import FILES, Checkpoints


@pytest.fixture
def prepared():
    """An accelerator with a small model and its optimizer, one step taken."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    step(accelerator, model, optimizer)
    return accelerator, model, optimizer


def step(accelerator, model, optimizer):
    accelerator.backward(model(torch.randn(4, 3)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_follows_a_restored_checkpoint_is_what_followed_it_before(prepared, tmp_path):
    accelerator, model, optimizer = prepared
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(accelerator, 1, {"curve": [0.5]})
    outcomes = []
    for _ in range(2):
        outcomes.append((random.random(), torch.rand(2)))
        step(accelerator, model, optimizer)
        outcomes[-1] += ([p.detach().clone() for p in model.parameters()],)
        assert checkpoints.restore(accelerator, path) == {"step": 1, "curve": [0.5]}
    first, second = outcomes
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    for a, b in zip(first[2], second[2], strict=True):
        assert torch.equal(a, b)


def test_the_last_few_are_kept(prepared, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for number in (5, 10, 15, 100):
        checkpoints.save(prepared[0], number, {})
    assert names(tmp_path) == ["step-00000015", "step-00000100"]
    assert checkpoints.latest() == tmp_path / "step-00000100"


def test_a_checkpoint_that_was_not_finished_does_not_count(prepared, tmp_path, monkeypatch):
    accelerator = prepared[0]
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(accelerator, 1, {})

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("nsa_hf.recipes.training.checkpoints.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(accelerator, 2, {})
    assert names(tmp_path) == [".step-00000002.unfinished", "step-00000001"]
    assert checkpoints.latest() == tmp_path / "step-00000001"
    monkeypatch.undo()
    checkpoints.save(accelerator, 3, {})
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_the_same_step_can_be_saved_again(prepared, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(prepared[0], 1, {"curve": [1]})
    path = checkpoints.save(prepared[0], 1, {"curve": [2]})
    assert checkpoints.restore(prepared[0], path)["curve"] == [2]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin", "state.json", "files.json"]
)
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(prepared, tmp_path, capsys, file, damage):
    accelerator, _, optimizer = prepared
    accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer))
    checkpoints = Checkpoints(tmp_path, keep=2)
    first, second = (checkpoints.save(accelerator, step, {"curve": [1.0] * step}) for step in (10, 20))
    assert checkpoints.latest() == second
    damage(second / file)
    assert checkpoints.latest() == first
    assert f"{second} is damaged ({file}" in (said := capsys.readouterr().err) or f"/{file}'" in said or file == FILES
    assert f"going on from {first}" in said
    damage(first / file)
    with pytest.raises(NsaError, match=r"every checkpoint in .*: remove that folder"):
        checkpoints.latest()


def test_what_was_passed_over_goes_with_the_next_save(prepared, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20):
        checkpoints.save(prepared[0], step, {})
    flip_a_bit(tmp_path / "step-00000020" / "model.safetensors")
    checkpoints.save(prepared[0], 15, {})
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_a_state_of_another_step_than_its_name_says_is_damage(prepared, tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep=2)
    first, second = (checkpoints.save(prepared[0], step, {}) for step in (10, 20))
    second.rename(tmp_path / "step-00000090")
    assert checkpoints.latest() == first
    assert "step-00000090 is damaged (state.json is of step 20)" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(prepared, tmp_path):
    path = Checkpoints(tmp_path, keep=2).save(prepared[0], 1, {})
    (path / "optimizer.bin").write_bytes(b"")
    with pytest.raises(NsaError, match="cannot be read, remove it"):
        Checkpoints(tmp_path, keep=2).restore(prepared[0], path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json"])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(prepared, tmp_path, file):
    """No file may be as large as `file`, which safetensors, PyTorch (without naming the cause) or we then find out."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = {"curve": [1.0] * 5000}
    first = checkpoints.save(prepared[0], 10, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((first / file).stat().st_size - 1, limits[1]))
    try:
        with pytest.raises(NsaError) as raised:
            checkpoints.save(prepared[0], 20, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = str(raised.value)
    assert re.fullmatch(r"cannot write the checkpoint \S*step-00000020 \(.*; [0-9,]+ MB are free there\): .*", said)
    assert names(tmp_path) == [first.name]
    assert checkpoints.latest() == first
    second = checkpoints.save(prepared[0], 20, state)
    assert checkpoints.latest() == second


def test_a_kill_while_pruning_leaves_no_half_of_a_checkpoint(prepared, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(prepared[0], step, {})
    rmtree = shutil.rmtree

    def killed(path, **options):
        if path.name == ".step-00000001.unfinished":
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(prepared[0], 3, {})
    assert [path.name for path in checkpoints.finished()] == ["step-00000002", "step-00000003"]


def test_missing_random_numbers_are_not_passed_over(prepared, tmp_path):
    path = Checkpoints(tmp_path, keep=2).save(prepared[0], 1, {})
    (path / "random_states_0.pkl").unlink()
    with pytest.raises(NsaError, match="does not hold this process's random numbers"):
        Checkpoints(tmp_path, keep=2).restore(prepared[0], path)


def test_a_folder_that_cannot_be_written_is_named(prepared, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NsaError, match="cannot write the checkpoint"):
        Checkpoints(tmp_path / "file", keep=2).save(prepared[0], 1, {})
