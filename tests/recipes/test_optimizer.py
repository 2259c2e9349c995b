import pytest
import torch
from torch import nn

from nsa_hf.recipes.training.config import make_run_config
from nsa_hf.recipes.training.optimizer import make_optimizer, rate_factor, set_rates


def run(**settings):
    return make_run_config({"model": "a", "out": "b", **settings})


class Toy(nn.Module):
    """Parameters under the names that matter."""

    def __init__(self):
        super().__init__()
        self.nsa = nn.Linear(2, 2)
        self.layer = nn.ModuleDict({"nsa": nn.Linear(2, 2), "proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})


def test_every_trained_parameter_is_in_one_group():
    model = Toy()
    model.nsa.requires_grad_(False)
    optimizer = make_optimizer(model, run(lr_nsa=1.0, lr_backbone=0.5, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: (sorted(names[id(p)] for p in group["params"]), group) for group in optimizer.param_groups}
    assert groups["nsa"][0] == ["layer.nsa.bias", "layer.nsa.weight"]
    assert groups["backbone"][0] == ["layer.proj.weight"]
    assert groups["backbone_vectors"][0] == ["layer.norm.bias", "layer.norm.weight", "layer.proj.bias"]
    assert [groups[name][1]["lr"] for name in ("nsa", "backbone", "backbone_vectors")] == [1.0, 0.5, 0.5]
    assert [groups[name][1]["weight_decay"] for name in ("nsa", "backbone", "backbone_vectors")] == [0.0, 0.1, 0.0]


def test_the_rates_rise_and_fall():
    config = run(steps=10, warmup_steps=3, min_lr_ratio=0.1)
    factors = [rate_factor(step, config) for step in range(10)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[6] == pytest.approx(0.55)
    assert factors[9] == pytest.approx(0.1)


def test_stable_rates_decay_at_the_end():
    config = run(steps=20, warmup_steps=2, min_lr_ratio=0.0, schedule="wsd", decay_share=0.2)
    factors = [rate_factor(step, config) for step in range(20)]
    assert factors[:2] == pytest.approx([1 / 3, 2 / 3])
    assert factors[2:16] == [1.0] * 14
    assert factors[15:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 3), (3, 3), (2, 1)])
def test_short_runs_have_rates_too(steps, warmup, schedule):
    config = run(steps=steps, warmup_steps=warmup, schedule=schedule)
    assert all(0 < rate_factor(step, config) <= 1 for step in range(steps))


def test_rates_depend_on_the_step_alone():
    config = run(steps=10, lr_nsa=1.0, lr_backbone=0.5)
    one, other = (make_optimizer(Toy(), config) for _ in range(2))
    for step in range(7):
        set_rates(one, step, config)
    assert set_rates(other, 6, config) == set_rates(one, 6, config)
    assert [group["lr"] for group in one.param_groups] == [group["lr"] for group in other.param_groups]
    assert isinstance(one, torch.optim.AdamW)
