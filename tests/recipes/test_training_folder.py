import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from tiny_runs import converted, tiny_run

from nsa_hf.errors import NsaError
from nsa_hf.recipes.load import load_nsa_model
from nsa_hf.recipes.training.folder import (
    finished_run,
    machine,
    noted_revisions,
    open_run_folder,
    save_trained,
    settings_fingerprint,
    unfinished,
)


def depends(config):
    """As `train` puts it together."""
    return settings_fingerprint(config) | {"training_text": "a", "held_out_text": "b", "tokens": "c", "processes": 2}


def opened(config):
    with open_run_folder(config, depends(config)) as folder:
        return folder


def test_what_decides_the_weights_is_in_the_fingerprint(nsa_dir, tmp_path, tiny_dense_dir, tiny_sizes):
    print_ = settings_fingerprint(tiny_run(nsa_dir, tmp_path, tmp_path / "out"))
    # where it goes and how often it is saved do not matter
    assert print_ == settings_fingerprint(
        tiny_run(nsa_dir, tmp_path, tmp_path / "other", save_every=7, keep=3, log_every=2)
    )
    assert print_ != settings_fingerprint(tiny_run(nsa_dir, tmp_path, tmp_path / "out", seed=1))
    other = converted(tiny_dense_dir, tmp_path / "nsa", {**tiny_sizes, "nsa_topk": 5})
    assert print_ != settings_fingerprint(tiny_run(other, tmp_path, tmp_path / "out"))


def test_an_unfinished_run_is_found_again(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "deep" / "out")
    folder = opened(config)
    assert folder == tmp_path / "deep" / "out.unfinished" == unfinished(config)
    before = (folder / "run.json").read_bytes()
    assert opened(config) == folder
    assert (folder / "run.json").read_bytes() == before
    # an older version noted less
    (folder / "run.json").write_text(json.dumps({"fingerprint": depends(config)}))
    with open_run_folder(config, depends(config), {"hub:a/b": "1"}):
        assert json.loads((folder / "run.json").read_text()).keys() == json.loads(before).keys()
    assert noted_revisions(config) == {"hub:a/b": "1"}
    with pytest.raises(NsaError, match="seed: 0 -> 1"):
        opened(tiny_run(nsa_dir, tmp_path, config.out, seed=1))
    assert not finished_run(config, depends(config))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '"x"', '{"fingerprint": 3}', "[" * 100_000])
def test_a_damaged_record_is_named(nsa_dir, tmp_path, content):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    (opened(config) / "run.json").write_text(content)
    with pytest.raises(NsaError, match="is damaged"):
        opened(config)


def test_a_folder_that_cannot_be_made_is_named(nsa_dir, tmp_path):
    (tmp_path / "out.unfinished").write_text("")
    with pytest.raises(NsaError, match="cannot make"):
        opened(tiny_run(nsa_dir, tmp_path, tmp_path / "out"))


def test_saving_ends_the_unfinished_run(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    opened(config)
    save_trained(load_nsa_model(nsa_dir), config, depends(config), {"curve": []})
    assert not unfinished(config).exists()
    result = json.loads((tmp_path / "out" / "training.json").read_text())
    assert result["fingerprint"] == depends(config)
    assert result["hardware"]["cpu"]
    assert finished_run(config, depends(config))
    assert opened(config) is None
    # what a kill between the two left behind goes as well
    unfinished(config).mkdir()
    assert finished_run(config, depends(config))
    assert not unfinished(config).exists()


def test_a_save_that_fails_leaves_the_run_as_it_was(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    opened(config)
    with pytest.raises(ValueError, match="JSON"):
        save_trained(load_nsa_model(nsa_dir), config, depends(config), {"curve": [float("nan")]})
    assert not Path(config.out).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"training_text": "x"}, r"the training text, data=\S+, has changed"),
        ({"held_out_text": "x"}, r"the held-out text, held_out=\S+, has changed"),
        ({"training_text": "x", "tokens": "x"}, r"\(the training text, data=\S+, has changed\)"),
        ({"tokens": "x"}, r"the tokenizer in \S+ has changed"),
        ({"weights": {}}, r"the weights in \S+ have changed"),
        ({"model_config": "x"}, r"config.json in \S+ has changed"),
        ({"processes": 1}, "processes: 2 -> 1"),
        ({"processes": 3, "seed": 4}, "seed: 0 -> 4; processes: 2 -> 3"),
    ],
)
def test_what_changed_is_named_and_what_to_do(nsa_dir, tmp_path, changed, message):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    opened(config)
    with pytest.raises(NsaError, match=message) as raised, open_run_folder(config, depends(config) | changed):
        pass
    assert "give another out=, take that back, or remove that folder" in str(raised.value)
    # the run itself is as it was
    assert opened(config) == unfinished(config)


