import inspect
import io
import json
import os
import resource
import subprocess
import sys
from typing import get_args

import pytest
import typer.main
from tiny_runs import converted, write_texts

import nsa_hf
from nsa_hf.errors import NsaError
from nsa_hf.fields import FOUND_FIELDS, NSA_FIELDS
from nsa_hf.recipes.cli import main, run
from nsa_hf.recipes.commands.app import app, versions
from nsa_hf.recipes.commands.converting import convert
from nsa_hf.recipes.nsa_options import NSA_OPTIONS, options_of

COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def nsa_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    return converted(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes)


def fails(capsys, arguments, message, code=2):
    assert run([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_help_names_every_command(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("plan", "convert", "verify", "train", "eval", "inspect", "generate", "card", "demo"):
        assert f"\n  {name} " in text
    # no line is cut short
    assert "..." not in text.split("Commands:")[1]
    assert "Exit codes" in text


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_parameter_explains_itself(name, capsys):
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 5
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_letters_that_the_output_has_not_are_written_out(nsa_dir, monkeypatch):
    """As where it goes into a file of an older encoding."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    with pytest.raises(SystemExit) as left:
        main(["generate", str(nsa_dir), "--prompt", "hello", "--max-new-tokens", "12", "--device", "cpu"])
    assert left.value.code == 0
    assert b"\\ufffd" in written.getvalue()  # half a character, by the byte tokenizer


def test_train_help_names_the_settings(capsys):
    run(["train", "--help"])
    text = capsys.readouterr().out
    assert "lr_backbone: peak rate of all other parameters" in text
    assert "warmup_steps" in text


def test_no_arguments_show_the_help(capsys):
    run([])
    captured = capsys.readouterr()
    assert "Commands:" in captured.out + captured.err


def test_nsa_options_are_the_configs_fields(tiny_nsa_model):
    config = tiny_nsa_model().config
    assert set(NSA_OPTIONS) == set(NSA_FIELDS) - {*FOUND_FIELDS} <= set(config.to_dict())
    parameters = {parameter.name: parameter for parameter in COMMANDS["convert"].params}
    assert "counted [n] [default: 16]" in parameters["nsa_topk"].help
    types = {"nsa_topk": int, "nsa_gate_blend": float, "nsa_gate": str, "nsa_dense_layers": str}
    signature = inspect.signature(convert)
    assert {name: get_args(signature.parameters[name].annotation)[0] for name in types} == {
        name: kind | None for name, kind in types.items()
    }


def test_every_command_gives_its_result_as_json():
    options = {name: {option for one in command.params for option in one.opts} for name, command in COMMANDS.items()}
    assert [name for name in COMMANDS if "--json" not in options[name]] == []


def alone(capsys, arguments):
    """The one JSON object that a command leaves on standard output, and what it said beside."""
    assert run([str(argument) for argument in [*arguments, "--json"]]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_results_as_json_stand_alone(tiny_dense_dir, tiny_sizes, nsa_dir, tmp_path, capsys):
    out = tmp_path / "out"
    result, said = alone(capsys, ["convert", tiny_dense_dir, out])
    assert result["out"] == str(out) and result["next"] == f"nsa-hf verify {tiny_dense_dir} {out}"
    assert result["choices"] == json.loads((out / "manifest.json").read_text())["choices"]
    assert "converted model:" in said and result["uploaded"] is None
    result, said = alone(capsys, ["generate", nsa_dir, "--prompt", "hello", "--max-new-tokens", "3", "--device", "cpu"])
    assert result["new_tokens"] == 3 and "3 new]" in said
    result, _ = alone(capsys, ["card", nsa_dir])
    assert result == {"card": str(nsa_dir / "README.md")}
    report, _ = alone(capsys, ["export-dense", nsa_dir, tmp_path / "dense"])
    assert report["tensors"] == report["as_in_source"]
    run_file, trained = tmp_path / "run.yaml", tmp_path / "trained"
    texts = write_texts(tmp_path / "texts")
    run_file.write_text(f"data: {texts}\nheld_out: {texts}\nlength: 100\nsteps: 1\nheld_out_documents: 1\n")
    for word in ("before training", "finished: nothing to do"):
        result, said = alone(capsys, ["train", run_file, f"model={nsa_dir}", f"out={trained}"])
        assert result == {"out": str(trained), **json.loads((trained / "training.json").read_text())} and word in said


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_every_field_is_an_option(command):
    options = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in NSA_OPTIONS} <= options


def test_given_options():
    assert options_of({"nsa_topk": 4, "nsa_gate": None, "nsa_dense_layers": "0, 1,-1"}) == {
        "nsa_topk": 4,
        "nsa_dense_layers": [0, 1, -1],
    }
    with pytest.raises(NsaError, match="a list such as 0,1,-1, got 'x'"):
        options_of({"nsa_dense_layers": "x"})


def test_plan_convert_verify(tiny_dense_dir, tmp_path, capsys):
    sizes = ["--nsa-kernel-size", "8", "--nsa-kernel-stride", "4", "--nsa-block-size", "16", "--nsa-topk", "4"]
    out = tmp_path / "out"
    assert run(["plan", str(tiny_dense_dir), "--json", *sizes, "--nsa-dense-layers", "0"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["exact_up_to"] == 64
    assert plan["layers"][0]["becomes"] == "dense"
    assert run(["convert", str(tiny_dense_dir), str(out), *sizes, "--nsa-dense-layers", "0"]) == 0
    assert f"next: nsa-hf verify {tiny_dense_dir} {out}" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["nsa_dense_layers"] == [0]
    text = write_texts(tmp_path / "texts") / "0.txt"
    assert run(["verify", str(tiny_dense_dir), str(out), "--length", "128", "--text", str(text)]) == 0
    assert "0.txt" in capsys.readouterr().out
    verified = json.loads((out / "verify.json").read_text())
    assert verified["exact"] is True and verified["other_selector"] is None
    command = ["verify", str(tiny_dense_dir), str(out), "--length", "128", "--text", str(text)]
    assert run([*command, "--compare-selectors"]) == 0
    assert "channels (4)" in capsys.readouterr().out
    fails(capsys, ["convert", tiny_dense_dir, out], "--overwrite")


def test_plan_measures_and_keeps_it(tiny_dense_dir, tmp_path, capsys):
    sizes = ["--nsa-kernel-size", "8", "--nsa-kernel-stride", "4", "--nsa-block-size", "16", "--nsa-topk", "4"]
    command = ["plan", str(tiny_dense_dir), *sizes, "--device", "cpu", "--measure-tokens", "150"]
    saved = tmp_path / "kept" / "here"
    texts = write_texts(tmp_path / "texts")
    assert run([*command, "--measure", str(texts), "--measure-documents", "1", "--save", str(saved), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["measured"]["documents"] == [{"name": "0.txt", "tokens": 150}]
    assert json.loads((saved / "plan.json").read_text()) == plan
    assert (saved / "layers.png").read_bytes().startswith(b"\x89PNG")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", "long " * 50, "longer " * 50)))
    assert run([*command, "--measure", str(rows)]) == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:1 (150 tokens)" in shown and "KL with one layer sparse" in shown
    fails(capsys, [*command, "--save", saved], "give --measure TEXT too")
    fails(capsys, [*command, "--measure", rows, "--save", rows], "is a file: expected a folder")
    fails(capsys, [*command, "--measure", tmp_path / "none"], "no text at")
    (tmp_path / "short.txt").write_text("short")
    fails(capsys, [*command, "--measure", tmp_path / "short.txt"], "the longest of 1 has 5")


def test_convert_says_what_it_chose_and_help_that_it_does(tiny_dense_dir, tmp_path, capsys):
    assert run(["convert", str(tiny_dense_dir), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("blocks are scored by: channels, 4 of each head in 8 bits (starts much nearer")
    assert [line.partition(":")[0] for line in lines[1:4]] == [
        "compressed branch",
        "selected blocks",
        "layers left dense",
    ]
    assert run(["card", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n- blocks are scored by: channels, 4 of each head in 8 bits (starts much nearer" in card
    assert "Every query reads 16 selected blocks of 64 tokens" in card and "`nsa_selector` channels" in card
    parameters = {parameter.name: parameter for parameter in COMMANDS["convert"].params}
    for name in ("nsa_selector", "nsa_compression"):
        assert parameters[name].help.endswith("[default: as recommended, see plan]")
    assert "--nsa-selector compressed is the paper's way" in " ".join(COMMANDS["convert"].help.split())


def test_a_conversion_that_is_not_exact_exits_with_1(tiny_dense_dir, tiny_sizes, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    out = converted(tiny_dense_dir, tmp_path / "out", tiny_sizes)
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert run(["verify", str(tiny_dense_dir), str(out), "--length", "100", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["exact"] is False


def test_eval_inspect_and_card(nsa_dir, tmp_path, capsys):
    texts = write_texts(tmp_path / "texts")
    assert run(["eval", str(nsa_dir), "--length", "128", "--text", str(texts), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((nsa_dir / "eval.json").read_text())
    assert run(["inspect", str(nsa_dir), "--length", "128", "--text", str(texts / "0.txt")]) == 0
    assert "0.txt" in capsys.readouterr().out
    assert run(["card", str(nsa_dir)]) == 0
    assert f"model card: {nsa_dir / 'README.md'}" in capsys.readouterr().out


def test_wrong_input_is_one_line(nsa_dir, tmp_path, capsys):
    for arguments, message in [
        (["plan", tmp_path / "none"], "there is no folder"),
        (["convert", "only-one"], "Missing argument"),
        (["convert", "a", "b", "--nsa-topk", "many"], "Invalid value for '--nsa-topk'"),
        (["nothing"], "No such command 'nothing'"),
        (["plan", "a", "--no-such-option"], "No such option: --no-such-option"),
        (["train", tmp_path / "none.yaml"], "no run file"),
        (["verify", tmp_path, nsa_dir], "neither config.json nor a .gguf file"),
        (["verify", "a", nsa_dir, "--text", tmp_path / "none.txt"], "cannot read"),
        (["eval", tmp_path], "holds no model"),
        (["eval", nsa_dir, "--suite", "ppl,none"], "--suite takes ppl, needle, ruler, lm-eval, several with commas"),
        (
            ["eval", nsa_dir, "--suite", "needle", "--lengths", "9999"],
            "give shorter --lengths, or --rope-scaling yarn:3",
        ),
        (["inspect", nsa_dir, "--device", "warp"], "no device 'warp' here"),
        (["generate", nsa_dir], "give the prompt once"),
        (["generate", nsa_dir, "--prompt", "a", "--prompt-file", "b"], "give the prompt once"),
        (["generate", nsa_dir, "--prompt-file", tmp_path / "none.txt"], "cannot read"),
        (["card", tmp_path], "is no converted model"),
    ]:
        fails(capsys, arguments, message)


def test_a_model_folder_that_is_not_there_is_called_that_by_every_command(tiny_dense_dir, tmp_path, capsys):
    gone = tmp_path / "gone"
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"model: {gone}\nout: {tmp_path / 'out'}\n")
    for arguments in (
        ["verify", tiny_dense_dir, gone],
        ["export-dense", gone, tmp_path / "out"],
        ["train", run_file],
        *([command, gone] for command in ("card", "eval", "inspect", "serve")),
        ["generate", gone, "--prompt", "a"],
    ):
        fails(capsys, arguments, "gone does not exist: expected a folder that `nsa-hf convert` or `nsa-hf train` wrote")
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path, capsys):
    for arguments in (["--debug", "plan", str(tmp_path / "none")], ["plan", str(tmp_path / "none"), "--debug"]):
        assert run(arguments) == 2
        assert "Traceback" in capsys.readouterr().err


def test_our_own_bugs_are_not_hidden(monkeypatch, tmp_path):
    def bug(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("nsa_hf.model_cards.card.render_card", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["card", str(tmp_path)])


def test_interrupted(monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("nsa_hf.model_cards.card.render_card", interrupt)
    assert run(["card", str(tmp_path)]) == 130


def test_an_interrupted_conversion_says_how_to_go_on(tiny_dense_dir, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nsa_hf.conversion.manifest.write", interrupt)
        assert run(["convert", str(tiny_dense_dir), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "stopped: the same command goes on where it was\n"
    assert not (tmp_path / "out").exists()
    assert run(["convert", str(tiny_dense_dir), str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_main_leaves_with_the_exit_code(tmp_path):
    with pytest.raises(SystemExit) as leaving:
        main(["plan", str(tmp_path / "none")])
    assert leaving.value.code == 2
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "nsa_hf.recipes.cli"]
    done = subprocess.run([*command, "card", str(tmp_path)], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""


def python(code, **environment):
    """Runs code in a fresh interpreter that has imported nothing."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


HELP = """
import sys
from nsa_hf.recipes.cli import run
for command in [[], *([name] for name in {commands!r})]:
    assert run([*command, "--help"]) == 0
heavy = {{"torch", "transformers", "numpy", "rich.table", "nsa_hf.conversion", "nsa_hf.families"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_help_imports_nothing_heavy():
    done = python(HELP.format(commands=sorted(COMMANDS)))
    assert done.returncode == 0, done.stderr


def test_help_takes_less_than_a_second():
    """Of the processor's time: others may be using it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python("from nsa_hf.recipes.cli import main; main(['--help'])").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_versions(capsys):
    import torch
    import transformers

    assert run(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"nsa-hf {nsa_hf.__version__} (torch {torch.__version__.partition('+')[0]}")
    assert f"transformers {transformers.__version__}" in line
    assert line.count("\n") == 1


def test_a_package_that_is_not_installed_has_no_version():
    assert list(versions("pytest", "no-such-package"))[1] == "no no-such-package"


INTERRUPTED = """
import sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
from nsa_hf.recipes.cli import main
main(["eval", "nowhere"])
"""


@pytest.mark.parametrize("name", ["typer", "yaml", "torch"])
def test_ctrl_c_while_something_is_imported(name):
    done = python(INTERRUPTED.format(name=name))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_completion_by_the_shell():
    command = "from nsa_hf.recipes.cli import main; main([])"
    asked = {"_NSA_HF_COMPLETE": "complete_bash", "COMP_WORDS": "nsa-hf ge", "COMP_CWORD": "1"}
    assert python(command, **asked).stdout.split() == ["generate"]
    asked["COMP_WORDS"], asked["COMP_CWORD"] = "nsa-hf convert --nsa-top", "2"
    assert python(command, **asked).stdout.split() == ["--nsa-topk"]
    assert "complete -o default -F _nsa_hf_completion nsa-hf" in python(command, _NSA_HF_COMPLETE="source_bash").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "\udcff"],
        ["generate", "out", "--prompt", "a\udcff"],
        ["train", "run.yaml", "out=\udcff"],
        ["\udcff"],
        ["serve", "out", "--host", "\udcff"],
    ],
)
def test_arguments_that_are_not_utf_8_are_refused_in_one_line(arguments, capsys):
    fails(capsys, arguments, r"\udcff' is not UTF-8")


def test_a_card_by_hand_is_replaced_only_when_asked_to(nsa_dir, capsys):
    (nsa_dir / "README.md").write_text("# Mine")
    fails(capsys, ["card", nsa_dir], "written, or edited, by hand")
    assert run(["card", str(nsa_dir), "--overwrite"]) == 0
    (nsa_dir / "README.md").unlink()
