"""Long real text for training and evaluation, as `datasets`: documents, and windows of tokens cut from them.

    windows = training_windows(load_documents("stdlib"), tokenizer, length=2048, count=100, seed=0)

The training text that is on every machine is the Python standard library's source (PSF License), without the held-out
files. A window lies within one document, so that its first tokens say something about its last ones.
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
from nsa_hf.conversion.files.hashes import hash_parts
from nsa_hf.errors import NsaError, check_name, check_path

if TYPE_CHECKING:
    from datasets import Dataset

STANDARD_LIBRARY = "stdlib"
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
TOKEN_BYTES = 40  # memory of a token id: in a Python list, and again in the table made of it
Window = tuple[str, list[int]]  # name and token ids
TABLE_FORMATS = {".json": "json", ".parquet": "parquet", ".csv": "csv"}
LINE_SUFFIXES = {".jsonl", ".ndjson", ".jsonlines"}


def load_documents(source: str) -> Dataset:
    """Reads documents.

    Args:
        source: 'stdlib' (without the held-out files), a text file, a folder of text files, or a .jsonl, .json, .parquet
            or .csv with a column `text`.

    Returns:
        A dataset with columns `name` and `text`, in a fixed order.

    Raises:
        NsaError: there is no text, or it cannot be read.
    """
    if source == STANDARD_LIBRARY:
        return as_dataset(standard_library_texts())
    path = check_path(source)
    if path.is_file() and path.suffix.lower() in TABLE_FORMATS:
        return table_documents(path)
    return as_dataset(named_texts(source))


def named_texts(source: str) -> list[tuple[str, str]]:
    """Name and text of each document, held-out ones of 'stdlib'; needs the package `datasets` for tables only.

    Args:
        source: as `load_documents` takes it.

    Raises:
        NsaError: there is no text, or it cannot be read.
    """
    if source == STANDARD_LIBRARY:
        return held_out_texts()
    path = check_path(source)
    if path.is_dir():
        return folder_texts(path)
    if not path.is_file():
        raise NsaError(f"no text at {source}: give 'stdlib', a text file, a folder, or a .jsonl or .parquet file")
    suffix = path.suffix.lower()
    if suffix in LINE_SUFFIXES:
        return [(f"{path.name}:{line}", text) for line, text in jsonl_texts(path)]
    if suffix in TABLE_FORMATS:
        return [(row["name"], row["text"]) for row in table_documents(path)]
    return [(path.name, read_text(path))]


def held_out_documents(source: str, count: int) -> list[tuple[str, str]]:
    """The first held-out documents.

    Args:
        source: as `load_documents` takes it; of 'stdlib' they are the files that it leaves out.
        count: how many.

    Returns:
        Name and text of each.

    Raises:
        NsaError: there is no text, or it cannot be read.
    """
    if count < 1:
        raise NsaError(f"at least one held-out document is needed, got {count}")
    if source == STANDARD_LIBRARY:
        return held_out_texts(HELD_OUT[:count])
    documents = load_documents(source)
    return [(row["name"], row["text"]) for row in documents.select(range(min(count, len(documents))))]


def standard_library_texts() -> list[tuple[str, str]]:
    """Path and text of the standard library's files that are trained on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT_FOLDERS & set(path.relative_to(root).parts)]
    texts = [(path.relative_to(root).as_posix(), path) for path in files if path.name not in HELD_OUT]
    return [(name, path.read_text(encoding="utf-8", errors="replace")) for name, path in texts]


def folder_texts(folder: Path) -> list[tuple[str, str]]:
    """Path and text of a folder's text files, sorted by path; rows of texts beside them are named, and not read."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if tables := [path for path in paths if path.suffix.lower() in {*LINE_SUFFIXES, ".parquet"}]:
        print(
            f"note: {folder} holds rows of texts ({tables[0].relative_to(folder)}), which are not read with a folder's "
            "text files: to read them, give that file itself",
            file=sys.stderr,
        )
    files = [path for path in paths if path.suffix.lower() in TEXT_SUFFIXES]
    return [(check_name(path).relative_to(folder).as_posix(), read_text(path)) for path in files]


def read_text(path: Path) -> str:
    """A file's text; NsaError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NsaError(f"cannot read {path} as UTF-8 text: {error}") from error


def jsonl_texts(path: Path) -> Iterator[tuple[int, str]]:
    """The number of each row, counted from 0 without empty lines, and its text; NsaError names a line without."""
    row = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                content = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise NsaError(f"{place}: cannot read it as JSON: {str(error)[:200]}") from error
            yield row, text_of(content, place)
            row += 1


