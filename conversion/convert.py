"""A dense checkpoint to an NSA checkpoint, every dense tensor carried bit for bit.

    from nsa_hf import convert
    convert("path/to/llama", "path/to/nsa", topk=16)

Tensors are streamed: at most the shards being filled are in memory. Everything is written into a hidden folder beside
OUT and renamed at the end, so OUT is a whole checkpoint or not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from nsa_hf.errors import NsaError
from nsa_hf.families import initial_nsa_state

from . import manifest
from .checkpoint import INDEX, CheckpointError, TensorInfo, same_bits
from .layout import Layout, dtype_name, layout_of, nsa_options, parse_dtype, target_config
from .loading import transformers_progress
from .source import Source, open_source
from .staging import OutputError, check_output, staged_folder, write_json


def convert(
    src: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: str | int = "2GB",
    seed: int = 0,
    revision: str | None = None,
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
        progress: show bars on standard error.
        options: `nsa_*` fields, with or without the prefix: `topk=4`, `nsa_gate="blend"`.

    Returns:
        `out`: config.json, safetensors (with an index if there are several), manifest.json, and tokenizer, chat
        template and generation config where the source has them.

    Raises:
        NsaError: the source, an option or `out` is not as it must be; nothing is left behind then.
    """
    out = Path(out).expanduser()
    as_dtype = parse_dtype(dtype)
    nsa_options(options)
    with transformers_progress(progress):
        check_output(out, overwrite)
        source = open_source(src, revision)
        check_output(out, overwrite, keep=(source.folder,))
        config = target_config(source.config, options, as_dtype)
        layout = layout_of(config)
        names = layout.check(source.table, str(src))
        with staged_folder(out, overwrite) as stage:
            _write(stage, source, config, layout, names, as_dtype, max_shard_size, seed, progress, options)
    return out


def _write(
    stage: Path,
    source: Source,
    config: PreTrainedConfig,
    layout: Layout,
    names: list[str],
    dtype: torch.dtype | None,
    max_shard_size: str | int,
    seed: int,
    progress: bool,
    options: Mapping[str, Any],
) -> None:
    kept = {
        name: TensorInfo(info.shape, _target(info.dtype, dtype)) for name, info in source.table.items() if name in names
    }
    added = {name: TensorInfo(shape, config.dtype) for name, shape in layout.added.items()}
    writer = ShardWriter(stage, {**kept, **added}, max_shard_size)
    stream = chain(
        carried_tensors(source, layout, dtype),
        ((name, tensor.to(config.dtype)) for name, tensor in initial_nsa_state(config, seed)),
    )
    described = {}
    bar = {"total": len(kept) + len(added), "disable": not progress, "console": Console(stderr=True)}
    for name, tensor in track(stream, "Converting", **bar):  # type: ignore[arg-type]
        described[name] = manifest.describe(tensor, "source" if name in kept else "nsa")
        writer.add(name, tensor)
    writer.finish()
    config.save_pretrained(stage)
    companions = source.save_companions(stage)
    for file in writer.split.filename_to_tensors:  # safetensors makes files that only their owner can read
        shutil.copymode(stage / "config.json", stage / file)
    asked = {
        **nsa_options(options),
        "dtype": dtype_name(dtype) if dtype else None,
        "max_shard_size": max_shard_size,
        "seed": seed,
    }
    manifest.write(stage, manifest.build(source.identity(), config, asked, described, companions))


def carried_tensors(source: Source, layout: Layout, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors that an NSA checkpoint keeps, floating ones in `dtype` (None: as stored), checked.

    Raises:
        CheckpointError: NaN or infinity in a tensor, or a stored copy of a tied tensor that differs from the original.
    """
    stored_twice = {copy: original for copy, original in layout.tied.items() if copy in source.table}
    held: dict[str, Tensor] = {}
    for name, tensor in source.tensors():
        if name in stored_twice or name in stored_twice.values():
            held[name] = tensor
        if name in layout.dense:
            yield name, _checked(name, tensor, dtype, source.name)
    for name, original in stored_twice.items():
        if not same_bits(held[name], held[original]):
            raise CheckpointError(
                f"{source.name}: the config ties {name} to {original}, but the file holds two different tensors: "
                "set tie_word_embeddings to false in its config.json, or drop one"
            )


def _checked(name: str, tensor: Tensor, dtype: torch.dtype | None, source: str) -> Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor
    target = tensor.to(_target(tensor.dtype, dtype))
    if not torch.isfinite(target).all():
        bad = int((~torch.isfinite(target)).sum())
        cause = (
            "holds" if not torch.isfinite(tensor).all() else f"does not fit {dtype_name(target.dtype)}: it would hold"
        )
        raise CheckpointError(f"{source}: {name} {cause} {bad} NaN or infinite values of {tensor.numel()}")
    return target


def _target(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.is_floating_point else stored


class ShardWriter:
    """Writes tensors that come one by one into safetensors files, named and split as Transformers does.

    Args:
        folder: where the files go.
        table: shape and dtype of every tensor to come, by name.
        max_shard_size: of one file, in bytes or like "2GB".

    Raises:
        NsaError: a size that cannot be read.
    """

    def __init__(self, folder: Path, table: Mapping[str, TensorInfo], max_shard_size: str | int):
        self.folder = folder
        try:
            self.split = split_state_dict_into_shards_factory(
                dict(table),
                get_storage_size=lambda info: info.nbytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise NsaError(f"max_shard_size must be a number of bytes or like '2GB', got {max_shard_size!r}") from error
        self.open: dict[str, dict[str, Tensor]] = {}
        self.lacking = set(table)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor; writes its file once that is complete."""
        self.lacking.remove(name)
        file = self.split.tensor_to_filename[name]
        shard = self.open.setdefault(file, {})
        shard[name] = tensor.contiguous()
        if len(shard) == len(self.split.filename_to_tensors[file]):
            try:
                save_file(self.open.pop(file), self.folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OutputError(f"cannot write {file} into {self.folder.parent}: {error}") from error

    def finish(self) -> None:
        """Writes the index when there are several files."""
        assert not self.lacking, f"never came: {sorted(self.lacking)}"
        if self.split.is_sharded:
            index = {"metadata": self.split.metadata, "weight_map": self.split.tensor_to_filename}
            write_json(self.folder / INDEX, index)