def test_weights_and_config_are_in_the_fingerprint(tiny_dense_dir, tiny_sizes, tmp_path):
    """By their bytes: the manifest says of what they were."""
    model = converted(tiny_dense_dir, tmp_path / "nsa", tiny_sizes)
    config = tiny_run(model, tmp_path, tmp_path / "out")
    found = [settings_fingerprint(config)]
    for name in ("model.safetensors", "config.json"):
        content = bytearray((model / name).read_bytes())
        content[-3] ^= 1
        (model / name).write_bytes(content)
        found.append(settings_fingerprint(config))
    assert [name for name in found[0] if found[0][name] != found[1][name]] == ["weights"]
    assert [name for name in found[1] if found[1][name] != found[2][name]] == ["model_config"]


def test_a_run_of_an_older_version_is_told_so(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    noted = depends(config)
    path = opened(config) / "run.json"
    del noted["tokens"], noted["processes"]
    path.write_text(json.dumps({"fingerprint": noted}))
    with pytest.raises(NsaError, match="an older version began, which did not note its tokens, processes"):
        opened(config)
    # where it was finished, nothing is to be done again
    shutil.copytree(nsa_dir, tmp_path / "out")
    (tmp_path / "out" / "training.json").write_text(json.dumps({"fingerprint": noted}))
    assert opened(config) is None


def test_one_process_at_a_time(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    with open_run_folder(config, depends(config)), pytest.raises(NsaError, match="another process trains"):
        opened(config)
    assert opened(config) == unfinished(config)


def test_the_lock_ends_with_the_process(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    noted = depends(config)
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with open_run_folder(config, noted):
            os.write(tell, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(NsaError, match="another process trains"):
        opened(config)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert opened(config) == unfinished(config)


def test_what_is_not_of_a_run_is_neither_taken_nor_deleted(nsa_dir, tmp_path, tiny_dense_dir, tiny_sizes):
    mine = tmp_path / "out.unfinished"
    (mine / "checkpoints").mkdir(parents=True)
    (mine / "checkpoints" / "notes.txt").write_text("mine")
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    with pytest.raises(NsaError, match="holds checkpoints: give another out="):
        opened(config)
    # not even when OUT is there, and the run is done
    save_trained(load_nsa_model(nsa_dir), config, depends(config), {"curve": []})
    assert opened(config) is None
    assert (mine / "checkpoints" / "notes.txt").read_text() == "mine"
    # the model itself may be there
    model = converted(tiny_dense_dir, tmp_path / "new.unfinished", tiny_sizes)
    config = tiny_run(model, tmp_path, tmp_path / "new")
    with pytest.raises(NsaError, match="give another out="):
        opened(config)
    # what is put into a run's folder stays there
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "third")
    (opened(config) / "notes.txt").write_text("mine")
    save_trained(load_nsa_model(nsa_dir), config, depends(config), {"curve": []})
    assert [path.name for path in unfinished(config).iterdir()] == ["notes.txt"]


def test_a_link_is_not_followed(nsa_dir, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NsaError, match="cannot make"):
        opened(tiny_run(nsa_dir, tmp_path, tmp_path / "out"))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_that_is_refused_before_its_first_checkpoint_leaves_nothing(nsa_dir, tmp_path):
    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    with pytest.raises(NsaError), open_run_folder(config, depends(config)):
        raise NsaError("a wrong setting")
    assert not unfinished(config).exists()
    with pytest.raises(NsaError), open_run_folder(config, depends(config)) as folder:
        (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
        raise NsaError("a loss that is not finite")
    assert opened(config) == folder


def test_an_out_without_a_name_of_its_own(nsa_dir, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert opened(tiny_run(nsa_dir, tmp_path, Path("."))) == tmp_path / "here.unfinished"


def test_only_converted_models_have_runs(tiny_dense_dir, tmp_path):
    with pytest.raises(NsaError, match=r"holds a dense model"):
        settings_fingerprint(tiny_run(tiny_dense_dir, tmp_path, tmp_path / "out"))


def test_the_machine_is_described():
    found = machine()
    assert found["hardware"]["threads"] >= 1
    assert {"python", "torch", "transformers", "accelerate", "nsa-hf"} <= set(found["versions"])


def test_a_full_disk_at_the_end_is_told(nsa_dir, tmp_path):
    def full(folder):
        raise SafetensorError("I/O error: No space left on device")

    config = tiny_run(nsa_dir, tmp_path, tmp_path / "out")
    with pytest.raises(NsaError, match=r"No space left.*once there is room"):
        save_trained(SimpleNamespace(save_pretrained=full), config, {}, {})
    assert not Path(config.out).exists()