def text_of(row: Any, place: str) -> str:
    """A row's text.

    Args:
        place: where the row stands, for messages.

    Raises:
        NsaError: it has none; says what it has instead.
    """
    expected = 'expected a row like {"text": "..."}'
    if not isinstance(row, dict):
        raise NsaError(f"{place}: {expected}, got {kind_of(row)}")
    if "text" not in row:
        chat = ": write each chat out as one text, by the model's chat template" if "messages" in row else ""
        raise NsaError(f"{place}: {expected}, got one with {', '.join(map(str, row)) or 'nothing in it'}{chat}"[:400])
    text = row["text"]
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


def table_documents(path: Path) -> Dataset:
    """The documents in a .json, .parquet or .csv; NsaError when it cannot be read or a row has no text."""
    datasets = import_datasets()
    try:
        table = datasets.load_dataset(TABLE_FORMATS[path.suffix.lower()], data_files=str(path), split="train")
    except Exception as error:  # datasets has no common error of its own
        raise NsaError(f"cannot read {path}: {error.__cause__ or error}") from error
    if "text" not in table.column_names:
        raise NsaError(f"{path} needs a column 'text', has {', '.join(table.column_names)}")
    texts = table.select_columns(["text"])
    if texts.features["text"].dtype not in ("string", "large_string") or texts.data.column("text").null_count:
        for number, row in enumerate(texts, 1):
            text_of(row, f"{path}, row {number}")
    names = [f"{path.name}:{row}" for row in range(len(table))]
    return texts.add_column("name", names)


def as_dataset(texts: list[tuple[str, str]]) -> Dataset:
    """Named texts as a dataset; NsaError when all are empty."""
    if not any(text for _, text in texts):
        raise NsaError("found no text: the folder holds no text files, or they are empty")
    names, bodies = zip(*texts, strict=True)
    return import_datasets().Dataset.from_dict({"name": list(names), "text": list(bodies)})


def training_windows(documents: Dataset, tokenizer: Any, *, length: int, count: int, seed: int) -> Dataset:
    """Cuts windows out of documents, the same ones in the same order for the same seed.

    Documents come in shuffled order and are tokenised until there are enough windows. Each is cut into whole windows;
    what is left over at its end is dropped. A round takes at most an eighth of `count` from one document, and the next
    round goes on behind it. When all text is used up it is read again.

    Args:
        documents: of `load_documents`.
        tokenizer: Transformers'.
        length: tokens of a window.
        count: how many windows.
        seed: of both shuffles, that of the documents and that of the windows.

    Returns:
        A dataset with columns `input_ids` and `name`.

    Raises:
        NsaError: no document is long enough, or the machine's memory is too small.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if count * length * TOKEN_BYTES > memory:
        raise NsaError(
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
            raise NsaError(
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
    """The tokens that the tokenizer puts before a text: [bos] or none."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def held_out_windows(texts: list[tuple[str, str]], tokenizer: Any, length: int) -> list[Window]:
    """The held-out batch, on which a model before and after training is compared.

    Args:
        texts: name and text of each document.
        tokenizer: Transformers'.
        length: tokens that are taken of each, from its beginning.

    Returns:
        Name and token ids of each.

    Raises:
        NsaError: a text has fewer tokens.
    """
    if length < 2:
        raise NsaError(f"a held-out window has at least 2 tokens, one to predict the other from, got {length}")
    # verbose=False: no warning that a whole document is longer than the model's window
    windows = [(name, tokenizer(text, verbose=False)["input_ids"][:length]) for name, text in texts]
    short = [f"{name} ({len(ids)})" for name, ids in windows if len(ids) < length]
    if short:
        raise NsaError(f"held-out texts need {length} tokens, too short: {', '.join(short)}; take a smaller length")
    return windows


def hash_texts(texts: Iterable[tuple[str, str]]) -> str:
    """One hash of named texts: of the names, the texts, where each ends, and their order."""
    written = (part.encode() for named in texts for part in named)
    return hash_parts(chunk for part in written for chunk in (len(part).to_bytes(8, "little"), part))


def hash_windows(windows: Iterable[Sequence[int]]) -> str:
    """One hash of all windows' token ids."""
    return hash_parts(array("q", ids).tobytes() for ids in windows)


def import_datasets() -> Any:
    """The package `datasets`; NsaError says how to install it where it is missing."""
    try:
        import datasets
    except ImportError as error:
        raise NsaError("this needs the package `datasets`: pip install 'nsa-hf[train]'") from error
    return datasets
