"""The set-up that `make` does by itself: once, with a Python that is new enough, never over an environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for a Python: notes how it was called, and makes an "environment" of itself.
PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >> "{log}"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*) exit {install} ;;
  "-c "*) exec "{real}" "$@" ;;
esac
"""


class Sandbox:
    """The Makefile in a folder of its own, with Pythons that only note what they are asked."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)

    def python(self, name: str, install: int = 0, real: str = sys.executable) -> Path:
        path = self.folder / name
        path.write_text(PYTHON.format(log=self.log, install=install, real=real))
        path.chmod(0o755)
        return path

    def make(self, *arguments: str) -> tuple[int, str, list[str]]:
        """Exit code, what was printed, and the calls of Python, but for those that only ask."""
        self.log.unlink(missing_ok=True)
        # what is given to a `make test` that runs this test is in its environment: `make test VENV=`
        given = re.findall(r"^([A-Z_]+) \?=", (self.folder / "Makefile").read_text(), flags=re.MULTILINE)
        environment = {k: x for k, x in os.environ.items() if not k.startswith("MAKE") and k not in given}
        result = subprocess.run(["make", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True)
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        doing = [call for call in calls if call.split()[1] != "-c" and not call.endswith("-m pip --version")]
        return result.returncode, result.stdout + result.stderr, doing


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_set_up_is_done_once(sandbox: Sandbox) -> None:
    python = sandbox.python("python3.11")
    code, _, calls = sandbox.make("setup", f"PYTHON={python}")
    assert (code, calls) == (
        0,
        ["python3.11 -m venv .venv", "python -m pip install -c constraints.txt -e .[dev]"],
    )
    assert sandbox.make("setup", f"PYTHON={python}")[2] == []
    assert sandbox.make("typecheck", f"PYTHON={python}")[2] == ["python .ci/typecheck.py"]


def test_new_dependencies_do_not_make_the_environment_anew(sandbox: Sandbox) -> None:
    """Least of all with another Python: `python -m venv` over an environment mixes the two."""
    sandbox.make("setup", f"PYTHON={sandbox.python('python3.11')}")
    stamp = (sandbox.folder / ".venv" / ".ready").stat().st_mtime
    os.utime(sandbox.folder / "pyproject.toml", (stamp + 5, stamp + 5))
    calls = sandbox.make("setup", f"PYTHON={sandbox.python('python3.12')}")[2]
    assert calls == ["python -m pip install -c constraints.txt -e .[dev]"]


def test_a_failed_installation_is_tried_again(sandbox: Sandbox) -> None:
    code, _, _ = sandbox.make("test", f"PYTHON={sandbox.python('python3.11', install=1)}")
    assert code != 0
    assert not (sandbox.folder / ".venv" / ".ready").exists()
    calls = sandbox.make("test", f"PYTHON={sandbox.python('python3.11')}")[2]
    assert calls[0] == "python -m pip install -c constraints.txt -e .[dev]"


def test_without_constraints(sandbox: Sandbox) -> None:
    """On a machine with a GPU."""
    calls = sandbox.make("setup", f"PYTHON={sandbox.python('python3.11')}", "CONSTRAINTS=", "PIP_ARGS=--pre")[2]
    assert calls[1] == "python -m pip install --pre -e .[dev]"
    assert sandbox.make("setup")[2] == []


def test_a_python_as_it_is(sandbox: Sandbox) -> None:
    code, _, calls = sandbox.make("gpu", "VENV=", f"PYTHON={sandbox.python('python3.11')}", "ARGS=tests")
    assert (code, calls) == (0, ["python3.11 .ci/gpu.py tests"])


def test_an_old_python_is_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text(
        f"#!{sys.executable}\nimport collections, sys\nVersion = collections.namedtuple('Version', 'major minor')\n"
        "sys.version_info = Version(3, 9)\nexec(sys.argv[2])\n"
    )
    old.chmod(0o755)
    code, text, calls = sandbox.make("test", f"PYTHON={sandbox.python('python3', real=str(old))}")
    assert code != 0
    assert "is Python 3.9, but 3.11 or newer is needed" in text
    assert calls == []
