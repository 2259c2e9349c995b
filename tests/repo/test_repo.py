"""What the documents promise: the commands and files that they name exist, and no file names a machine's folder."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer.main
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"]
FOLDERS = ["nsa_hf", "kernels", "conversion", "recipes", "model_cards", "docs", "tests", ".ci"]


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
    assert {"setup", "demo", "test", "test-all", "gpu", "lint", "typecheck", "clean", "help"} <= make_targets()


def test_commands_named_in_documents_exist() -> None:
    from nsa_hf.recipes.commands import app

    commands = set(typer.main.get_command(app).commands)
    named = {name for doc in DOCUMENTS for name in re.findall(r"nsa-hf ([a-z][a-z-]*)", (ROOT / doc).read_text())}
    assert {"plan", "convert", "verify", "train", "generate", "card"} <= named
    assert named <= commands


def test_links_in_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{document}: {target}"


def test_files_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    names = set(re.findall(r"\b((?:kernels|nsa_hf|conversion|recipes|model_cards|tests)/[\w./-]*\w)", text))
    assert "recipes/runs/demo.yaml" in names
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_the_tree_is_the_repositorys() -> None:
    """One line for each file that is more than a package's __init__, under the line of its folder."""
    tree = (ROOT / "docs" / "architecture.md").read_text().partition("## The tree\n")[2]
    named, folders = set(), [""]
    for indent, name in re.findall(r"^ {4}( *)(\S+)  +\S", tree, flags=re.MULTILINE):
        above = folders[: len(indent) // 2 + 1]
        if name.endswith("/"):
            folders = [*above, above[-1] + name]
        else:
            named.add(above[-1] + name)
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kernels", "nsa_hf", "conversion", "recipes", "model_cards")
        for ending in ("*.py", "*.yaml", "*.j2")
        for path in (ROOT / folder).rglob(ending)
        if path.name != "__init__.py"
    }
    assert named == files


def test_hooks_need_nothing_from_outside() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for repo in config["repos"] for hook in repo["hooks"]} == {"system"}
