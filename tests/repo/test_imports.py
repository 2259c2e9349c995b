"""Who imports whom (kernels <- nsa_hf <- conversion <- recipes), and what `import nsa_hf` needs and does not do."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
PACKAGES: dict[str, str] = SETTINGS["tool"]["setuptools"]["package-dir"]

# Part of the package to the parts that it may import; "nsa_hf" is what lies in that folder itself.
KERNELS, MODEL, CONVERSION, RECIPES, CARDS = (
    "nsa_hf.kernels",
    "nsa_hf",
    "nsa_hf.conversion",
    "nsa_hf.recipes",
    "nsa_hf.model_cards",
)
ARROWS = {
    KERNELS: {KERNELS},
    MODEL: {KERNELS, MODEL},
    CONVERSION: {KERNELS, MODEL, CONVERSION, CARDS},
    RECIPES: {KERNELS, MODEL, CONVERSION, RECIPES, CARDS},
    CARDS: {CARDS},
}
# The operation stands on PyTorch and Triton alone.
KERNELS_MAY_IMPORT = {"torch", "triton"}


def part_of(module: str) -> str:
    """`nsa_hf.kernels.sizes` -> `nsa_hf.kernels`; `nsa_hf.config` -> `nsa_hf`."""
    return max((name for name in ARROWS if module == name or module.startswith(name + ".")), key=len)


def source_files() -> Iterator[tuple[str, Path]]:
    """Every module of the package: its dotted name and its file."""
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *names)).removesuffix(".__init__"), path


def imports(source: str, module: str, is_package: bool, modules: Collection[str] = ARROWS) -> Iterator[tuple[str, int]]:
    """What a module's source imports, as absolute names, and in which line; `import_module("x")` counts.

    Args:
        modules: names that `from package import name` imports as modules of their own; others are the package's.
    """
    package = module if is_package else module.rpartition(".")[0]

    def absolute(name: str, level: int) -> str:
        parents = package.split(".")[: package.count(".") + 2 - level] if level else []
        return ".".join([*parents, name] if name else parents)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level)
            # `from nsa_hf import conversion` imports nsa_hf.conversion, `from nsa_hf import config` does not.
            for name in (f"{base}.{alias.name}" for alias in node.names):
                yield name if name in modules else base, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                name = str(node.args[0].value)
                yield absolute(name.lstrip("."), len(name) - len(name.lstrip("."))), node.lineno


def is_lazy(source: str, line: int) -> bool:
    """Whether a line stands in the module's `__getattr__` (PEP 562) or under `if TYPE_CHECKING:`."""
    return any(
        node.lineno <= line <= (node.end_lineno or 0)
        for node in ast.parse(source).body
        if (isinstance(node, ast.FunctionDef) and node.name == "__getattr__")
        or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
    )


def wrong_imports(module: str, source: str, is_package: bool) -> list[str]:
    """The imports of a module that go against the arrows, said in words."""
    here = part_of(module)
    wrong = []
    for name, line in imports(source, module, is_package):
        top = name.partition(".")[0]
        if top == "nsa_hf":
            # The one exception: nsa_hf.convert comes from nsa_hf.conversion, lazily.
            good = part_of(name) in ARROWS[here] or (module == "nsa_hf" and is_lazy(source, line))
        elif here == KERNELS:
            good = top in KERNELS_MAY_IMPORT | sys.stdlib_module_names
        else:
            # `from conversion import plan` would only work in this folder.
            good = top not in {"kernels", "conversion", "recipes", "model_cards"}
        if not good:
            wrong.append(f"{module}, line {line}: imports {name}")
    return wrong


def test_imports_go_one_way() -> None:
    files = list(source_files())
    assert {part_of(module) for module, _ in files} == set(ARROWS)
    wrong = [
        line
        for module, path in files
        for line in wrong_imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nsa_hf.kernels.sizes", "from nsa_hf.config import NsaLlamaConfig"),
        ("nsa_hf.kernels.sizes", "from .. import config"),
        ("nsa_hf.kernels.sizes", "import transformers"),
        ("nsa_hf.config", "def f():\n    from .conversion.plan import plan"),
        ("nsa_hf.config", "from . import conversion"),
        ("nsa_hf.config", "import importlib\nimportlib.import_module('nsa_hf.conversion')"),
        ("nsa_hf.config", "import_module('.recipes', 'nsa_hf')"),
        ("nsa_hf.conversion.plan", "from ..recipes import cli"),
        ("nsa_hf.config", "import nsa_hf.model_cards.card as card"),
        ("nsa_hf.model_cards.card", "import nsa_hf"),
        ("nsa_hf.recipes.cli", "from conversion import plan"),
    ],
)
def test_an_import_against_the_arrows_is_seen(module: str, source: str) -> None:
    assert len(wrong_imports(module, source, is_package=False)) == 1


def test_the_lazy_reexport_is_the_one_exception() -> None:
    lazy = "def __getattr__(name):\n    from nsa_hf.conversion import convert\n    return convert\n"
    assert wrong_imports("nsa_hf", lazy, is_package=True) == []
    assert len(wrong_imports("nsa_hf", lazy.replace("__getattr__", "convert"), is_package=True)) == 1
    assert len(wrong_imports("nsa_hf.config", lazy, is_package=False)) == 1


