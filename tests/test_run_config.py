from dataclasses import fields

import pytest

from nsa_hf.recipes.run_config import RunConfig, RunConfigError, load_run_config, settings_help


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


def test_as_dict_builds_the_same_config(run_file):
    config = load_run_config(run_file)
    assert RunConfig(**config.as_dict()) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "unknown setting 'stpes'; did you mean steps"),
        ("zzzz=3", "unknown setting 'zzzz'; settings are model"),
        ("steps=many", "steps must be a whole number, got 'many'"),
        ("steps=1.5", "steps must be a whole number"),
        ("steps=true", "steps must be a whole number, got True"),
        ("lr_nsa=fast", "lr_nsa must be a number"),
        ("lr_nsa=-1", "lr_nsa must be finite and at least 0"),
        ("lr_nsa=.nan", "lr_nsa must be finite"),
        ("deterministic=1", "deterministic must be true or false"),
        ("steps=0", "steps must be finite and at least 1"),
        ("beta2=1", "beta2 must be below 1"),
        ("max_grad_norm=0", "max_grad_norm must be above 0"),
        ("mixed_precision=int4", "mixed_precision must be"),
        ("steps", "an override is key=value, got 'steps'"),
        ("steps=[", "cannot read the value of steps"),
        ("out=", "no value for out"),
    ],
)
def test_wrong_overrides_are_named(run_file, override, message):
    with pytest.raises(RunConfigError, match=message.replace("[", r"\[")):
        load_run_config(run_file, [override])


def test_a_run_without_any_loss_is_refused(run_file):
    with pytest.raises(RunConfigError, match="there is no loss"):
        load_run_config(run_file, ["ce_weight=0", "kl_weight=0"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run file"),
        ("- 1\n", "name: value"),
        ("a: [", "cannot read the run file"),
        ("steps: 3", "no value for"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunConfigError, match=message):
        load_run_config(path)


def test_help_lists_every_setting_once():
    lines = settings_help().splitlines()
    assert [line.split(":")[0] for line in lines] == [f.name for f in fields(RunConfig)]
