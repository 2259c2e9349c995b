"""What the documents promise: the commands and files that they name exist, and no file names a machine's folder.

Whether the code in them runs: test_documents.py. Whether the figures are right: test_measured.py.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import typer.main
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/README.md",
    *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]
# What docs/extending.md has a reader make, and what CONTRIBUTING.md says there must not be, or any of many.
EXAMPLES = {
    "kernels/nsa/gpu/mean.py",
    "tests/kernels/test_triton_mean.py",
    "kernels/__init__.py",
    "conversion/files/x.py",
    "tests/conversion/test_x.py",
}
FOLDERS = ["nsa_hf", "kernels", "conversion", "recipes", "model_cards", "docs", "examples", "tests", ".ci"]


def text_files() -> list[Path]:
    """Every text file of the repository."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    hidden = [ROOT / ".gitignore", ROOT / ".pre-commit-config.yaml"]
    endings = {".py", ".md", ".toml", ".yaml", ".txt", ".j2", ".csv", ".json", ".sh", ""}
    return [path for path in (*ROOT.glob("[!.]*"), *inside, *hidden) if path.is_file() and path.suffix in endings]


def test_no_file_names_a_machines_folder() -> None:
    pattern = re.compile(r"(?<![\w.:/])/(?:home|root|work|Users|opt|mnt|tmp)/[\w.]+")
    allowed = {"/tmp/demo"}
    files = text_files()
    assert ROOT / "pyproject.toml" in files
    found = {
        f"{path.relative_to(ROOT)}: {match}"
        for path in files
        for match in pattern.findall(path.read_text(encoding="utf-8"))
        if match not in allowed
    }
    assert found == set()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("document", [*DOCUMENTS, ".ci/run", ".pre-commit-config.yaml"])
def test_make_targets_named_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    # In code only: a line that begins with it, or between backquotes.
    named = re.findall(r"(?:^ *|`|entry: )make ([a-z-]+)", text, flags=re.MULTILINE)
    assert set(named) <= make_targets()


def test_make_help_names_every_target() -> None:
    text = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)) == make_targets()
    assert {"setup", "demo", "test", "test-all", "gpu", "lint", "typecheck", "dist", "clean", "help"} <= make_targets()


def test_commands_named_in_documents_exist() -> None:
    from nsa_hf.recipes.commands import app

    commands = set(typer.main.get_command(app).commands)
    named = {name for doc in DOCUMENTS for name in re.findall(r"nsa-hf ([a-z][a-z-]*)", (ROOT / doc).read_text())}
    assert {"plan", "convert", "verify", "train", "generate", "card"} <= named
    assert named <= commands


def test_the_start_page_names_every_command() -> None:
    from nsa_hf.recipes.commands import app

    named = re.findall(r"^\| `nsa-hf ([a-z-]+)", (ROOT / "docs" / "start.md").read_text(), flags=re.MULTILINE)
    assert set(named) == set(typer.main.get_command(app).commands)


def test_options_and_settings_named_in_documents_exist() -> None:
    """Of a whole command in one line. What `serve` takes besides is Transformers'."""
    from nsa_hf.recipes.commands import app
    from nsa_hf.recipes.training.config import RunConfig

    commands = typer.main.get_command(app).commands
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    lines = re.findall(r"nsa-hf ([a-z][a-z-]*)([^`#\n]*)", text)
    options = {(name, option) for name, rest in lines for option in re.findall(r"--[a-z][a-z-]*", rest)}
    assert ("generate", "--prompt-file") in options
    for name, option in options:
        known = {spelling for parameter in commands[name].params for spelling in parameter.opts}
        assert option in {*known, "--help"} or name == "serve", f"nsa-hf {name} {option}"
    settings = {key for name, rest in lines if name == "train" for key in re.findall(r" ([a-z_]+)=", rest)}
    assert {"model", "out", "steps"} <= settings <= set(RunConfig.__dataclass_fields__)


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_in_documents_lead_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document}: {link}"
        assert not heading or heading in headings(target), f"{document}: {link}"


def test_tests_that_hold_a_statement_exist() -> None:
    """Named as `tests/...py::test_...`."""
    named = {
        found for name in DOCUMENTS for found in re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / name).read_text())
    }
    assert named
    assert [pair for pair in sorted(named) if f"def {pair[1]}(" not in (ROOT / pair[0]).read_text()] == []


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_files_named_in_documents_exist(document: str) -> None:
    """Paths that begin with a folder of the repository, but for those of a tree, and of the changelog's past."""
    text = re.sub(r"^ {4} *\S+  +.*$", "", (ROOT / document).read_text(), flags=re.MULTILINE)
    folders = "kernels|nsa_hf|conversion|recipes|model_cards|tests|docs|examples|\\.ci"
    names = set(re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", text)) - EXAMPLES
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_modules_that_documents_run_exist() -> None:
    from importlib.util import find_spec

    named = {name for doc in DOCUMENTS for name in re.findall(r"-m (nsa_hf[\w.]*)", (ROOT / doc).read_text())}
    assert "nsa_hf.recipes.train" in named
    assert [name for name in sorted(named) if find_spec(name) is None] == []


def test_modules_have_gone_where_the_changelog_says() -> None:
    from importlib.util import find_spec

    moved = re.findall(r"-> (?:the same in )?`(nsa_hf[\w.]+)`", (ROOT / "CHANGELOG.md").read_text())
    assert "nsa_hf.recipes.benchmarks.operation" in moved
    assert [name for name in moved if find_spec(name) is None] == []


def test_readme_is_short_and_begins_with_what_one_can_do() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 125
    assert lines.index("```python") < 40
    assert [line for line in lines[:20] if line.startswith("    make demo ")]


def test_the_readme_counts_the_families_that_the_table_has() -> None:
    with (ROOT / "recipes" / "results" / "families.csv").open() as file:
        rows = list(csv.DictReader(file))
    exact, newest = Counter(row["result"] for row in rows)["exact"], rows[0]["transformers"].rpartition(".")[0]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{exact} of Transformers {newest}'s {len(rows)} causal language models" in text


def test_what_make_gpu_watches_can_be_imported() -> None:
    """`.ci/every_kernel.py` takes its shapes from the tests; it is stopped here before it needs a GPU."""
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / ".ci" / "every_kernel.py"), "1/1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "a part is 0/N to N-1/N, got 1/1" in result.stderr


def test_the_tree_is_the_repositorys() -> None:
    """One line for each file that is more than a package's __init__, under the line of its folder."""
    tree = (ROOT / "docs" / "architecture.md").read_text().partition("## The tree\n")[2].partition("\n## ")[0]
    named, folders = set(), [""]
    for indent, name in re.findall(r"^ {4}( *)(\S+)  +\S", tree, flags=re.MULTILINE):
        above = folders[: len(indent) // 2 + 1]
        if name.endswith("/"):
            folders = [*above, above[-1] + name]
        else:
            named.add(above[-1] + name)
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kernels", "nsa_hf", "conversion", "recipes", "model_cards", ".ci")
        for ending in ("*.py", "*.yaml", "*.j2", "*.toml", "run")
        for path in (ROOT / folder).rglob(ending)
        if path.name != "__init__.py"
    }
    assert named == files


def test_hooks_need_nothing_from_outside() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for repo in config["repos"] for hook in repo["hooks"]} == {"system"}
