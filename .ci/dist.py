"""Build the wheel and the source distribution of the last commit, and check them as somebody who installs them.

    python .ci/dist.py dist        what `make dist` runs

What is not committed does not get in: the commit is built in a folder of its own. Checked are the metadata (as PyPI
does), that the changelog knows the version, that every file of the package is in the wheel and every file of the
repository in the source distribution, and that the wheel works in a new environment, which sees the packages of this
one but nothing of this repository. What is wrong is named, with exit code 1.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent
# Folders that stay in the repository.
MEASURED = ("recipes/results/", "model_cards/results/")

# Run in the new environment: what a user does first.
WORKS = """
import sys, tempfile
from importlib.resources import files
from pathlib import Path
import nsa_hf, nsa_hf.kernels, nsa_hf.conversion, nsa_hf.recipes, nsa_hf.model_cards
from transformers import AutoModelForCausalLM, LlamaConfig
assert Path(nsa_hf.__file__).is_relative_to(sys.prefix), nsa_hf.__file__
for name in ("py.typed", "recipes/runs/adapt.yaml", "recipes/accelerate/fsdp2.yaml"):
    assert (files("nsa_hf") / name).is_file(), name
dense = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(nsa_hf.nsa_config_from_dense(dense))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    assert (Path(folder) / "modeling_nsa.py").is_file()
print(nsa_hf.__version__)
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a command and gives what it printed; ends the program with what went wrong."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {' '.join(map(str, command[:4]))} ...\n{result.stdout}{result.stderr}")
    return result.stdout


def committed_files() -> set[str]:
    return set(run("git", "ls-files").split("\n")) - {""}


def build(work: Path) -> tuple[Path, Path]:
    """The last commit's source distribution, and the wheel that is built from it."""
    run("git", "archive", "--format=tar", f"--output={work / 'commit.tar'}", "HEAD")
    with tarfile.open(work / "commit.tar") as archive:
        archive.extractall(work / "source", filter="data")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", work / "source", cwd=work)
    (sdist,), (wheel,) = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
    return sdist, wheel


def check_wheel(wheel: Path) -> str:
    """The version in the wheel's metadata, which are as PyPI wants them; every file of the package is in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        raw = archive.read(metadata)
    version = str(Metadata.from_email(raw, validate=True).version)
    assert message_from_bytes(raw)["Description-Content-Type"] == "text/markdown"
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(), f"CHANGELOG.md has no heading for {version}"
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    wanted = {
        package.replace(".", "/") + file.removeprefix(folder)
        for package, folder in folders.items()
        for file in committed_files()
        if file.startswith(f"{folder}/") and not file.startswith(MEASURED)
    }
    assert not wanted - names, f"not in the wheel: {sorted(wanted - names)}"
    return version


def check_source_distribution(sdist: Path) -> None:
    """Every file of the repository is in it, but for the measurements."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in committed_files() - names if not name.startswith(MEASURED)}
    assert not missing, f"not in the source distribution: {sorted(missing)}"


def check_installed(wheel: Path, work: Path) -> str:
    """The version that the wheel says of itself in a new environment, where it has run a little."""
    run(sys.executable, "-m", "venv", "--without-pip", work / "venv")
    python = work / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Files of this kind are followed once: what this environment has by them (an editable install) stays outside.
    here = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("-packages"))}
    (site / "here.pth").write_text("\n".join(sorted(here)) + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=work)
    version = run(python, "-c", WORKS, cwd=work).strip()
    assert version in run(work / "venv" / "bin" / "nsa-hf", "--version", cwd=work)
    return version


def main(out: Path) -> None:
    if run("git", "status", "--porcelain"):
        print("note: there are changes that are not committed; they are not built")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, wheel = build(work)
        try:
            version = check_wheel(wheel)
            check_source_distribution(sdist)
            installed = check_installed(wheel, work)
            assert installed == version, f"the wheel of {version} says that it is {installed}"
        except AssertionError as wrong:
            sys.exit(f"error: {wrong}")
        out.mkdir(exist_ok=True)
        for path in (sdist, wheel):
            shutil.copy(path, out)
            print(out / path.name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/dist.py FOLDER")
    main(Path(sys.argv[1]))
