"""docs/api.md is what the docstrings say now, and how .ci/api.py reads them."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def api():
    spec = spec_from_file_location("api", ROOT / ".ci" / "api.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current() -> None:
    result = subprocess.run([sys.executable, str(ROOT / ".ci" / "api.py"), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_on_the_page(api) -> None:
    import nsa_hf
    import nsa_hf.conversion
    import nsa_hf.kernels

    page = api.render()
    for package in (nsa_hf, nsa_hf.conversion, nsa_hf.kernels):
        names = {name for name in package.__all__ if not name.startswith("__")}
        assert [name for name in sorted(names) if f"### {name}\n" not in page] == []
    assert all(f"| `{name}` |" in page for name in nsa_hf.NSA_FIELDS)


def test_a_docstring_becomes_lists_and_text(api) -> None:
    text = """What it does.

    Args:
        a, b: two
            lines.
        options: more.

    Returns:
        A thing: whole.

    Behind it.
    """
    lines = [line for line in api.docstring(text).splitlines() if line]
    bold = ["What it does.", "**Args**", "- `a, b`: two", "  lines.", "- `options`: more."]
    assert lines == [*bold, "**Returns**", "A thing: whole.", "Behind it."]


def test_a_signature_is_what_one_calls(api) -> None:
    node = ast.parse("class A:\n    def f(self, x: dict[str, int] = {}, *, y=(1, 2)) -> int: ...").body[0].body[0]
    assert api.signature("f", node) == "    f(x: dict[str, int] = {}, *, y=(1, 2)) -> int"
    many = ast.parse(f"def g({', '.join(f'argument_{i}: int' for i in range(9))}): ...").body[0]
    assert api.signature("g", many).splitlines()[1] == "        argument_0: int,"
