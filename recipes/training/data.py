"""Long real text for training and evaluation, as `datasets`: documents, and windows of tokens cut from them.

    windows = training_windows(load_documents("stdlib"), tokenizer, length=2048, count=100, seed=0)

The training text that is on every machine is the Python standard library's source (PSF License), without the held-out
files. A window lies within one document, so that what is far back belongs to what is predicted.
"""

from __future__ import annotations

import json
import os
import random
import sys
import sysconfig
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_hf.conversion.compare.texts import HELD_OUT, held_out_texts
from nsa_hf.conversion.files.checkpoint import hash_parts
from nsa_hf.errors import NsaError, check_name, check_path

if TYPE_CHECKING:
    from datasets import Dataset

STANDARD_LIBRARY = "stdlib"
# Not in every installation of one Python version, or tables that nobody writes by hand.
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
TOKEN_BYTES = 40  # of a token id in a list of Python's, and again in the table made of it
Window = tuple[str, list[int]]  # name and token ids
TABLE_FORMATS = {".json": "json", ".parquet": "parquet", ".csv": "csv"}
LINE_SUFFIXES = {".jsonl", ".ndjson", ".jsonlines"}


class DataError(NsaError):
    """Text that is missing, too short or cannot be read."""


def load_documents(source: str) -> Dataset:
    """Documents as a dataset with columns `name` and `text`, in a fixed order.

    `source`: 'stdlib' (held-out files excluded), a text file, a folder of text files, or a .jsonl, .json, .parquet or
    .csv with a column `text`. DataError when there is no text.
    """
    if source == STANDARD_LIBRARY:
        return as_dataset(standard_library_texts())
    path = check_path(source)
    if path.is_dir():
        return as_dataset(folder_texts(path))
    if not path.is_file():
        raise DataError(f"no text at {source}: give 'stdlib', a text file, a folder, or a .jsonl or .parquet file")
    suffix = path.suffix.lower()
    if suffix in LINE_SUFFIXES:
        return as_dataset([(f"{path.name}:{line}", text) for line, text in jsonl_texts(path)])
    if suffix in TABLE_FORMATS:
        return table_documents(path)
    return as_dataset([(path.name, read_text(path))])


def held_out_documents(source: str, count: int) -> list[tuple[str, str]]:
    """The first `count` held-out documents as (name, text); of 'stdlib' the files that `load_documents` leaves out."""
    if count < 1:
        raise DataError(f"at least one held-out document is needed, got {count}")
    if source == STANDARD_LIBRARY:
        return held_out_texts(HELD_OUT[:count])
    documents = load_documents(source)
    return [(row["name"], row["text"]) for row in documents.select(range(min(count, len(documents))))]


def standard_library_texts() -> list[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT_FOLDERS & set(path.relative_to(root).parts)]
    texts = [(path.relative_to(root).as_posix(), path) for path in files if path.name not in HELD_OUT]
    return [(name, path.read_text(encoding="utf-8", errors="replace")) for name, path in texts]


def folder_texts(folder: Path) -> list[tuple[str, str]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    if tables := [path for path in found if path.suffix.lower() in {*LINE_SUFFIXES, ".parquet"}]:
        print(
            f"note: {folder} holds rows of texts ({tables[0].relative_to(folder)}), which are not read with a folder's "
            "text files: to read them, give that file itself",
            file=sys.stderr,
        )
    files = [path for path in found if path.suffix.lower() in TEXT_SUFFIXES]
    return [(check_name(path).relative_to(folder).as_posix(), read_text(path)) for path in files]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error


def jsonl_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Each row's number, counted from 0 without empty lines, and its text. DataError names the line that has none."""
    row = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                found = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: cannot read it as JSON: {str(error)[:200]}") from error
            yield row, text_of(found, place)
            row += 1


def text_of(row: Any, place: str) -> str:
    """A row's text. DataError says what it has instead."""
    expected = 'expected a row like {"text": "..."}'
    if not isinstance(row, dict):
        raise DataError(f"{place}: {expected}, got {kind_of(row)}")
    if "text" not in row:
        chat = ": write each chat out as one text, by the model's chat template" if "messages" in row else ""
        raise DataError(f"{place}: {expected}, got one with {', '.join(map(str, row)) or 'nothing in it'}{chat}"[:400])
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f"{place}: {expected}, got {kind_of(text)} as its text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: half a character (a lone surrogate) in its text: {error}"[:400]) from error
    return text


