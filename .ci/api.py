"""docs/api.md, made of the docstrings of what is public: `make api` writes it, `python .ci/api.py --check` compares.

Sources are read and nothing is imported: the page is the same whatever is installed. Public is what stands in `__all__`
of the three packages, the fields of the config, and the methods in `METHODS`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
# A package as it is imported, where it lies, and what is in it.
PACKAGES = {
    "nsa_hf": ("nsa_hf", "Convert, and make a config."),
    "nsa_hf.conversion": ("conversion", "What the commands `plan`, `convert`, `verify`, `merge`, `export-dense` do."),
    "nsa_hf.kernels": ("kernels/nsa", "The operation; PyTorch and Triton only."),
}
# Of every sparse class (`nsa_hf.NsaLlamaForCausalLM` and its like), beside what its dense class has.
METHODS = {
    "nsa_hf/in_memory.py": ("FromDenseMixin", ["from_dense"]),
    "nsa_hf/modeling.py": (
        "NsaPreTrainedMixin",
        ["dense_attention", "record_selection", "record_attention", "set_gate_blend"],
    ),
}
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def main() -> None:
    page = render()
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if PAGE.is_file() and PAGE.read_text() == page else "docs/api.md is not current: make api")
    PAGE.write_text(page)
    print(f"{PAGE.relative_to(ROOT)}: {page.count(chr(10))} lines")


def render() -> str:
    """The whole page."""
    seen: set[str] = set()
    links = ", ".join(f"[`{name}`](#{name.replace('.', '')})" for name in PACKAGES)
    own = "[the config's fields](#the-configs-fields), [a sparse model](#a-sparse-model)"
    parts = [
        "# API\n",
        f"Made of the docstrings by `make api`: {links},\n{own}. Words: [glossary](architecture.md#glossary).\n",
        "## The config's fields\n",
        "Options of `nsa_hf.convert`, `from_dense` and `nsa-hf convert`, with or without `nsa_`.\n",
        fields_table(),
        "## A sparse model\n",
        "A sparse class is its dense family's, `nsa_hf.NsaLlamaForCausalLM` for one, and has besides:\n",
    ]
    for path, (owner, names) in METHODS.items():
        body = one(definitions(ROOT / path), owner, path)
        assert isinstance(body, ast.ClassDef)
        methods = {node.name: node for node in body.body if isinstance(node, ast.FunctionDef)}
        parts += [entry(name, one(methods, name, path)) for name in names]
    for package, (folder, about) in PACKAGES.items():
        parts += [f"## {package}\n", f"{about}\n"]
        for name, node in sorted(public(ROOT / folder).items(), key=lambda item: item[0].lower()):
            parts.append(f"`{name}` is [the one above](#{name}).\n" if name in seen else entry(name, node))
            seen.add(name)
    return "\n".join(parts).rstrip() + "\n"


def one(table: dict, name: str, where: str) -> Definition:
    """A definition by name; ends the program where it is gone."""
    if name not in table:
        sys.exit(f"{where} has no {name} any more: bring .ci/api.py up to date")
    return table[name]


def definitions(path: Path) -> dict[str, Definition]:
    """What a module defines at its top, by name."""
    found: dict[str, Definition] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def public(folder: Path) -> dict[str, Definition]:
    """What stands in a package's `__all__`, by name, wherever in it or another package it is defined."""
    tree = ast.parse((folder / "__init__.py").read_text())
    imports = {
        alias.asname or alias.name: (node.level, node.module or "")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    listed = definitions(folder / "__init__.py")["__all__"].value
    assert listed is not None
    found = {}
    for name in ast.literal_eval(listed):
        if name.startswith("__"):
            continue
        level, module = imports[name]
        home, _ = PACKAGES.get(module, (folder, ""))  # another package of ours, or a module of this one
        if level == 0:
            found[name] = one(public(ROOT / home), name, module)
        else:
            path = folder.joinpath(*module.split(".")).with_suffix(".py")
            found[name] = one(definitions(path), name, str(path))
    return found


def entry(name: str, node: Definition) -> str:
    """A name with its signature and docstring."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        assert node.value is not None
        return f"### {name}\n\n    {name} = {shortened(ast.unparse(node.value))}\n"
    text = docstring(ast.get_docstring(node) or "")
    return f"### {name}\n\n{signature(name, node)}\n\n{text}"


def shortened(text: str) -> str:
    """A value that fits in a line."""
    return text if len(text) <= 100 else f"{text[:97]}..."


def signature(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """As one calls it, in an indented block; of a class as it is made."""
    if isinstance(node, ast.ClassDef):
        made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if not made:
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            return f"    class {name}({bases})" if bases else f"    class {name}"
        arguments, result = made[0].args, "class "
        end = ""
    else:
        arguments, result = node.args, ""
        end = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return "\n".join(f"    {line}" for line in wrapped(f"{result}{name}", arguments, end))


def wrapped(name: str, arguments: ast.arguments, end: str) -> list[str]:
    """A call in one line, or an argument a line."""
    # as ruff writes it: a default of an annotated argument stands between spaces
    pieces = [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", piece) for piece in split(ast.unparse(arguments))]
    pieces = pieces[1:] if pieces and pieces[0] in ("self", "cls") else pieces
    line = f"{name}({', '.join(pieces)}){end}"
    return [line] if len(line) <= 100 else [f"{name}(", *(f"    {piece}," for piece in pieces), f"){end}"]


def split(arguments: str) -> list[str]:
    """Arguments at the commas that stand in no brackets."""
    pieces, depth, last = [], 0, 0
    for place, letter in enumerate(arguments):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            pieces.append(arguments[last:place].strip())
            last = place + 1
    return [piece for piece in (*pieces, arguments[last:].strip()) if piece]


def docstring(text: str) -> str:
    """A docstring in Google's form as Markdown: its sections in bold, their entries as lists."""
    lines: list[str] = []
    blocks = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(text), flags=re.MULTILINE)
    lines += [blocks[0].strip(), ""]
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        # what follows a section at the margin is text again
        inside, _, after = re.sub(r"\n+(?=\S)", "\f", body, count=1).partition("\f")
        inside = textwrap.dedent(inside).strip()
        if title in ("Args", "Attributes", "Raises"):
            inside = re.sub(r"^(\*{0,2}\w[\w, .*]*): ", r"- `\1`: ", inside, flags=re.MULTILINE)
            inside = re.sub(r"^ {4}", "  ", inside, flags=re.MULTILINE)
        elif title.startswith("Example"):
            inside = "\n".join(f"    {line}".rstrip() for line in inside.splitlines())
        lines += [f"**{title}**", "", inside, "", *([after.strip(), ""] if after.strip() else [])]
    return "\n".join(lines)


def fields_table() -> str:
    """The `nsa_*` fields: default, choices and what each is."""
    body = definitions(ROOT / "nsa_hf" / "fields.py")
    owner, constants = one(body, "NsaFields", "nsa_hf/fields.py"), {"NSA_FORMAT": one(body, "NSA_FORMAT", "fields.py")}
    assert isinstance(owner, ast.ClassDef)
    rows = ["| field | type | default | |", "| --- | --- | --- | --- |"]
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            default, text = node.value.args[:2]
            if isinstance(default, ast.Name):
                value = constants[default.id].value
                assert value is not None
                default = value
            kind = ast.unparse(node.annotation).replace(" | None", " or None")
            cells = [f"`{ast.unparse(node.target)}`", kind, f"`{ast.unparse(default)}`", ast.literal_eval(text)]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
