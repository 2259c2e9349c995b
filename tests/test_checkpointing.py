import random

import pytest
import torch
from accelerate import Accelerator

from nsa_hf.recipes.checkpointing import CheckpointingError, Checkpoints


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

    monkeypatch.setattr("nsa_hf.recipes.checkpointing.write_json", killed)
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


def test_damage_is_named(prepared, tmp_path):
    accelerator = prepared[0]
    checkpoints = Checkpoints(tmp_path, keep=9)
    for number, (file, content) in enumerate(
        [("model.safetensors", b"x"), ("state.json", b"{"), ("optimizer.bin", b"")]
    ):
        path = checkpoints.save(accelerator, number, {})
        (path / file).write_bytes(content)
        with pytest.raises(CheckpointingError, match="cannot be read, remove it"):
            checkpoints.restore(accelerator, path)


def test_missing_random_numbers_are_not_passed_over(prepared, tmp_path):
    path = Checkpoints(tmp_path, keep=2).save(prepared[0], 1, {})
    (path / "random_states_0.pkl").unlink()
    with pytest.raises(CheckpointingError, match="does not hold this process's random numbers"):
        Checkpoints(tmp_path, keep=2).restore(prepared[0], path)


def test_a_folder_that_cannot_be_written_is_named(prepared, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointingError, match="cannot write the checkpoint"):
        Checkpoints(tmp_path / "file", keep=2).save(prepared[0], 1, {})
