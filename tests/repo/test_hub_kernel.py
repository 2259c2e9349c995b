"""What `make hub-kernel` lays out, loaded by Hugging Face's `kernels`, computes what `nsa_hf.kernels` computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hf_kernels import install_kernels

import nsa_hf

ROOT = Path(__file__).resolve().parents[2]

# In a process that has both: the same calls give the same, and neither has the other's functions or operators.
LOADED = """
import importlib, importlib.util, json, sys
from pathlib import Path
import torch
from kernels import get_local_kernel
from kernels._rust import Digest, Metadata
from attention_inputs import Shape, make_inputs
import nsa_hf.kernels as ours

folder = Path(sys.argv[1])
hub = get_local_kernel(folder, backend="cpu")
assert Path(hub.__file__) == folder / "build" / "torch-cpu" / "__init__.py", hub.__file__
assert set(hub.__all__) == set(ours.__all__) and hub.nsa_attention is not ours.nsa_attention
assert not any(name.startswith("nsa_hf") for name in vars(hub))

for shape in (Shape(batch=2, starts=(0, 7)), Shape(cu_seqlens=(0, 11, 30)), Shape(index=(2, 1, 4), compressed=False)):
    results = []
    for module in (hub, ours):
        inputs = make_inputs(shape)
        inputs["q"].requires_grad_()
        out, selection = module.nsa_attention(**inputs, return_selection=True)
        out.square().sum().backward()
        results.append((out.detach(), selection, inputs["q"].grad))
    assert results[0][0].abs().sum() > 0 and results[0][2].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results))

for variant in (folder / "build").iterdir():
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))

file = folder / "build" / "torch-cpu" / "nsa" / "__init__.py"
spec = importlib.util.spec_from_file_location("as_older_versions_do", file)
older = importlib.util.module_from_spec(spec)
spec.loader.exec_module(older)
assert older.nsa_attention is hub.nsa_attention

if importlib.util.find_spec("triton"):
    theirs = importlib.import_module(hub.__name__ + ".gpu.op")
    mine = importlib.import_module("nsa_hf.kernels.gpu.op")
    for name in ("forward_op", "backward_op", "decode_op"):
        names = [getattr(module, name).name() for module in (theirs, mine)]
        assert names[0].partition("::")[0] == hub.__name__ and names[1].startswith("nsa_hf::"), names
print("the same")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    subprocess.run([sys.executable, str(ROOT / ".ci" / "hub_kernel.py"), str(folder)], check=True, timeout=300)
    return folder


def test_every_file_is_there_for_both_backends(repository: Path) -> None:
    files = {path.relative_to(ROOT / "kernels" / "nsa") for path in (ROOT / "kernels" / "nsa").rglob("*.py")}
    ids = set()
    for backend in ("cpu", "cuda"):
        folder = repository / "build" / f"torch-{backend}"
        assert {path.relative_to(folder) for path in folder.rglob("*.py")} == {*files, Path("nsa/__init__.py")}
        metadata = json.loads((folder / "metadata.json").read_text())
        assert (metadata["name"], metadata["backend"]["type"]) == ("nsa", backend)
        assert metadata["id"].isidentifier()
        ids.add(metadata["id"])
    assert len(ids) == 2
    assert nsa_hf.__version__ in (repository / "README.md").read_text()
    assert (repository / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_a_folder_with_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, str(ROOT / ".ci" / "hub_kernel.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "holds something else" in result.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_library_loads_it_and_it_computes_the_same(repository: Path, tmp_path: Path) -> None:
    install_kernels(tmp_path / "site")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", LOADED, str(repository)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (result.returncode, result.stdout.strip()) == (0, "the same"), result.stderr
