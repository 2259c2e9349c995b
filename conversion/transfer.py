"""The source's weights into the converted model's files, a few megabytes at a time, each byte read and checked once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from nsa_hf.branches import dense_twin
from nsa_hf.errors import NsaError

from .files.casts import Casts
from .files.hashes import HASH, HASHES
from .files.pieces import Piece, byte_view
from .files.shards import ShardWriter
from .files.staging import Stage
from .options import dtype_name
from .sources import Source
from .tensors import ConvertedTensors

# Called for every piece that was handed to the writer.
Advance = Callable[[Piece], None]


class ConversionProgress:
    """What is finished of a conversion, noted in its stage for the process that goes on should this one be killed.

    Attributes:
        files: of each complete file, the hashes of its tensors by name.
        source_hashes: hashes, by name, of the source's tensors that are not written as they are: those that are cast to
            another dtype, and those that are left out (copies of tied tensors, and what the family ignores).
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        noted = stage.progress()
        self.files: dict[str, dict[str, str]] = noted.get("files", {})
        self.source_hashes: dict[str, str] = noted.get("sources", {})

    def resume(self, writer: ShardWriter) -> None:
        """Gives the writer the files that are complete, and removes everything else from the stage."""
        self.writer = writer
        self.files = {file: hashes for file, hashes in self.files.items() if writer.adopt(file, hashes)}
        for path in self.stage.folder.iterdir():
            if path.name not in self.files:
                path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)

    def file_is_complete(self, file: str) -> None:
        """Notes that a file, given by its name, is complete."""
        self.files[file] = {name: self.writer.hashes[name] for name in self.writer.split.filename_to_tensors[file]}
        self.stage.save_progress({"files": self.files, "sources": self.source_hashes})


def copy_dense_weights(
    source: Source,
    expected: ConvertedTensors,
    writer: ShardWriter,
    progress: ConversionProgress,
    advance: Advance,
) -> None:
    """Reads the source and puts its tensors into the writer, checked and in the dtypes of the writer's table.

    Args:
        source: the dense model.
        expected: the converted model's tensors.
        writer: of the converted model.
        progress: gets the hashes of the source's tensors that are not written as they are.
        advance: called for every piece that is written.

    Raises:
        NsaError: NaN or infinity in a tensor, or a stored copy of a tied tensor that differs from the original.
    """
    target = writer.table
    # the writer takes the hash of what is written as it is
    hashed_here = {
        name
        for name, info in source.table.items()
        if (name not in target or target[name].dtype != info.dtype) and name not in progress.source_hashes
    }
    needed = {name for name in source.table if name in target and writer.is_needed(name)}
    digests = {name: HASHES[HASH]() for name in hashed_here}
    casts, not_finite, cause = Casts(), 0, ""
    for piece in source.pieces(needed | hashed_here):
        name = piece.name
        if name in hashed_here:
            digests[name].update(byte_view(piece.values).numpy().data)
            if piece.last:
                progress.source_hashes[name] = digests[name].hexdigest()
        if name not in needed:
            continue
        values, uses = casts.to(piece, target[name].dtype)
        if count := count_not_finite(values):
            not_finite += count
            cause = _cause(piece.values, target[name].dtype)
        if not_finite and piece.last:
            raise NsaError(
                f"{source.name}: {name} {cause} {not_finite} NaN or infinite values of {piece.start + len(values)}"
            )
        uses.append(writer.put(name, piece.start, values))
        advance(piece)
    check_ties(source, expected, {**writer.hashes, **progress.source_hashes})


def check_ties(source: Source, expected: ConvertedTensors, hashes: Mapping[str, str]) -> None:
    """Makes sure that tensors which the config ties are equal where the source stores both.

    Args:
        source: the dense model.
        expected: the converted model's tensors.
        hashes: of all the source's tensors, by name.

    Raises:
        NsaError: two are not.
    """
    for copy, original in expected.tied.items():
        if copy not in source.table:
            continue
        if hashes[copy] != hashes[original] or source.table[copy] != source.table[original]:
            raise NsaError(
                f"{source.name}: the config ties {copy} to {original}, but the file holds two different tensors: "
                "set tie_word_embeddings to false in its config.json, or drop one"
            )


def copy_branch_weights(
    source: Source, expected: ConvertedTensors, writer: ShardWriter, dtype: torch.dtype, advance: Advance
) -> None:
    """Puts the new parameters that start as copies of dense ones into the writer: keys and values of each branch.

    Args:
        source: the dense model.
        expected: the converted model's tensors.
        writer: of the converted model.
        dtype: of new parameters.
        advance: called for every piece that is written.
    """
    copies: dict[str, list[str]] = {}
    for name in filter(writer.is_needed, expected.added):
        if (original := dense_twin(name)) is not None:
            copies.setdefault(original, []).append(name)
    if not copies:
        return
    casts = Casts()
    for piece in source.pieces(copies):
        values, uses = casts.to(piece, dtype)
        for name in copies[piece.name]:
            uses.append(writer.put(name, piece.start, values))
            advance(piece)


def count_not_finite(values: Tensor) -> int:
    """How many of `[n]` values are NaN or infinite; none of integers."""
    if not values.dtype.is_floating_point or not len(values):
        return 0
    # one pass instead of isfinite's four: NaN and infinity show in the extremes
    low, high = torch.aminmax(values)
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int((~torch.isfinite(values)).sum())


def _cause(stored: Tensor, target: torch.dtype) -> str:
    return "holds" if count_not_finite(stored) else f"does not fit {dtype_name(target)}: it would hold"


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps PyTorch from splitting small pieces among threads, which would wait for each other busily."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
