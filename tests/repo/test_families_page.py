"""docs/families.md: the features that it explains are the table's, and the classes that it shows are the real ones."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

import pytest
import torch

import nsa_hf

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "families.md").read_text()
(SHOWN,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
CLASSES = [node for node in ast.parse(SHOWN).body if isinstance(node, ast.ClassDef)]


def test_every_feature_of_the_table_is_explained() -> None:
    with (ROOT / "recipes" / "results" / "families.csv").open() as file:
        features = {row["feature"] for row in csv.DictReader(file) if row["feature"]}
    section = TEXT.partition("## What is refused, and why\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| (.+?) \| [A-Z]", section, flags=re.MULTILINE)) == features


def test_all_classes_of_the_family_are_shown() -> None:
    model = tiny_qwen3()
    sparse = {type(part).__name__ for part in model.modules()} | {type(model.config).__name__}
    assert {name for name in sparse if name.startswith("NsaQwen3")} == {node.name for node in CLASSES}


@pytest.mark.parametrize("node", CLASSES, ids=lambda node: node.name)
def test_the_shown_class_is_the_real_one(node: ast.ClassDef) -> None:
    real = getattr(nsa_hf, node.name)
    assert [ast.unparse(base) for base in node.bases] == [base.__name__ for base in real.__bases__]
    for line in node.body:
        if isinstance(line, ast.Assign):
            (target,) = line.targets
            value = getattr(real, ast.unparse(target))
            assert ast.unparse(line.value) == (value.__name__ if isinstance(value, type) else repr(value))
        else:
            assert isinstance(line, ast.AnnAssign)
            parts = [getattr(part, ast.unparse(line.target)) for part in tiny_qwen3().modules() if type(part) is real]
            parts = list(parts[0]) if isinstance(line.annotation, ast.Subscript) else parts
            expected = ast.unparse(line.annotation).removeprefix("list[").removesuffix("]")
            assert parts and {type(part).__name__ for part in parts} == {expected}


def test_the_bases_are_imported_from_where_they_are() -> None:
    names: dict[str, type] = {}
    exec("\n".join(ast.unparse(node) for node in ast.parse(SHOWN).body if isinstance(node, ast.ImportFrom)), names)
    for node in CLASSES:
        real = getattr(nsa_hf, node.name)
        assert [names[ast.unparse(base)] for base in node.bases] == list(real.__bases__)


def tiny_qwen3() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = nsa_hf.NsaQwen3Config(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=32)
    with torch.device("meta"):
        return nsa_hf.NsaQwen3ForCausalLM(config)
