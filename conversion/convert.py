"""A dense checkpoint to an NSA checkpoint, every dense tensor carried bit for bit.

    from nsa_hf import convert
    convert("path/to/llama", "path/to/nsa", topk=16)

The source is read once, a few megabytes at a time; what is read is hashed, looked at for NaN and infinity and written
in the same pass, so that memory does not grow with the model. Everything is written into a hidden folder beside OUT
and renamed at the end, so OUT is a whole checkpoint or not there. A conversion that was killed goes on after its last
complete file when it is started again (see staging.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor
from transformers import PreTrainedConfig

from nsa_hf.branches import dense_twin
from nsa_hf.errors import NsaError, check_path
from nsa_hf.families import initial_nsa_state

from . import manifest
from .files.casts import Casts
from .files.checkpoint import HASH, HASHES, CheckpointError, Piece, TensorInfo, byte_view, pieces_of
from .files.loading import reading, transformers_progress
from .files.shards import ShardWriter, check_space
from .files.staging import Stage, check_output, resumable_folder
from .layout import Layout, dtype_name, layout_of, nsa_options, parse_dtype, target_config
from .sources import Source, open_source


def convert(
    src: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: str | int = "2GB",
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Converts a dense model.

    Args:
        src: a local folder, a .gguf file or a folder with one, or a Hub id.
        out: the folder to write; new or empty unless `overwrite`.
        dtype: of the weights written (float32, bfloat16, float16); None keeps each tensor as it is stored, which for
            GGUF is float32 (see source.py). Another dtype than the source's rounds, and then the result is exact with
            respect to the source *in that dtype*.
        overwrite: replace the model in `out`; it stays until the new one is complete.
        max_shard_size: largest safetensors file, in bytes or like "2GB".
        seed: of the new parameters' random part, which changes no output before training.
        revision: of a Hub id.
        allow_pickle: read weights that are PyTorch pickles, with `weights_only`.
        trust_remote_code: accept a source whose folder brings its own code; the result runs Transformers' own.
        progress: show bars on standard error.
        options: `nsa_*` fields, with or without the prefix: `topk=4`, `nsa_gate="blend"`; and `rope_scaling="yarn:4"`
            for texts longer than the source was trained on (see rope.py).

    Returns:
        `out`: config.json, safetensors (with an index if there are several), manifest.json, and tokenizer, chat
        template and generation config where the source has them.

    Raises:
        NsaError: the source, an option or `out` is not as it must be, or another process is writing `out`; nothing is
            left behind then.
    """
    out = check_path(out)
    as_dtype = parse_dtype(dtype)
    if not isinstance(seed, int) or not -(2**62) <= seed < 2**62:
        raise NsaError(f"seed must be a whole number of at most 62 bits, got {seed!r}")
    asked = {
        **nsa_options(options),
        "dtype": dtype_name(as_dtype) if as_dtype else None,
        "max_shard_size": max_shard_size,
        "seed": seed,
    }
    with transformers_progress(progress):
        check_output(out, overwrite)
        source = open_source(src, revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        check_output(out, overwrite, keep=(source.folder,))
        with reading(source.folder / "config.json"):
            config = target_config(source.config, options, as_dtype)
            layout = layout_of(config).as_stored(source.table)
        names = layout.check(source.table, str(src))
        refuse_integers(source, names)
        with resumable_folder(out, _job(source, config, asked), overwrite) as stage:
            _write(stage, source, config, layout, names, as_dtype, asked, progress)
    return out


def refuse_integers(source: Source, names: list[str]) -> None:
    """Refuses weights that are quantised without saying so.

    Raises:
        CheckpointError: a matrix is stored as integers.
    """
    for name in names:
        info = source.table[name]
        if len(info.shape) > 1 and not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{source.name}: {name} is stored as {dtype_name(info.dtype)}, and nothing says how to make weights of "
                "it: expected float32, bfloat16 or float16"
            )


