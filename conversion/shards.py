"""Safetensors files written piece by piece, hashed as they are written, several at once if need be.

    with ShardWriter(folder, table, "2GB") as writer:
        for piece in ...: writer.put(piece.name, piece.start, piece.values)
        writer.finish()                  # the index; every hash is in writer.sha256 then

Names and split are those of Transformers' `save_pretrained`. Every file's header is known before its first tensor
comes, so that no tensor has to be held: memory does not grow with the shards or the tensors. Hashing and writing run
in threads of their own beside whoever reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from nsa_hf.errors import NsaError

from .checkpoint import BUFFERS, DTYPES, INDEX, SafetensorsCheckpoint, TensorInfo, byte_view, tensor_positions
from .staging import OutputError, write_json

# Bytes of one call that writes. Given two megabytes, Linux looks for page cache in huge pages: seen to be five times
# slower on ext4 when memory is short or in pieces, and no faster otherwise.
AT_ONCE = 512 << 10

NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writes the tensors of one checkpoint, in any order.

    Args:
        folder: where the files go.
        table: shape and dtype of every tensor to come, by name.
        max_shard_size: of one file, in bytes or like "2GB"; a larger tensor has a file to itself.
        on_file: called, in the thread that writes, whenever a file is complete.

    Attributes:
        split: huggingface_hub's: which tensor goes where.
        sha256: hash of every tensor's bytes that is written, by name.

    Raises:
        NsaError: a size that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        table: Mapping[str, TensorInfo],
        max_shard_size: str | int,
        on_file: Callable[[str], None] = lambda name: None,
    ):
        self.folder, self.table, self.on_file = folder, table, on_file
        try:
            self.split = split_state_dict_into_shards_factory(
                dict(table),
                get_storage_size=lambda info: info.nbytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise NsaError(f"max_shard_size must be a number of bytes or like '2GB', got {max_shard_size!r}") from error
        self.file_of: dict[str, str] = dict(self.split.tensor_to_filename)
        self.lacking: dict[str, set[str]] = {file: set(names) for file, names in self.split.filename_to_tensors.items()}
        self.sha256: dict[str, str] = {}
        self._begin: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._passing: dict[str, tuple[Any, int]] = {}  # name: running hash, bytes so far
        self._complete: deque[tuple[str, list[Future]]] = deque()
        self._recent: deque[Future] = deque()
        self._hashing, self._writing = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "write")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._hashing, self._writing):
            pool.shutdown(wait=True, cancel_futures=True)
        for handle in self._files.values():
            os.close(handle)

    @property
    def bytes_to_come(self) -> int:
        return sum(self.table[name].nbytes for names in self.lacking.values() for name in names)

    def is_needed(self, name: str) -> bool:
        """Whether a tensor is still to come."""
        return name in self.lacking[self.file_of[name]]

    def adopt(self, file: str, sha256: Mapping[str, str]) -> bool:
        """Takes a file that an earlier process completed, if it is what that process said.

        Args:
            file: its name.
            sha256: the hashes of its tensors.
        """
        try:
            sound = sha256.keys() == self.lacking[file] and hash_tensors(self.folder, file, self.table) == dict(sha256)
        except (KeyError, NsaError, OSError):
            return False
        if sound:
            self.sha256.update(sha256)
            self.lacking[file] = set()
        return sound

    def put(self, name: str, start: int, values: Tensor) -> list[Future]:
        """Writes a part of a tensor, in other threads.

        Args:
            name: of a tensor of the table; its parts come in order and without gaps.
            start: index of the first value in the flattened tensor.
            values: `[n]`, on the CPU, of the table's dtype; must stay as they are until all that is returned is done.

        Raises:
            OutputError: something that was put before could not be written.
        """
        file, info = self.file_of[name], self.table[name]
        assert values.dtype == info.dtype, f"{name} came as {values.dtype}, expected {info.dtype}"
        if file not in self._files:
            self._files[file] = self._open(file)
        digest, so_far = self._passing.pop(name, None) or (hashlib.sha256(), 0)
        assert start * info.dtype.itemsize == so_far, f"{name}: bytes from {so_far} on were expected"
        data = byte_view(values).numpy().data
        uses = [
            self._hashing.submit(digest.update, data),
            self._writing.submit(_write, self._files[file], data, self._begin[name] + so_far),
        ]
        # so that what was read cannot pile up in front of a slow disk
        self._recent.append(uses[-1])
        if len(self._recent) > BUFFERS:
            wait([self._recent.popleft()])
        so_far += data.nbytes
        if so_far < info.nbytes:
            self._passing[name] = digest, so_far
        else:
            self._complete.append((name, [*uses, self._hashing.submit(self._note, name, digest)]))
        self._settle()
        return uses

    def settle(self) -> None:
        """Waits until everything that was put is written and hashed.

        Raises:
            OutputError: something could not be written.
        """
        self._settle(all_of_it=True)

    def finish(self) -> None:
        """Waits for everything, and writes the index when there are several files.

        Raises:
            OutputError: something could not be written.
        """
        self.settle()
        late = [name for names in self.lacking.values() for name in names]
        assert not late, f"never came: {sorted(late)}"
        if self.split.is_sharded:
            write_json(self.folder / INDEX, {"metadata": self.split.metadata, "weight_map": self.file_of})

    def _note(self, name: str, digest: Any) -> None:
        self.sha256[name] = digest.hexdigest()

    def _open(self, file: str) -> int:
        header, positions = file_header({name: self.table[name] for name in self.split.filename_to_tensors[file]})
        self._begin.update(positions)
        try:
            handle = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            _write(handle, memoryview(header), 0)
            return handle
        except OSError as error:
            raise self._failed(file, error) from error

    def _settle(self, all_of_it: bool = False) -> None:
        """Does what follows when tensors are wholly hashed and written; the first may be, while later ones are not."""
        while self._complete and (all_of_it or all(use.done() for use in self._complete[0][1])):
            name, uses = self._complete.popleft()
            file = self.file_of[name]
            try:
                for use in uses:
                    use.result()
                self.lacking[file].remove(name)
                if not self.lacking[file]:
                    os.close(self._files.pop(file))
            except OSError as error:
                raise self._failed(file, error) from error
            if not self.lacking[file]:
                self.on_file(file)

    def _failed(self, file: str, error: OSError) -> OutputError:
        return OutputError(f"cannot write {file} of the new model: {error.strerror or error}; nothing was left behind")


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin what cannot be finished.

    Raises:
        OutputError: fewer than `needed` bytes are free where `folder` is.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"the new model needs {needed / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB left: make room, or "
            "choose a folder on another disk"
        )


def file_header(table: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, and the byte at which each of its tensors begins.

    Wider dtypes come first, as the format's own writer has it, so that every tensor is aligned to its dtype.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin: dict[str, int] = {}
    end = 0
    for name, info in sorted(table.items(), key=lambda item: -item[1].dtype.itemsize):
        begin[name], end = end, end + info.nbytes
        entries[name] = {
            "dtype": NAME_OF[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin[name], end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + place for name, place in begin.items()}


def hash_tensors(folder: Path, file: str, table: Mapping[str, TensorInfo]) -> dict[str, str]:
    """sha256 of each tensor of a safetensors file, which must hold what `file_header` says and nothing behind it.

    Raises:
        CheckpointError: the file is damaged or incomplete.
    """
    checkpoint = SafetensorsCheckpoint(folder, only=file)
    expected = {name: table[name] for name in checkpoint.table if name in table}
    if checkpoint.table != expected or tensor_positions(folder / file) != file_header(expected)[1]:
        return {}
    digests: dict[str, Any] = {}
    for piece in checkpoint.pieces(expected):
        digests.setdefault(piece.name, hashlib.sha256()).update(byte_view(piece.values).numpy().data)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _write(handle: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(handle, data[:AT_ONCE], position)
        data, position = data[count:], position + count
