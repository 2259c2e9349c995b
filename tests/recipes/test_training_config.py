import time
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase

import pytest

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.config import RunConfig, load_run_config, make_run_config, settings_help

RUNS = Path(__file__).resolve().parents[2] / "recipes" / "runs"


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: a\nout: b\nsteps: 7\nlr_nsa: 1e-3\nmixed_precision: no\n")
    return path


def test_file_and_overrides(run_file):
    config = load_run_config(run_file, ["steps=9", "lr_backbone=2e-5", "model=x=y", "deterministic=false"])
    assert (config.model, config.out, config.steps) == ("x=y", "b", 9)
    assert (config.lr_nsa, config.lr_backbone) == (1e-3, 2e-5)
    assert config.mixed_precision == "no"
    assert config.deterministic is False


def test_the_users_folder_is_found(run_file, monkeypatch):
    monkeypatch.setenv("HOME", "/of/mine")
    config = load_run_config(run_file, ["model=~/a", "held_out=~/b"])
    assert (config.model, config.held_out) == ("/of/mine/a", "/of/mine/b")


def test_as_dict_builds_the_same_config(run_file):
    config = load_run_config(run_file)
    assert RunConfig(**config.as_dict()) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "unknown setting 'stpes'; did you mean steps"),
        ("zzzz=3", "unknown setting 'zzzz'; settings: nsa-hf train --help"),
        ("steps=many", "steps must be a whole number, got 'many'"),
        ("steps=1.5", "steps must be a whole number"),
        ("steps=true", "steps must be a whole number, got True"),
        ("lr_nsa=fast", "lr_nsa must be a number"),
        ("lr_nsa=-1", "lr_nsa must be finite and at least 0"),
        ("lr_nsa=.nan", "lr_nsa must be finite"),
        ("deterministic=1", "deterministic must be true or false"),
        ("steps=-1", "steps must be finite and at least 0"),
        ("steps=0", "steps and tokens are both 0"),
        ("tokens=1e6", "tokens must be a whole number, got '1e6'"),
        ("length=1", "length must be finite and at least 2"),
        ("length=[]", "length must be a whole number or a list like"),
        ("length=[{length: 1}]", "length must be finite and at least 2"),
        ("length=[{length: 9, wieght: 1}]", "length, entry 1: unknown 'wieght'; an entry has length and weight"),
        ("data=[{source: a}, {weight: 1}]", "data, entry 2: expected {source: ..., weight: 1}"),
        ("data=[{source: a, weight: 0}]", "data, entry 1: weight must be above 0"),
        ("data=[{source: 3}]", "data, entry 1: source must be text, got 3"),
        ("trains=q", "trains must be 'all', 'nsa', 'qkvo', 'qk' or 'lora', got 'q'"),
        ("topk_start=all", "topk_start and topk_steps go together"),
        ("topk_start=many", "topk_start must be a whole number or 'all'"),
        ("trackers=[1]", "trackers must be a list of names"),
        ("decay_share=1.5", "decay_share is a share of the steps"),
        ("stages={steps: 3}", "stages must be a list, of each stage"),
        ("stages=[3]", "stages must be a list, of each stage"),
        ("stages=[{steps: 3}, {stpes: 3}]", "stage 2: unknown setting 'stpes'; did you mean steps"),
        ("stages=[{steps: 3}, {seed: 3}]", "stage 2: seed is the whole run's: write it beside stages"),
        ("stages=[{lr_nsa: -1}]", "stage 1: lr_nsa must be finite and at least 0"),
        ("stages=[{steps: 3, tokens: 3}]", "stage 1: steps=3 and tokens=3 both say how long to train"),
        ("keep=1", "keep must be finite and at least 2"),
        ("steps=1000000000000000000", "steps must be at most 4294967295, got 1000000000000000000"),
        ("length=99999999999", "length must be at most 4294967295"),
        ("seed=4294967296", "seed must be at most 4294967295"),
        (f"steps={'9' * 5000}", "cannot read the value of steps"),
        (f"steps=0x{'f' * 5000}", "steps must be at most 4294967295, got a number of 20000 bits"),
        (f"lr_nsa=0x{'f' * 5000}", "lr_nsa must be finite and at least 0, got inf"),
        ("lr_nsa=1e400", "lr_nsa must be finite and at least 0, got inf"),
        ("steps=2001-99-99", "cannot read the value of steps"),
        ("steps=2001-09-09", "steps must be a whole number, got datetime.date"),
        ("steps=[1, 2]", "steps must be a whole number, got [1, 2]"),
        ("steps={a: 1}", "steps must be a whole number, got {'a': 1}"),
        (f"steps={'[' * 5000}", "line 1: nested deeper than 50"),
        ("steps=!!python/name:os.system 3", "cannot read the value of steps"),
        ("beta2=1", "beta2 must be below 1"),
        ("max_grad_norm=0", "max_grad_norm must be above 0"),
        ("max_grad_norm=.nan", "max_grad_norm must be above 0, got nan"),
        ("lr_backbone=1e39", "lr_backbone must be at most 1e.30, got 1e"),
        ("mixed_precision=int4", "mixed_precision must be"),
        ("steps", "an override is key=value, got 'steps'"),
        ("steps=[", "cannot read the value of steps"),
        ("steps='", "cannot read the value of steps"),
        ("out=", "no value for out"),
    ],
)
def test_wrong_overrides_are_named(run_file, override, message):
    with pytest.raises(NsaError, match=message.replace("[", r"\[").replace("{", r"\{")) as raised:
        load_run_config(run_file, [override])
    assert len(str(raised.value)) < 500