def kind_of(value: Any) -> str:
    """What JSON calls it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return kinds.get(type(value), f"the {type(value).__name__} {str(value)[:40]}")


def table_documents(path: Path) -> Dataset:
    datasets = import_datasets()
    try:
        table = datasets.load_dataset(TABLE_FORMATS[path.suffix.lower()], data_files=str(path), split="train")
    except Exception as error:  # datasets has no common error of its own
        raise DataError(f"cannot read {path}: {error.__cause__ or error}") from error
    if "text" not in table.column_names:
        raise DataError(f"{path} needs a column 'text', has {', '.join(table.column_names)}")
    texts = table.select_columns(["text"])
    if texts.features["text"].dtype not in ("string", "large_string") or texts.data.column("text").null_count:
        for number, row in enumerate(texts, 1):
            text_of(row, f"{path}, row {number}")
    names = [f"{path.name}:{row}" for row in range(len(table))]
    return texts.add_column("name", names)


def as_dataset(texts: list[tuple[str, str]]) -> Dataset:
    if not any(text for _, text in texts):
        raise DataError("found no text: the folder holds no text files, or they are empty")
    names, bodies = zip(*texts, strict=True)
    return import_datasets().Dataset.from_dict({"name": list(names), "text": list(bodies)})


def training_windows(documents: Dataset, tokenizer: Any, *, length: int, count: int, seed: int) -> Dataset:
    """`count` windows of `length` tokens (columns `input_ids`, `name`), the same ones in the same order for a seed.

    Documents come in shuffled order and are tokenised only until there is enough; each is cut into whole windows, what
    is left over at its end is dropped. A round takes at most an eighth of `count` from one document, the next goes on
    behind it; when all text is used up it is read again. DataError when no document is long enough, or memory is not.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if count * length * TOKEN_BYTES > memory:
        raise DataError(
            f"{count:,} windows of {length:,} tokens do not fit into the {memory / 1e9:.0f} GB of this machine, where "
            "they are made before training begins: lower steps, accumulate, batch_size or length"
        )
    rows: list[dict[str, Any]] = []
    share = max(1, count // 8)
    turn = first = 0
    while len(rows) < count:
        before = len(rows)
        for row in windows_of(documents.shuffle(seed=seed + turn), tokenizer, length, first, first + share):
            rows.append(row)
            if len(rows) == count:
                break
        if len(rows) == before and first == 0:
            raise DataError(
                f"none of the {len(documents)} documents has {length} tokens: give longer texts or a smaller length"
            )
        first = first + share if len(rows) > before else 0
        turn += 1
    random.Random(seed).shuffle(rows)
    return import_datasets().Dataset.from_list(rows)


def windows_of(documents: Dataset, tokenizer: Any, length: int, first: int, end: int) -> Iterator[dict[str, Any]]:
    """Windows `first` to `end - 1` of every document that has them; each begins as the tokenizer begins a text."""
    opening = opening_tokens(tokenizer)
    body = length - len(opening)
    for row in documents:
        # a token has at least one byte
        if len(row["text"].encode()) < body * (first + 1):
            continue
        ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(first * body, min(end * body, len(ids) - body + 1), body):
            yield {"input_ids": opening + ids[start : start + body], "name": f"{row['name']}@{start}"}


def opening_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: [bos] or nothing."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def held_out_windows(texts: list[tuple[str, str]], tokenizer: Any, length: int) -> list[Window]:
    """The first `length` tokens of each text as (name, ids): the fixed batch that before and after are compared on."""
    if length < 2:
        raise DataError(f"a held-out window has at least 2 tokens, one to predict the other from, got {length}")
    # verbose=False: no warning that a whole document is longer than the model's window
    windows = [(name, tokenizer(text, verbose=False)["input_ids"][:length]) for name, text in texts]
    short = [f"{name} ({len(ids)})" for name, ids in windows if len(ids) < length]
    if short:
        raise DataError(f"held-out texts need {length} tokens, too short: {', '.join(short)}; take a smaller length")
    return windows


def hash_texts(texts: Iterable[tuple[str, str]]) -> str:
    """One hash of all texts, by what they say, where each ends, their order and their names."""
    written = (part.encode() for named in texts for part in named)
    return hash_parts(piece for part in written for piece in (len(part).to_bytes(8, "little"), part))


def hash_windows(windows: Iterable[Sequence[int]]) -> str:
    """One hash of all windows' token ids."""
    return hash_parts(array("q", ids).tobytes() for ids in windows)


def import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise NsaError("this needs the package `datasets`: pip install 'nsa-hf[train]'") from error
    return datasets
