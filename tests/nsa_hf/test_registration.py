"""nsa_hf/registration.py: the Auto classes know the sparse families, whichever package is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from tiny_runs import converted

import nsa_hf
from nsa_hf.registration import TABLE, RegistersWhenImported, register


@pytest.fixture(scope="module")
def nsa_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    return converted(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes)


def python(code: str) -> str:
    """What code prints in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "first",
    [
        "import nsa_hf; from transformers import AutoConfig; assert AutoConfig.from_pretrained({0!r}).nsa_topk == 4",
        "from transformers import AutoModelForCausalLM; import nsa_hf",
        "import transformers; import nsa_hf",
    ],
    ids=["ours first", "theirs first", "theirs first, without its table"],
)
def test_the_auto_classes_load_a_sparse_model(first: str, nsa_dir) -> None:
    then = "from transformers import AutoModelForCausalLM; print(type(AutoModelForCausalLM.from_pretrained({0!r})))"
    assert "nsa_hf.families.NsaLlamaForCausalLM" in python(f"{first}; {then}".format(str(nsa_dir)))


def test_importing_ours_brings_neither_of_the_big_ones() -> None:
    code = """
import sys
import nsa_hf
assert {"NsaError", "convert", "NSA_FIELDS", "nsa_config_from_dense"} <= set(dir(nsa_hf))
assert not hasattr(nsa_hf, "no_such_name")
assert not {"torch", "transformers"} & set(sys.modules)
assert nsa_hf.families is sys.modules["nsa_hf.families"]
print(nsa_hf.nsa_config_from_dense.__name__, nsa_hf.convert.__name__, nsa_hf.NsaQwen3ForCausalLM.__name__)
# where pipelines look for it
import transformers
assert transformers.NsaQwen3ForCausalLM is nsa_hf.NsaQwen3ForCausalLM
"""
    assert python(code) == "nsa_config_from_dense convert NsaQwen3ForCausalLM"


def test_the_table_is_found_as_without_us() -> None:
    """Whoever only looks for it gets the file and a loader that can read it."""
    module = sys.modules[TABLE]
    spec = RegistersWhenImported().find_spec(TABLE, sys.modules["transformers.models.auto"].__path__)
    assert spec is not None and spec.origin == module.__file__
    assert type(spec.loader) is type(module.__loader__)
    assert module.__spec__.loader is module.__loader__
    assert RegistersWhenImported().find_spec("transformers.models.auto.modeling_auto") is None
    assert find_spec("nsa_hf.no_such_module") is None


def test_registering_twice_is_registering_once() -> None:
    table = sys.modules[TABLE]
    before = dict(table.CONFIG_MAPPING_NAMES)
    register(table)
    assert before == table.CONFIG_MAPPING_NAMES
    assert before["nsa_llama"] == "NsaLlamaConfig" and "nsa_nsa_llama" not in before
    assert table.CONFIG_MAPPING["nsa_llama"] is nsa_hf.NsaLlamaConfig


AGAIN = """
import importlib, sys
import nsa_hf
{before}
{again}
from transformers import AutoConfig
assert [type(finder).__name__ for finder in sys.meta_path].count("RegistersWhenImported") == 1
print(AutoConfig.from_pretrained({folder!r}).model_type)"""


@pytest.mark.parametrize(
    "again",
    [
        "importlib.reload(nsa_hf)",
        "for name in [name for name in sys.modules if name.startswith('nsa_hf')]: del sys.modules[name]\nimport nsa_hf",
    ],
    ids=["reloaded", "forgotten"],
)
@pytest.mark.parametrize("before", ["", "nsa_hf.NsaLlamaForCausalLM"], ids=["untouched", "made"])
def test_ours_may_be_imported_anew(again: str, before: str, nsa_dir) -> None:
    """As a notebook does."""
    then = AGAIN.format(before=before, again=again, folder=str(nsa_dir))
    assert python(f"{then}; assert isinstance(nsa_hf.NsaLlamaForCausalLM, type)") == "nsa_llama"


def test_another_thread_imports_transformers_meanwhile(nsa_dir) -> None:
    code = f"""
import sys, threading
sys.setswitchinterval(1e-6)
def ours():
    while "{TABLE}" not in sys.modules:
        pass
    import nsa_hf
thread = threading.Thread(target=ours)
thread.start()
from transformers import AutoConfig
thread.join()
print(AutoConfig.from_pretrained({str(nsa_dir)!r}, trust_remote_code=False).model_type)
"""
    assert python(code) == "nsa_llama"