def test_a_run_without_any_loss_is_refused(run_file):
    with pytest.raises(NsaError, match="there is no loss"):
        load_run_config(run_file, ["kl_weight=0"])


def test_a_control_needs_a_loss_of_its_own(run_file):
    with pytest.raises(NsaError, match="its own teacher, from which there is nothing to learn"):
        load_run_config(run_file, ["attention=dense"])
    with pytest.raises(NsaError, match="attention 'dense' with selector_weight"):
        load_run_config(run_file, ["attention=dense", "ce_weight=1", "selector_weight=1"])
    assert load_run_config(run_file, ["attention=dense", "teacher_dtype=bfloat16"]).ce_weight == 0


def test_without_a_teacher_nothing_is_learned_from_it(run_file):
    with pytest.raises(NsaError, match=r"teacher 'none' with kl_weight 1\.0: there is nobody to learn from"):
        load_run_config(run_file, ["teacher=none", "ce_weight=1"])
    with pytest.raises(NsaError, match="teacher 'none' with layer_weight"):
        load_run_config(run_file, ["teacher=none", "ce_weight=1", "kl_weight=0", "layer_weight=0.5"])


def test_a_run_that_trains_nothing_is_refused(run_file):
    with pytest.raises(NsaError, match="both 0: nothing is trained"):
        load_run_config(run_file, ["lr_nsa=0", "lr_backbone=0"])


def test_stages_are_what_differs(run_file):
    stages = (
        "stages=[{trains: nsa, tokens: 5000}, {lr_backbone: 1e-6, length: [{length: 48}, {length: 96, weight: 2}]}]"
    )
    config = load_run_config(run_file, [stages])
    first, second = config.of_stages()
    assert (first.trains, first.tokens, first.steps, first.lr_nsa) == ("nsa", 5000, 0, 1e-3)
    assert (second.trains, second.tokens, second.steps, second.lr_backbone) == ("all", 0, 7, 1e-6)
    assert second.length == [{"length": 48, "weight": 1.0}, {"length": 96, "weight": 2.0}]
    assert (first.longest, second.longest) == (2048, 96)
    assert RunConfig(**config.as_dict()) == config


@pytest.mark.parametrize("length", [-5, 0, 1, 50])
def test_lengths_of_a_mixture_divide_the_longest(run_file, length):
    with pytest.raises(NsaError, match=f"divides the longest, 96, so that all batches have as many.*got {length}$"):
        load_run_config(run_file, [f"length=[{{length: {length}}}, {{length: 96}}]"])


