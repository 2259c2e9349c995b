"""The Python in README.md and docs/ runs: in a folder with a tiny model where a reader has a real one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "query.svg"


def blocks(document: str) -> list[str]:
    """The Python code in a document."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path, **variables: str) -> str:
    """Runs code in a fresh interpreter and gives what it printed."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_is_code_to_run() -> None:
    numbers = {path.name: len(blocks(f"docs/{path.name}")) for path in (ROOT / "docs").glob("*.md")}
    # families.md: what it shows are classes that exist already, see test_families_page.py
    assert {name: number for name, number in numbers.items() if number} == {
        "extending.md": 2,
        "families.md": 1,
        "finetune.md": 3,
        "kernels.md": 1,
        "python.md": 3,
        "serving.md": 1,
    }
    assert len(blocks("README.md")) == 1


@pytest.mark.parametrize(
    "document", ["README.md", "docs/finetune.md", "docs/python.md", "docs/kernels.md", "docs/serving.md"]
)
def test_the_code_runs(document: str, tiny_dense_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dense_dir, tmp_path / "path" / "to" / "llama")
    # a page's blocks in one process, since their imports take longer than all else
    run("\n".join(blocks(document)), tmp_path, HF_DATASETS_CACHE=str(tmp_path / "datasets"))


def test_the_kernel_that_a_reader_writes_is_what_its_test_says(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    kernel, test = blocks("docs/extending.md")
    (tmp_path / "mean.py").write_text(kernel)
    (tmp_path / "test_triton_mean.py").write_text(test)
    code = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import nsa_hf.kernels.gpu
name = "nsa_hf.kernels.gpu.mean"
spec = spec_from_file_location(name, "mean.py")
sys.modules[name] = module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
from test_triton_mean import largest_difference
print(max(largest_difference(150, 20), largest_difference(8, 16)))
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    assert float(run(code, tmp_path, PYTHONPATH=path, TRITON_INTERPRET="1")) < 1e-6


def test_the_picture_is_drawn_by_the_repository(tmp_path: Path) -> None:
    """Lines and places differ between versions of Matplotlib; what is selected must not."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "query.svg"
    result = subprocess.run([sys.executable, str(ROOT / "docs" / "draw.py"), str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    drawn, stored = (path.read_text() for path in (out, PICTURE))
    colours = ("#d65f5f", "#4878cf", "#6acc65")
    assert [drawn.count(colour) for colour in colours] == [stored.count(colour) for colour in colours]
    assert PICTURE.stat().st_size < 200_000