def _job(source: Source, config: PreTrainedConfig, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What decides every byte of the weights; a killed conversion is continued only by the very same job."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(source.files())}
    return {
        "files": files,
        "folder": str(source.folder.resolve()),
        "config": config.to_json_string(use_diff=False),
        "asked": dict(asked),
        "versions": manifest.versions(),
        "hash": HASH,
    }


def _write(
    stage: Stage,
    source: Source,
    config: PreTrainedConfig,
    layout: Layout,
    names: list[str],
    dtype: torch.dtype | None,
    asked: Mapping[str, Any],
    progress: bool,
) -> None:
    kept = {name: TensorInfo(source.table[name].shape, _target(source.table[name].dtype, dtype)) for name in names}
    table = {**kept, **{name: TensorInfo(shape, config.dtype) for name, shape in layout.added.items()}}
    done = Done(stage)
    with ShardWriter(stage.folder, table, asked["max_shard_size"], on_file=done.add_file) as writer:
        done.take_up(writer)
        check_space(stage.folder, writer.bytes_to_come)
        with _bar(progress, writer) as advance, one_thread():
            carry(source, layout, kept, writer, done, advance)
            copy_twins(source, layout, writer, config.dtype, advance)
            for name, tensor in initial_nsa_state(config, asked["seed"]):
                if writer.is_needed(name):
                    for piece in pieces_of(name, tensor.to(config.dtype)):
                        writer.put(name, piece.start, piece.values)
                        advance(piece)
        writer.finish()
    config.save_pretrained(stage.folder)
    companions = source.save_companions(stage.folder)
    tensors = {
        name: manifest.entry(info, "source" if name in kept else "nsa", writer.hashes[name])
        | ({"source": manifest.entry(source.table[name], "source", done.sources[name])} if name in done.sources else {})
        for name, info in table.items()
    }
    left_out = {
        name: manifest.entry(info, "source", done.sources[name])
        for name, info in source.table.items()
        if name not in kept
    }
    identity = {**source.identity(), "left_out": left_out}
    files = manifest.describe_files(stage.folder)
    manifest.write(stage.folder, manifest.build(identity, config, asked, tensors, companions, files))


class Done:
    """What is done of a conversion, noted in its stage.

    Attributes:
        sources: hashes of the source's tensors that are not written as they are, by name: cast to another dtype, or
            left out (copies of a tied tensor, and what the family ignores).
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        before = stage.progress()
        self.files: dict[str, dict[str, str]] = before.get("files", {})
        self.sources: dict[str, str] = before.get("sources", {})

    def take_up(self, writer: ShardWriter) -> None:
        """Gives the writer the files that are complete, and removes whatever else is there."""
        self.writer = writer
        self.files = {file: hashes for file, hashes in self.files.items() if writer.adopt(file, hashes)}
        for path in self.stage.folder.iterdir():
            if path.name not in self.files:
                path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)

    def add_file(self, file: str) -> None:
        """Notes that a file is complete."""
        self.files[file] = {name: self.writer.hashes[name] for name in self.writer.split.filename_to_tensors[file]}
        self.stage.save_progress({"files": self.files, "sources": self.sources})


def carry(
    source: Source,
    layout: Layout,
    kept: Mapping[str, TensorInfo],
    writer: ShardWriter,
    done: Done,
    advance: Callable[[Piece], None] = lambda piece: None,
) -> None:
    """Reads the source and puts its tensors into the writer, checked and in the dtype of `kept`.

    Raises:
        CheckpointError: NaN or infinity in a tensor, or a stored copy of a tied tensor that differs from the original.
    """
    ties = {copy: original for copy, original in layout.tied.items() if copy in source.table}
    # the writer takes the hash of what is written as it is
    others = {
        name
        for name, info in source.table.items()
        if (name not in kept or kept[name].dtype != info.dtype) and name not in done.sources
    }
    needed = {name for name in kept if writer.is_needed(name)}
    digests = {name: HASHES[HASH]() for name in others}
    casts, bad, cause = Casts(), 0, ""
    for piece in source.pieces(needed | others):
        name = piece.name
        if name in others:
            digests[name].update(byte_view(piece.values).numpy().data)
            if piece.last:
                done.sources[name] = digests[name].hexdigest()
        if name not in needed:
            continue
        values, uses = casts.to(piece, kept[name].dtype)
        if count := count_not_finite(values):
            bad += count
            cause = _cause(piece.values, kept[name].dtype)
        if bad and piece.last:
            raise CheckpointError(
                f"{source.name}: {name} {cause} {bad} NaN or infinite values of {piece.start + len(values)}"
            )
        uses.append(writer.put(name, piece.start, values))
        advance(piece)
    hashes = {**writer.hashes, **done.sources}
    for copy, original in ties.items():
        if hashes[copy] != hashes[original] or source.table[copy] != source.table[original]:
            raise CheckpointError(
                f"{source.name}: the config ties {copy} to {original}, but the file holds two different tensors: "
                "set tie_word_embeddings to false in its config.json, or drop one"
            )


def copy_twins(
    source: Source, layout: Layout, writer: ShardWriter, dtype: torch.dtype, advance: Callable[[Piece], None]
) -> None:
    """Puts the new parameters that start as dense ones into the writer: keys and values of each branch."""
    copies: dict[str, list[str]] = {}
    for name in filter(writer.is_needed, layout.added):
        if (twin := dense_twin(name)) is not None:
            copies.setdefault(twin, []).append(name)
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


def _target(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.is_floating_point else stored


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps PyTorch from splitting small pieces among threads, which would wait for each other busily."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _bar(shown: bool, writer: ShardWriter) -> Iterator[Callable[[Piece], None]]:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("Converting"), *columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=writer.bytes_to_come)
        yield lambda piece: bar.advance(task, len(piece.values) * writer.table[piece.name].dtype.itemsize)