def test_an_override_of_what_every_stage_sets_is_refused(run_file):
    run_file.write_text(run_file.read_text() + "stages: [{tokens: 50, lr_nsa: 1e-4}, {tokens: 60}]\n")
    for override in ("steps=2", "tokens=9"):
        with pytest.raises(NsaError, match=r"changes nothing: every stage in .* has its own"):
            load_run_config(run_file, [override])
    first, second = load_run_config(run_file, ["lr_nsa=1e-2"]).of_stages()
    assert (first.lr_nsa, second.lr_nsa) == (1e-4, 1e-2)
    assert load_run_config(run_file, ["stages=[]", "steps=2"]).steps == 2


def test_without_stages_a_run_is_one(run_file):
    config = load_run_config(run_file)
    assert config.of_stages() == [config]


def test_tokens_take_the_place_of_steps(run_file):
    config = load_run_config(run_file, ["tokens=300"])
    assert (config.tokens, config.steps) == (300, 0)
    assert make_run_config(config.as_dict()) == config
    with pytest.raises(NsaError, match="both say how long to train"):
        load_run_config(run_file, ["tokens=300", "steps=2"])


def test_a_mixture_of_texts(run_file, monkeypatch):
    monkeypatch.setenv("HOME", "/of/mine")
    config = load_run_config(run_file, ["data=[{source: ~/a, weight: 2}, {source: stdlib}]", "trackers=wandb"])
    assert config.data == [{"source": "/of/mine/a", "weight": 2.0}, {"source": "stdlib", "weight": 1.0}]
    assert config.trackers == ["wandb"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run file"),
        ("- 1\n", "name: value"),
        ("a: '", "cannot read the run file"),
        ("steps: 3", "no value for"),
        ("", "name: value"),
        ("model: [a, b]\n", r"model must be text, got \['a', 'b'\]"),
        ("out: b\nmodel: {a: b}\n", "model must be text, got {'a': 'b'}"),
        ("model: &a x\nout: *a\n", r"line 2: an alias \(\*a\), in whose place"),
        ("model: a\nout: b\nmodel: c\n", "line 3: model is given twice"),
        ("model: a\nout: b\n---\nsteps: 3\n", "but found another document"),
        ("? [a]\n: 1\n", "found unhashable key"),
        ("steps: !unknown 3", "cannot read the run file"),
        ("steps: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (f"steps: {'9' * 5000}", "cannot read the run file"),
        ("model: a\0b", "cannot read the run file"),
        ("a" * 200_000, "it has more than 65,536 characters"),
        # each alone takes minutes, or all memory, once it is put together or shown
        ("steps: " + "[" * 5000 + "]" * 5000, "line 1: nested deeper than 50"),
        (
            "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(ascii_lowercase)),
            "line 2: an alias",
        ),
        ("<<: &a {steps: 3}\n" + "<<: [*a, *a]\n", "line 2: an alias"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    began = time.perf_counter()
    with pytest.raises(NsaError, match=message) as raised:
        load_run_config(path)
    assert time.perf_counter() - began < 1
    assert len(str(raised.value)) < 500


def test_a_file_without_an_end_is_not_read_to_it():
    with pytest.raises(NsaError, match="it has more than 65,536 characters"):
        load_run_config("/dev/zero")


def test_help_lists_every_setting_once():
    lines = settings_help().splitlines()
    assert [line.split(":")[0] for line in lines] == [f.name for f in fields(RunConfig)]


@pytest.mark.parametrize("path", sorted(RUNS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_can_be_read(path):
    config = load_run_config(path, ["model=a", "out=b"])
    assert config.tokens or config.steps


@pytest.mark.parametrize("path", sorted((RUNS / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_ablation_differs_in_little(path):
    base = load_run_config(RUNS / "ablations" / "base.yaml", ["model=a", "out=b"]).as_dict()
    other = load_run_config(path, ["model=a", "out=b"]).as_dict()
    assert len([name for name in base if base[name] != other[name]]) <= 3
