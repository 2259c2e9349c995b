"""Texts to train on or to measure with, each read when it is asked for.

    texts = open_texts("corpus/train.jsonl")
    len(texts), texts[0]                    # how many, and name and text of the first
    open_texts("hub:owner/name:train")      # streamed: it has no length

A source is 'stdlib' (the Python standard library's source, which is on every machine, without the held-out files), a
text file, a folder of text files, a .jsonl, .json, .parquet or .csv with a column of texts, or a data set of the
Hugging Face Hub.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nsa_hf.conversion.compare.texts import HELD_OUT, held_out_texts
from nsa_hf.errors import NsaError, check_name, check_path

STANDARD_LIBRARY, ON_THE_HUB = "stdlib", "hub:"
HUB = re.compile(
    r"hub:(?P<name>[^/:@\s]+(/[^/:@\s]+)?)(/(?P<config>[^/:@\s]+))?(@(?P<revision>[^:\s]+))?(:(?P<split>\S+))?"
)
# What not every installation of one Python version has, and tables that nobody writes by hand.
LEFT_OUT_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".html", ".tex"}
TABLE_FORMATS = {".json": "json", ".parquet": "parquet", ".csv": "csv"}
LINE_SUFFIXES = {".jsonl", ".ndjson", ".jsonlines"}
Named = tuple[str, str]  # name and text


class FileTexts(Sequence[Named]):
    """Text files, by the names that they go by."""

    def __init__(self, files: Sequence[tuple[str, Path]], errors: str = "strict"):
        self.files, self.errors = files, errors

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        name, path = self.files[index]
        return name, read_text(path, self.errors)


class RowTexts(Sequence[Named]):
    """The rows of a file of JSON lines; only where each begins is kept in memory. Rows are checked when it is made.

    Raises:
        NsaError: a row has no text; names the line.
    """

    def __init__(self, path: Path, column: str):
        self.path, self.column = path, column
        self.begins, self.lines = array("q"), array("q")
        with path.open("rb") as file:
            begin = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    row_text(line, f"{path}, line {number}", column)
                    self.begins.append(begin)
                    self.lines.append(number)
                begin += len(line)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: Any) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.begins[index])
            text = row_text(file.readline(), f"{self.path}, line {self.lines[index]}", self.column)
        return f"{self.path.name}:{index % len(self)}", text


class TableTexts(Sequence[Named]):
    """The rows of a table that `datasets` maps from the disk. Rows without text are found when it is made.

    Raises:
        NsaError: the table cannot be read or a row has no text.
    """

    def __init__(self, path: Path, column: str):
        self.path, self.column = path, column
        datasets = import_datasets()
        try:
            table = datasets.load_dataset(TABLE_FORMATS[path.suffix.lower()], data_files=str(path), split="train")
        except Exception as error:  # datasets has no common error of its own
            raise NsaError(f"cannot read {path}: {error.__cause__ or error}") from error
        if column not in table.column_names:
            raise NsaError(f"{path} needs a column {column!r}, has {', '.join(table.column_names)}")
        self.rows = table.select_columns([column])
        kind = self.rows.features[column].dtype
        if kind not in ("string", "large_string") or self.rows.data.column(column).null_count:
            for number, row in enumerate(self.rows, 1):
                text_of(row, f"{path}, row {number}", column)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return f"{self.path.name}:{index % len(self)}", self.rows[index][self.column]


class HubTexts:
    """A data set of the Hub, streamed: read from its beginning, in an order that follows from a seed.

    Attributes:
        source: as it was given.
        revision: the commit that is read, whatever is uploaded later.
    """

    def __init__(self, source: str, column: str = "text", revision: str | None = None):
        """Finds the data set.

        Args:
            source: "hub:owner/name", behind it "/config", "@revision" and ":split" where they are not the usual ones.
            column: that has the texts.
            revision: the commit to read; None asks the Hub which one it is now.

        Raises:
            NsaError: it is not there, or the Hub cannot be reached.
        """
        found = HUB.fullmatch(source)
        if not found:
            raise NsaError(f"expected hub:owner/name[/config][@revision][:split], got {source!r}")
        self.source, self.column, self.parts = source, column, found
        self.revision = revision or self.ask(lambda: hub_revision(found["name"], found["revision"]))

    def shuffled(self, seed: int) -> Iterator[Named]:
        """Name and text of each row, in the order of `seed`; NsaError where a row has no text or cannot be had."""
        rows = self.ask(self.load)
        # whole files change places, and rows near each other
        rows = iter(rows.shuffle(seed=seed, buffer_size=BUFFER))
        for number in range(sys.maxsize):
            row = self.ask(lambda: next(rows, None))
            if row is None:
                return
            yield f"{self.source}:{number}", text_of(row, f"{self.source}, row {number}", self.column)

    def first(self, count: int) -> list[Named]:
        """Name and text of the first rows, as they stand in the data set."""
        rows = self.ask(lambda: list(self.load().take(count)))
        return [
            (f"{self.source}:{n}", text_of(row, f"{self.source}, row {n}", self.column)) for n, row in enumerate(rows)
        ]

    def load(self) -> Any:
        """The data set as `datasets` streams it."""
        return import_datasets().load_dataset(
            self.parts["name"],
            self.parts["config"],
            split=self.parts["split"] or "train",
            revision=self.revision,
            streaming=True,
        )

    def ask(self, call: Any) -> Any:
        """What `call` gives; an NsaError names the source where it raises."""
        try:
            return call()
        except NsaError:
            raise
        except Exception as error:  # neither datasets nor the Hub's client has a common error
            raise NsaError(f"cannot read {self.source}: {type(error).__name__}: {str(error)[:300]}") from error


BUFFER = 1000  # rows of a streamed data set that change places


def hub_revision(name: str, revision: str | None) -> str:
    """The commit of a data set that a branch, a tag or None (its main branch) stands for."""
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(name, revision=revision).sha)


def open_texts(source: str, column: str = "text", revision: str | None = None) -> Sequence[Named] | HubTexts:
    """The texts of a source, of 'stdlib' those that are trained on.

    Args:
        source: see the top of this file.
        column: that has the texts, where the source has columns.
        revision: the commit to read of a data set of the Hub; None asks which one it is now.

    Raises:
        NsaError: there is no text, or it cannot be read.
    """
    if source == STANDARD_LIBRARY:
        return FileTexts(standard_library_files(), errors="replace")
    if source.startswith(ON_THE_HUB):
        return HubTexts(source, column, revision)
    path = check_path(source)
    suffix = path.suffix.lower()
    texts: Sequence[Named]
    if path.is_dir():
        texts = FileTexts(folder_files(path))
    elif not path.is_file():
        raise NsaError(
            f"no text at {source}: give 'stdlib', a text file, a folder, a .jsonl, .json, .parquet or .csv file, or "
            "hub:owner/name"
        )
    elif suffix in LINE_SUFFIXES:
        texts = RowTexts(path, column)
    elif suffix in TABLE_FORMATS:
        texts = TableTexts(path, column)
    else:
        texts = FileTexts([(check_name(path).name, path)])
    if not any(text for _, text in texts):
        raise NsaError(f"found no text in {source}: the folder holds no text files, or all is empty")
    return texts


def named_texts(source: str) -> list[Named]:
    """Name and text of each document, held-out ones of 'stdlib'; needs the package `datasets` for tables only.

    Args:
        source: see the top of this file, but for the Hub.

    Raises:
        NsaError: there is no text, or it cannot be read.
    """
    if source == STANDARD_LIBRARY:
        return held_out_texts()
    texts = open_texts(source)
    if isinstance(texts, HubTexts):
        raise NsaError(f"{source} is streamed and has no end: give texts on this machine's disk")
    return list(texts)


def standard_library_files() -> list[tuple[str, Path]]:
    """Name and path of the standard library's files that are trained on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT_FOLDERS & set(path.relative_to(root).parts)]
    return [(path.relative_to(root).as_posix(), path) for path in files if path.name not in HELD_OUT]


