"""What the wheel and the source distribution hold, and that our `kernels/` is never taken for Hugging Face's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_kernels import install_kernels
from packaging.metadata import Metadata

import nsa_hf

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: dict[str, str] = SETTINGS["tool"]["setuptools"]["package-dir"]
IGNORED = shutil.ignore_patterns(
    "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "dist", ".git", ".venv*"
)

# A module with every name, each a class whose instances decorate what they are given with nothing.
KERNELS_STAND_IN = """
__version__ = {version!r}

class Anything:
    def __init__(self, *arguments, **options): ...
    def __call__(self, decorated=None): return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and give its output; fail with what it said."""
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def python(code: str, cwd: Path, path: Path | str) -> str:
    return run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=str(path))


def pip(*arguments: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository: building leaves folders behind, and old ones would end up in the wheel."""
    copy = tmp_path_factory.mktemp("source") / "nsa-hf"
    copy.mkdir()
    folders = {Path(folder).parts[0] for folder in PACKAGES.values()} | {"tests", "docs", ".ci"}
    for entry in ROOT.iterdir():
        if entry.is_dir() and entry.name in folders:
            shutil.copytree(entry, copy / entry.name, ignore=IGNORED)
        elif entry.is_file():
            shutil.copy(entry, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, from the repository."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m build` makes: the source distribution, and the wheel from it."""
    out = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but the installed wheel."""
    target = tmp_path_factory.mktemp("installed") / "site"
    pip("install", "--quiet", "--no-deps", "--no-compile", "--target", target, wheel, cwd=target.parent)
    return target


def package_files() -> set[str]:
    """Where each file of the package's folders belongs in the wheel; measurements stay in the repository."""
    files = {
        (package, path.relative_to(ROOT / folder))
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    return {
        f"{package.replace('.', '/')}/{path.as_posix()}"
        for package, path in files
        if path.parts[0] != "results" and not any(part == "__pycache__" or part[0] == "." for part in path.parts)
    }


def test_wheel_owns_one_name(installed: Path) -> None:
    names = {entry.name for entry in installed.iterdir()} - {"bin"}
    assert names == {"nsa_hf", f"nsa_hf-{nsa_hf.__version__}.dist-info"}
    text = (installed / f"nsa_hf-{nsa_hf.__version__}.dist-info" / "licenses" / "LICENSE").read_text()
    assert text.split()[:2] == ["Apache", "License"]


def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert {"nsa_hf/py.typed", "nsa_hf/kernels/__init__.py"} <= names
    assert any(name.endswith(".yaml") for name in names)
    assert any(name.endswith(".j2") for name in names)


def test_the_wheel_is_what_pypi_takes(wheel: Path) -> None:
    """Its metadata are valid, and the changelog tells of its version."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=True)
    assert str(metadata.version) == nsa_hf.__version__
    assert metadata.description_content_type == "text/markdown" and metadata.license_expression == "Apache-2.0"
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert nsa_hf.__version__ in headings[:2]


def test_wheel_from_the_source_distribution_is_the_same(wheel: Path, built: Path) -> None:
    (from_sdist,) = built.glob("*.whl")
    assert from_sdist.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(from_sdist) as other:
        names = {name for name in one.namelist() if not name.endswith("/RECORD")}
        assert names == {name for name in other.namelist() if not name.endswith("/RECORD")}
        assert [name for name in names if one.read(name) != other.read(name)] == []


def test_source_distribution_can_run_the_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    tests |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.*")}
    assert tests | {"Makefile", "pyproject.toml", "constraints.txt", "LICENSE", "README.md", ".ci/run"} <= names
    assert not any("__pycache__" in name for name in names)


def test_installed_wheel_works_by_itself(installed: Path, tmp_path: Path) -> None:
    modules = sorted(PACKAGES)
    code = f"import importlib\nfor name in {modules!r}: print(importlib.import_module(name).__file__)"
    files = python(code, tmp_path, installed).split()
    assert [Path(file).relative_to(installed).parent.as_posix() for file in files] == [
        name.replace(".", "/") for name in modules
    ]
    assert "convert" in run(
        sys.executable, installed / "bin" / "nsa-hf", "--help", cwd=tmp_path, PYTHONPATH=str(installed)
    )


def test_this_folder_gives_the_package(tmp_path: Path) -> None:
    """Installed editable, as `make setup` does: started here or elsewhere, each part comes from its own folder."""
    code = f"import importlib\nfor name in {sorted(PACKAGES)!r}: print(importlib.import_module(name).__file__)"
    for cwd in (ROOT, tmp_path):
        files = [Path(line) for line in run(sys.executable, "-c", code, cwd=cwd).split()]
        assert files == [ROOT / PACKAGES[name] / "__init__.py" for name in sorted(PACKAGES)]


# --- the trap: with this folder on sys.path, `kernels` must be Hugging Face's or nobody's


def no_kernels(folder: Path) -> None:
    """Not installed."""


def stand_in(folder: Path) -> None:
    """A `kernels` of a version that this Transformers accepts, so that it takes what it wants from it."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(KERNELS_STAND_IN.format(version=version))
    metadata = folder / f"kernels-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")


def from_pypi(folder: Path) -> None:
    """The real one, of any version."""
    install_kernels(folder)


def site_without_kernels(folder: Path) -> Path:
    """The packages of this environment but for `kernels`, as links, for an interpreter that sees no others."""
    folder.mkdir()
    for site in (Path(path) for path in sys.path if path.endswith("-packages") and Path(path).is_dir()):
        for entry in site.iterdir():
            if not re.match(r"kernels(-|$)", entry.name) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def import_hub_kernels(root: Path, installed: Path, site: Path, kernels: Path) -> list[str]:
    """Import our package and Transformers' hub_kernels in folder `root`.

    Whether Transformers took `kernels` for installed, and the file of the `kernels` that was imported ("None": none).
    """
    code = f"""
import sys
sys.path[:] = [{str(installed)!r}, "", *sys.path[1:]]
import nsa_hf.kernels
import transformers.integrations.hub_kernels as hub_kernels
print(hub_kernels.is_kernels_available())
print(getattr(sys.modules.get("kernels"), "__file__", None))
"""
    # -S: without the environment's own packages.
    path = os.pathsep.join(map(str, (kernels, site)))
    return run(sys.executable, "-S", "-c", code, cwd=root, PYTHONPATH=path).split()


def test_there_is_no_kernels_init() -> None:
    assert (ROOT / "kernels" / "nsa" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("kernels", [no_kernels, stand_in, from_pypi])
def test_hub_kernels_is_not_ours(kernels: Callable[[Path], None], installed: Path, tmp_path: Path) -> None:
    site = site_without_kernels(tmp_path / "site")
    kernels(tmp_path / "kernels")
    available, file = import_hub_kernels(ROOT, installed, site, tmp_path / "kernels")
    if kernels is no_kernels:
        assert (available, file) == ("False", "None")
    elif kernels is stand_in:
        assert (available, file) == ("True", str(tmp_path / "kernels" / "kernels" / "__init__.py"))
    else:
        # Which versions Transformers accepts is its own affair; it must not have got ours.
        assert file in ("None", str(tmp_path / "kernels" / "kernels" / "__init__.py"))


def test_the_trap_is_seen(installed: Path, tmp_path: Path) -> None:
    """With a kernels/__init__.py in the folder, the same check gets that one instead of Hugging Face's."""
    site = site_without_kernels(tmp_path / "site")
    stand_in(tmp_path / "kernels")
    root = tmp_path / "root"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels" / "__init__.py").write_text("")
    with pytest.raises(AssertionError, match="cannot import name"):
        import_hub_kernels(root, installed, site, tmp_path / "kernels")
