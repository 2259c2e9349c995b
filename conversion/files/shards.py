"""Safetensors files written piece by piece and hashed on the way, in any order of their tensors.

    with ShardWriter(folder, table, "2GB") as writer:
        for piece in ...: writer.put(piece.name, piece.start, piece.values)
        writer.finish()                  # now the index is written, and writer.hashes holds every hash

Names and split are those of Transformers' `save_pretrained`. Every file's header is known before its first tensor
comes, so that no tensor has to be held: memory does not grow with the shards or the tensors. Writing runs in a
thread of its own beside reading; on a fast disk it is what takes longest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from nsa_hf.errors import NsaError

from .checkpoint import DTYPES, INDEX, SafetensorsCheckpoint, tensor_positions
from .hashes import HASH, HASHES
from .pieces import BUFFERS, TensorInfo, byte_view
from .staging import OutputError, write_json

# Bytes of one call that writes. Linux looks for room in its page cache in runs as large as the call: on ext4 runs of
# 512 KiB take a fifth longer to find than those of 128, and of two megabytes several times as long when memory is short
# or scattered. With still smaller calls there would be so many that Python's threads wait for each other.
AT_ONCE = 128 << 10

NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writes the tensors of one checkpoint, in any order.

    Args:
        folder: where the files go.
        table: shape and dtype of every tensor to come, by name.
        max_shard_size: of one file, in bytes or like "2GB"; a larger tensor has a file to itself.
        on_file: called whenever a file is complete.
        hash_kind: what tensors are hashed with, one of HASHES.

    Attributes:
        split: huggingface_hub's: which tensor goes into which file.
        file_of: name of each tensor's file, by the tensor's name.
        lacking: names of the tensors that a file still lacks, by the file's name.
        hashes: of every tensor that came whole, by name.

    Raises:
        NsaError: a size that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        table: Mapping[str, TensorInfo],
        max_shard_size: str | int,
        on_file: Callable[[str], None] = lambda name: None,
        hash_kind: str = HASH,
    ):
        self.folder, self.table, self.on_file, self._new_hash = folder, table, on_file, HASHES[hash_kind]
        try:
            self.split = split_state_dict_into_shards_factory(
                dict(table),
                get_storage_size=lambda info: info.nbytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except (ValueError, OverflowError, TypeError) as error:
            raise NsaError(f"max_shard_size must be a number of bytes or like '2GB', got {max_shard_size!r}") from error
        self.file_of: dict[str, str] = dict(self.split.tensor_to_filename)
        self.lacking: dict[str, set[str]] = {file: set(names) for file, names in self.split.filename_to_tensors.items()}
        self.hashes: dict[str, str] = {}
        self._begin: dict[str, int] = {}  # the byte at which a tensor begins in its file
        self._handles: dict[str, int] = {}  # of open files
        self._running: dict[str, tuple[Any, int]] = {}  # of tensors that came in part: hash and bytes so far
        self._unwritten: deque[tuple[Future[None], str, bool]] = deque()  # pieces: tensor, whether it ends there
        self._writing = ThreadPoolExecutor(1, "write")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writing.shutdown(wait=True, cancel_futures=True)
        for handle in self._handles.values():
            os.close(handle)

    @property
    def bytes_to_come(self) -> int:
        """Bytes of the tensors that are still to come."""
        return sum(self.table[name].nbytes for names in self.lacking.values() for name in names)

    def is_needed(self, name: str) -> bool:
        """Whether a tensor is still to come."""
        return name in self.lacking[self.file_of[name]]

    def adopt(self, file: str, hashes: Mapping[str, str]) -> bool:
        """Takes over a file that an earlier process completed, if its tensors have the hashes that the process noted.

        Args:
            file: its name.
            hashes: of its tensors, as `self.hashes` had them.

        Returns:
            Whether it was taken over; else its tensors are still to come.
        """
        try:
            sound = hashes.keys() == self.lacking[file] and self._hashes_in(file) == dict(hashes)
        except (KeyError, NsaError, OSError):
            return False
        if sound:
            self.hashes.update(hashes)
            self.lacking[file] = set()
        return sound

    def put(self, name: str, start: int, values: Tensor) -> Future[None]:
        """Hashes a piece of a tensor, and writes it in another thread.

        Args:
            name: of a tensor of the table; its pieces come in order and without gaps.
            start: index of the first value in the flattened tensor.
            values: `[n]`, on the CPU, of the table's dtype.

        Returns:
            Is done as soon as the piece is written; until then `values` must stay as they are.

        Raises:
            OutputError: something that was put before could not be written.
        """
        file, info = self.file_of[name], self.table[name]
        assert values.dtype == info.dtype, f"{name} came as {values.dtype}, expected {info.dtype}"
        if file not in self._handles:
            self._handles[file] = self._open(file)
        digest, so_far = self._running.pop(name) if name in self._running else (self._new_hash(), 0)
        assert start * info.dtype.itemsize == so_far, f"{name}: bytes from {so_far} on were expected"
        data = byte_view(values).numpy().data
        written = self._writing.submit(_write, self._handles[file], data, self._begin[name] + so_far)
        digest.update(data)
        so_far += data.nbytes
        if so_far < info.nbytes:
            self._running[name] = digest, so_far
        else:
            self.hashes[name] = digest.hexdigest()
        self._unwritten.append((written, name, so_far == info.nbytes))
        # else what was read could pile up in front of a slow disk
        self._settle(BUFFERS)
        return written

    def finish(self) -> None:
        """Waits for everything, and writes the index when there are several files.

        Raises:
            OutputError: something could not be written.
        """
        self._settle(0)
        late = [name for names in self.lacking.values() for name in names]
        assert not late, f"never came: {sorted(late)}"
        if self.split.is_sharded:
            write_json(self.folder / INDEX, {"metadata": self.split.metadata, "weight_map": self.file_of})

    def _hashes_in(self, file: str) -> dict[str, str]:
        """The hashes of a file's tensors, by name; empty where it is not laid out as `file_header` has it.

        Raises:
            NsaError: the file is damaged or incomplete.
        """
        checkpoint = SafetensorsCheckpoint(self.folder, only=file)
        expected = {name: self.table[name] for name in checkpoint.table if name in self.table}
        if checkpoint.table != expected or tensor_positions(self.folder / file) != file_header(expected)[1]:
            return {}
        digests = {name: self._new_hash() for name in expected}
        for piece in checkpoint.pieces(expected):
            digests[piece.name].update(byte_view(piece.values).numpy().data)
        return {name: digest.hexdigest() for name, digest in digests.items()}

    def _open(self, file: str) -> int:
        header, positions = file_header({name: self.table[name] for name in self.split.filename_to_tensors[file]})
        self._begin.update(positions)
        try:
            handle = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            _write(handle, memoryview(header), 0)
            return handle
        except OSError as error:
            raise self._failed(file, error) from error

    def _settle(self, most: int) -> None:
        """Closes the files whose last piece is written; waits while more than `most` pieces are not."""
        while self._unwritten and (len(self._unwritten) > most or self._unwritten[0][0].done()):
            written, name, last = self._unwritten.popleft()
            file = self.file_of[name]
            try:
                written.result()
                if not last:
                    continue
                self.lacking[file].remove(name)
                if not self.lacking[file]:
                    os.close(self._handles.pop(file))
            except OSError as error:
                raise self._failed(file, error) from error
            if not self.lacking[file]:
                self.on_file(file)

    def _failed(self, file: str, error: OSError) -> OutputError:
        return OutputError(f"cannot write {file} of the new model: {error.strerror or error}; nothing was left behind")


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin what does not fit onto the disk.

    Args:
        folder: where files are to be written.
        needed: their bytes.

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
    """The beginning of a safetensors file.

    Wider dtypes come first, as the format's own writer has it, so that every tensor is aligned to its dtype.

    Args:
        table: shape and dtype of its tensors, by name.

    Returns:
        The header's bytes, and the byte at which each tensor begins, by name.
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
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in begin.items()}


def _write(handle: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(handle, data[:AT_ONCE], position)
        data, position = data[count:], position + count