def import_graph(files: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """Which modules of the package each one imports, anywhere in its source; a package stands for its `__init__`.

    Args:
        files: dotted name to source, and whether it is a package.
    """
    graph: dict[str, set[str]] = {}
    for module, (source, is_package) in files.items():
        # nsa_hf.convert, lazily, is the one import against the arrows
        names = {name for name, _ in imports(source, module, is_package, files.keys())}
        graph[module] = {name for name in names if name in files and name != module}
        if module == "nsa_hf":
            graph[module].discard(CONVERSION)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The modules that import each other, directly or through others: one list for each such set."""

    def reached_from(start: str) -> set[str]:
        reached: set[str] = set()
        new = {start}
        while new:
            new = set().union(*(graph[module] for module in new)) - reached
            reached |= new
        return reached

    reached = {module: reached_from(module) for module in graph}
    sets = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return sorted(sorted(one) for one in sets if one)


def test_no_modules_import_each_other() -> None:
    """Imports inside functions count: they only put a circle off."""
    files = {name: (path.read_text(encoding="utf-8"), path.name == "__init__.py") for name, path in source_files()}
    assert circles(import_graph(files)) == []


def test_a_circle_is_seen() -> None:
    files = {
        "nsa_hf": ("def __getattr__(name):\n    from nsa_hf.conversion import convert", True),
        "nsa_hf.conversion": ("from nsa_hf import errors", True),
        "nsa_hf.errors": ("", False),
        "nsa_hf.families": ("from .modeling import NsaModelMixin", False),
        "nsa_hf.modeling": ("def from_dense():\n    from . import from_dense", False),
        "nsa_hf.from_dense": ("import importlib\nimportlib.import_module('.families', 'nsa_hf')", False),
    }
    assert circles(import_graph(files)) == [["nsa_hf.families", "nsa_hf.from_dense", "nsa_hf.modeling"]]
    files["nsa_hf.modeling"] = ("", False)
    assert circles(import_graph(files)) == []


def test_everything_imported_is_declared() -> None:
    """In the dependencies or an extra of pyproject.toml; the standard library and our own files need not be."""
    extras = PROJECT["optional-dependencies"]
    declared = {
        re.split(r"[\[<>=; ]", line)[0].lower().replace("-", "_")
        for line in (*PROJECT["dependencies"], *itertools.chain(*extras.values()))
    }
    tests = sorted((ROOT / "tests").rglob("*.py"))
    files = [*source_files(), *((path.stem, path) for path in tests)]
    imported = {
        name.partition(".")[0]
        for module, path in files
        for name, _ in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    }
    assert {"torch", "transformers", "pytest"} <= imported
    import_names = {"pyyaml": "yaml"}
    own = {"nsa_hf", *(path.stem for path in tests)}
    assert imported - own - sys.stdlib_module_names <= {import_names.get(name, name) for name in declared}


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


# Every attempt to reach another machine raises; none can be made behind it.
NO_NETWORK = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise OSError(f"network used: {event} {arguments}")
sys.addaudithook(refuse)
"""
NO_TRITON = """
import sys
sys.modules["triton"] = None
"""
# Bigger things that a user of the model may not have, or should not wait for.
NOT_NEEDED = {
    "datasets",
    "matplotlib",
    "gguf",
    "peft",
    "trl",
    "jinja2",
    "typer",
    "pandas",
    "pyarrow",
    "pytest",
    "nsa_hf.conversion",
    "nsa_hf.recipes",
    "nsa_hf.model_cards",
    "transformers.trainer",
}


def test_no_network_hook_works(tmp_path: Path) -> None:
    code = NO_NETWORK + "import urllib.request\nurllib.request.urlopen('http://192.0.2.1', timeout=5)"
    result = python(code, tmp_path)
    assert "network used" in result.stderr


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_import_needs_no_network_gpu_or_triton(where: str, tmp_path: Path) -> None:
    code = f"""{NO_NETWORK}{NO_TRITON}
import nsa_hf
import torch
assert not torch.cuda.is_initialized()
from transformers import AutoConfig
assert AutoConfig.for_model("nsa_llama").model_type == "nsa_llama"
"""
    result = python(code, ROOT if where == "root" else tmp_path, CUDA_VISIBLE_DEVICES="", HF_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_import_brings_nothing_heavy(tmp_path: Path) -> None:
    """Compared with Transformers' own Llama and Auto classes, which may bring what is installed."""
    transformers_alone = "import transformers.models.llama.modeling_llama, transformers.models.auto.modeling_auto\n"
    code = "import json, sys\n{}\nprint(json.dumps(sorted(sys.modules)))"
    loaded = []
    for first in (transformers_alone, "import nsa_hf"):
        result = python(code.format(first), tmp_path)
        assert result.returncode == 0, result.stderr
        loaded.append(set(json.loads(result.stdout.splitlines()[-1])))
    assert "nsa_hf" in loaded[1]
    assert (loaded[1] - loaded[0]) & NOT_NEEDED == set()


def test_every_module_imports_without_network(tmp_path: Path) -> None:
    """All of them, the kernels where Triton is installed."""
    names = [module for module, _ in source_files()]
    code = f"""{NO_NETWORK}
import importlib
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
"""
    result = python(code, tmp_path, HF_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
