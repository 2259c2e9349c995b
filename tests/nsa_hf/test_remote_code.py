"""nsa_hf/remote_code.py: a folder that loads by itself, through one line that imports the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import nsa_hf
from nsa_hf.conversion import convert

LINE = (
    "from nsa_hf import NsaLlamaConfig, NsaLlamaModel, NsaLlamaForCausalLM, NsaLlamaForSequenceClassification, "
    "NsaLlamaForTokenClassification, NsaLlamaForQuestionAnswering  # noqa: F401 (pip install nsa-hf)\n"
)
AUTO_MAP = {
    "AutoConfig": "modeling_nsa.NsaLlamaConfig",
    "AutoModel": "modeling_nsa.NsaLlamaModel",
    "AutoModelForCausalLM": "modeling_nsa.NsaLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_nsa.NsaLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_nsa.NsaLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_nsa.NsaLlamaForQuestionAnswering",
}


@pytest.fixture(scope="module")
def folder(tiny_dense_dir, tiny_sizes, tmp_path_factory) -> Path:
    return convert(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", **tiny_sizes)


def check_folder(folder: Path) -> None:
    assert (folder / "modeling_nsa.py").read_text() == LINE
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert [path.name for path in folder.glob("*.py")] == ["modeling_nsa.py"]


def run(program: str, *arguments: object, cache: Path) -> subprocess.CompletedProcess:
    """A fresh Python, which has imported nothing of ours."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "HF_HOME": str(cache)},
        stdin=subprocess.DEVNULL,
        cwd=cache,
    )


LOAD = """
import sys
import transformers
assert "nsa_hf" not in sys.modules
model = getattr(transformers, sys.argv[3]).from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("nsa_hf"), type(model).__module__
model.save_pretrained(sys.argv[2])
model.config.save_pretrained(sys.argv[2] + "-config")
"""

ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nsa_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def test_conversion_writes_the_line_and_names_it(folder):
    check_folder(folder)


def test_with_trust_alone_it_loads_and_is_saved_as_it_was(folder, tmp_path):
    done = run(LOAD, folder, tmp_path / "again", "AutoModelForCausalLM", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    check_folder(tmp_path / "again")
    assert (tmp_path / "again-config" / "modeling_nsa.py").read_text() == LINE
    first, again = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "again"))
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())


def test_with_trust_alone_it_loads_with_another_head(folder, tmp_path):
    done = run(LOAD, folder, tmp_path / "again", "AutoModelForSequenceClassification", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    check_folder(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["NsaLlamaForSequenceClassification"]


def test_without_the_package_the_error_says_what_to_install(folder, tmp_path):
    done = run(ABSENT, folder, cache=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    # pip takes nsa_hf for nsa-hf, the name it is published by
    assert last.startswith("ImportError: ") and "pip install nsa_hf" in last


@pytest.mark.parametrize("trust", [None, False, True])
def test_where_it_is_imported_nobody_is_asked_and_nothing_is_run(folder, tmp_path, monkeypatch, trust):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.get_cached_module_file", lambda *_, **__: pytest.fail("looked at")
    )
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is nsa_hf.NsaLlamaForCausalLM
    model.save_pretrained(tmp_path / "again")
    check_folder(tmp_path / "again")


def test_a_config_from_the_hub_is_saved_without_the_name_of_its_repository(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.auto_map = {auto: f"owner/name--{path}" for auto, path in AUTO_MAP.items()}
    config.save_pretrained(tmp_path)
    check_folder(tmp_path)


TOKENIZER = """
import builtins, sys
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, pipeline
def asked(*_):
    sys.exit("asked")
builtins.input = asked
known, folders = sys.argv[1] == "known", sys.argv[2:]
if known:
    import nsa_hf
trust = {} if known else {"trust_remote_code": False}
for folder in folders:
    for auto in (AutoTokenizer, AutoProcessor):
        tokenizer = auto.from_pretrained(folder, **trust)
        assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
        assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "user: abc\\n"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 1
    if known:
        assert type(pipeline("text-generation", folder).model) is nsa_hf.NsaLlamaForCausalLM
assert known is ("nsa_hf" in sys.modules)
"""


@pytest.mark.parametrize("known", ["known", "unknown"])
def test_tokenizer_and_the_like_load_without_a_question(folder, tmp_path, known):
    """Where nsa_hf is not imported, with `trust_remote_code=False`: left out, AutoTokenizer asks about the config of
    any model that it does not know and that names code, and goes on without it whatever the answer is."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    done = run(TOKENIZER, known, folder, tmp_path / "again", cache=tmp_path)
    assert done.returncode == 0, done.stderr