def folder_files(folder: Path) -> list[tuple[str, Path]]:
    """Name and path of a folder's text files, sorted; rows of texts beside them are named, and not read."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if tables := [path for path in paths if path.suffix.lower() in {*LINE_SUFFIXES, ".parquet"}]:
        print(
            f"note: {folder} holds rows of texts ({tables[0].relative_to(folder)}), which are not read with a folder's "
            "text files: to read them, give that file itself",
            file=sys.stderr,
        )
    files = [path for path in paths if path.suffix.lower() in TEXT_SUFFIXES]
    return [(check_name(path).relative_to(folder).as_posix(), path) for path in files]


def read_text(path: Path, errors: str = "strict") -> str:
    """A file's text; NsaError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeDecodeError) as error:
        raise NsaError(f"cannot read {path} as UTF-8 text: {error}") from error


def row_text(line: bytes, place: str, column: str) -> str:
    """The text of a line of JSON.

    Args:
        place: where the line stands, for messages.
        column: that has it.

    Raises:
        NsaError: it has none, or is no JSON.
    """
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise NsaError(f"{place}: cannot read it as JSON: {str(error)[:200]}") from error
    return text_of(content, place, column)


def text_of(row: Any, place: str, column: str = "text") -> str:
    """A row's text.

    Args:
        place: where the row stands, for messages.
        column: that has it.

    Raises:
        NsaError: it has none; says what it has instead.
    """
    expected = f'expected a row like {{"{column}": "..."}}'
    if not isinstance(row, dict):
        raise NsaError(f"{place}: {expected}, got {kind_of(row)}")
    if column not in row:
        chat = ": write each chat out as one text, by the model's chat template" if "messages" in row else ""
        raise NsaError(f"{place}: {expected}, got one with {', '.join(map(str, row)) or 'nothing in it'}{chat}"[:400])
    text = row[column]
    if not isinstance(text, str):
        raise NsaError(f"{place}: {expected}, got {kind_of(text)} as its text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NsaError(f"{place}: half a character (a lone surrogate) in its text: {error}"[:400]) from error
    return text


def kind_of(value: Any) -> str:
    """A value's kind, as JSON calls it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return kinds.get(type(value), f"the {type(value).__name__} {str(value)[:40]}")


def import_datasets() -> Any:
    """The package `datasets`; NsaError says how to install it where it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise NsaError("this needs the package `datasets`: pip install 'nsa-hf[train]'") from error
    return datasets
