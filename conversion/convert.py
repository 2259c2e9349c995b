"""Makes an NSA checkpoint of a dense one, every dense tensor kept bit for bit.

    from nsa_hf import convert
    convert("path/to/llama", "path/to/nsa", topk=16)

The source is read once, a few megabytes at a time; what is read is hashed, searched for NaN and infinity and written in
the same pass, so that memory does not grow with the model (transfer.py). Everything is written into a hidden folder
beside OUT, which is renamed at the end, so that OUT is a whole checkpoint or not there (files/staging.py). A conversion
that was killed goes on after its last complete file when it is started again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from transformers import PreTrainedConfig

from nsa_hf.errors import NsaError, check_path
from nsa_hf.families import initial_nsa_state

from . import manifest
from .choices import Record, records
from .files.hashes import HASH
from .files.loading import reading, transformers_progress
from .files.pieces import TensorInfo, pieces_of
from .files.shards import ShardWriter, check_space
from .files.staging import Stage, check_output, resumable_folder
from .options import dtype_name, nsa_options, parse_dtype, target_config
from .sources import Source, open_source
from .tensors import ConvertedTensors, converted_tensors
from .transfer import Advance, ConversionProgress, copy_branch_weights, copy_dense_weights, one_thread


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

        >>> nsa_hf.convert("path/to/llama", "llama-nsa", topk=32).name
        'llama-nsa'
        >>> model = AutoModelForCausalLM.from_pretrained("llama-nsa")

    Args:
        src: a local folder, a .gguf file or a folder with one, or a Hub id.
        out: the folder to write; new or empty unless `overwrite`.
        dtype: of the weights written (float32, bfloat16, float16); None keeps each tensor as it is stored, which for
            GGUF is float32. Another dtype than the source's rounds, and then the result is exact with respect to the
            source *in that dtype*.
        overwrite: replace the model in `out`; it stays until the new one is complete.
        max_shard_size: largest safetensors file, in bytes or like "2GB".
        seed: for the new parameters that are drawn at random, which changes no output before training.
        revision: of a Hub id.
        allow_pickle: read weights that are PyTorch pickles, with `weights_only`.
        trust_remote_code: accept a source whose folder brings its own code; the result runs Transformers' own.
        progress: show bars on standard error.
        options: `nsa_*` fields, with or without the prefix: `topk=4`, `nsa_gate="blend"`; and `rope_scaling="yarn:4"`
            for texts longer than the source was trained on (see rope.py). How blocks are scored, and whether there is
            a compressed branch, is chosen as recommended where it is not given (see nsa_hf/recommend.py).

    Returns:
        `out`: config.json, safetensors (with an index if there are several), manifest.json, and tokenizer, chat
        template and generation config where the source has them.

    Raises:
        NsaError: the source, an option or `out` is not as it must be, or another process is writing `out`; nothing is
            left behind then.
    """
    out = check_path(out)
    target_dtype = parse_dtype(dtype)
    if not isinstance(seed, int) or not -(2**62) <= seed < 2**62:
        raise NsaError(f"seed must be a whole number of at most 62 bits, got {seed!r}")
    requested = {
        **nsa_options(options),
        "dtype": dtype_name(target_dtype) if target_dtype else None,
        "max_shard_size": max_shard_size,
        "seed": seed,
    }
    with transformers_progress(progress):
        check_output(out, overwrite)
        source = open_source(src, revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        check_output(out, overwrite, keep=(source.folder,))
        with reading(source.folder / "config.json"):
            config, choices = target_config(source.config, options, target_dtype)
            expected = converted_tensors(config).as_stored(source.table)
        carried = expected.check(source.table, str(src))
        refuse_integers(source, carried)
        table = {name: _in_dtype(source.table[name], target_dtype) for name in carried}
        table |= {name: TensorInfo(shape, config.dtype) for name, shape in expected.added.items()}
        job = Job(source, config, records(choices, config), expected, table, requested)
        with resumable_folder(out, job.identity(), overwrite) as stage:
            finished = ConversionProgress(stage)
            hashes = _write_weights(stage, job, finished, progress)
            _write_other_files(stage, job, hashes, finished.source_hashes)
    return out


@dataclass(frozen=True)
class Job:
    """A conversion, decided in all its parts before anything is written.

    Attributes:
        source: the dense model.
        config: the converted model's.
        choices: what was chosen for it, for the record (see choices.py).
        expected: the converted model's tensors, under the names that the source uses.
        table: shape and dtype of every tensor that is written, by name, in the order of the manifest.
        requested: what the user asked for, for the record: the options, `dtype`, `max_shard_size` and `seed`.
    """

    source: Source
    config: PreTrainedConfig
    choices: Mapping[str, Record]
    expected: ConvertedTensors
    table: Mapping[str, TensorInfo]
    requested: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        """What decides every byte of the weights; a killed conversion is continued only by the very same job."""
        stats = {path.name: path.stat() for path in sorted(self.source.files())}
        return {
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "folder": str(self.source.folder.resolve()),
            "config": self.config.to_json_string(use_diff=False),
            "asked": dict(self.requested),
            "versions": manifest.versions(),
            "hash": HASH,
        }


def refuse_integers(source: Source, names: list[str]) -> None:
    """Refuses weights that are quantised without saying so.

    Args:
        source: the dense model.
        names: of the tensors that are to be carried over.

    Raises:
        NsaError: a matrix is stored as integers.
    """
    for name in names:
        info = source.table[name]
        if len(info.shape) > 1 and not info.dtype.is_floating_point:
            raise NsaError(
                f"{source.name}: {name} is stored as {dtype_name(info.dtype)}, and nothing says how to make weights of "
                "it: expected float32, bfloat16 or float16"
            )


def _in_dtype(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """A tensor as it is written: in `dtype`, where one was asked for and the tensor is not of integers."""
    return TensorInfo(info.shape, dtype if dtype is not None and info.dtype.is_floating_point else info.dtype)


def _write_weights(stage: Stage, job: Job, finished: ConversionProgress, show_bar: bool) -> dict[str, str]:
    """Writes the safetensors files that are not complete yet.

    Returns:
        The hash of every tensor of the converted model, by name.
    """
    shard_size, on_file = job.requested["max_shard_size"], finished.file_is_complete
    with ShardWriter(stage.folder, job.table, shard_size, on_file=on_file) as writer:
        finished.resume(writer)
        check_space(stage.folder, writer.bytes_to_come)
        with _bar(show_bar, writer) as advance, one_thread():
            copy_dense_weights(job.source, job.expected, writer, finished, advance)
            copy_branch_weights(job.source, job.expected, writer, job.config.dtype, advance)
            for name, tensor in initial_nsa_state(job.config, job.requested["seed"]):
                if writer.is_needed(name):
                    for piece in pieces_of(name, tensor.to(job.config.dtype)):
                        writer.put(name, piece.start, piece.values)
                        advance(piece)
        writer.finish()
    return writer.hashes


def _write_other_files(stage: Stage, job: Job, hashes: Mapping[str, str], source_hashes: Mapping[str, str]) -> None:
    """Writes the config, the source's tokenizer and other files, and the manifest, which describes all of them.

    Args:
        stage: holds the weights already.
        job: the conversion.
        hashes: of every tensor that was written, by name.
        source_hashes: of the source's tensors that were not written as they are, by name.
    """
    job.config.save_pretrained(stage.folder)
    companions = job.source.save_companions(stage.folder)
    read_otherwise = {
        name: manifest.tensor_record(info, "source", source_hashes[name])
        for name, info in job.source.table.items()
        if name in source_hashes
    }
    tensors = {}
    for name, info in job.table.items():
        tensors[name] = manifest.tensor_record(info, "nsa" if name in job.expected.added else "source", hashes[name])
        if name in read_otherwise:
            tensors[name]["source"] = read_otherwise[name]
    left_out = {name: record for name, record in read_otherwise.items() if name not in job.table}
    identity = {**job.source.identity(), "left_out": left_out}
    files = manifest.describe_files(stage.folder)
    record = manifest.build(identity, job.config, job.requested, job.choices, tensors, companions, files)
    manifest.write(stage.folder, record)


@contextmanager
def _bar(shown: bool, writer: ShardWriter) -> Iterator[Advance]:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("Converting"), *columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=writer.bytes_to_come)
        yield lambda piece: bar.advance(task, len(piece.values) * writer.table[piece.name].dtype.itemsize)
