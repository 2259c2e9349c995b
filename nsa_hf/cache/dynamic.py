"""The dynamic cache of a sparse layer: all keys and values, the entries that are complete, and the index's keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from nsa_hf.kernels import MeanCompressor, compress, compress_blocks, n_blocks

from ..entries import Compressors
from ..errors import NsaError
from ..index import Index, IndexKeys
from .extras import COMPRESSED, INDEX


class NsaDynamicLayer(DynamicLayer):
    """A `DynamicLayer` that also holds the compressed entries of its keys and values, and the index's keys.

    Of these it has what the model has. Tokens that came without them are caught up with when they are asked for.

    Attributes:
        compressed_keys, compressed_values: the entries of the first `compressed_length` tokens; `extend` adds the rest.
        entry_sizes: kernel_size and kernel_stride of the entries; None before there are any.
        index_keys, index_scales: the index's keys of the first tokens; `extend_index` adds the rest.
        index: what they are of; None before there are any.
        starts: int32 `[B]`, the rows' first real positions when they were compressed; None = 0.
        packed: whether it holds packed documents, so that nothing can be added.
        catches_up: whether `extend` compresses tokens too that came without it, in a dense forward for one.
        EXTRA: the names of the tensors that a plain layer does not have.
    """

    catches_up = True
    EXTRA: tuple[str, ...] = (*COMPRESSED, *INDEX, "starts")

    def __init__(self) -> None:
        super().__init__()
        self.compressed_keys: Tensor | None = None
        self.compressed_values: Tensor | None = None
        self.compressed_length = 0
        self.entry_sizes: tuple[int, int] | None = None
        self.index_keys: Tensor | None = None
        self.index_scales: Tensor | None = None
        self.index: Index | None = None
        self.starts: Tensor | None = None
        self.knows_starts = False
        self.packed = False
        self.offloaded = False

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> Self:
        """Takes over what a plain layer holds."""
        adopted = cls()
        adopted.__dict__.update(layer.__dict__)
        return adopted

    def note_starts(self, starts: Tensor | None) -> None:
        """Keeps the rows' first real positions, int32 `[B]`, of a forward with this cache; None = 0."""
        self.starts, self.knows_starts = starts, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.packed:
            raise NsaError("this cache holds packed documents and cannot be continued: start with an empty cache")
        return super().update(key_states, value_states, *args, **kwargs)

    def extend(
        self, keys: Tensor, values: Tensor, compressors: Compressors, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds the entries whose tokens have come since the last time.

        Args:
            keys, values: `[B, Hk, S, D]`, what `update` gave: all tokens held.
            compressors: the layer's.
            starts: int32 `[B]`, first real position of each row, the same for the cache's whole life; None = 0.

        Returns:
            The compressed keys and values `[B, N, Hk, D]` of all tokens held.
        """
        return self.extend_from(0, keys, values, compressors, starts)

    def extend_from(
        self, base: int, keys: Tensor, values: Tensor, compressors: Compressors, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `extend`, of keys and values whose first token is token `base` of the text."""
        self.entry_sizes, stride = compressors.sizes, compressors.stride
        entries = []
        for name, states, compressor in zip(COMPRESSED, (keys, values), compressors[:2], strict=True):
            before, x = getattr(self, name), states.transpose(1, 2)
            if before is None:
                # no entries yet; in training, such that gradients (zeros) reach the compressor
                before = compress(x[:, :0], compressor, stride).to(x.dtype)
            if starts is None:
                after = self.extend_full(before, base, x, compressor, stride)
            else:
                after = self.extend_padded(before, base, x, compressor, stride, starts)
            setattr(self, name, after)
            entries.append(after)
        self.compressed_length = base + keys.shape[-2]
        self.offload_extra(COMPRESSED)
        return entries[0], entries[1]

    def extend_full(self, before: Tensor, base: int, x: Tensor, compressor: MeanCompressor, stride: int) -> Tensor:
        """The entries `before` and those that `x` `[B, S, Hk, D]` completes, in rows without padding."""
        size = compressor.kernel_size
        done, count = n_blocks(self.compressed_length, size, stride), n_blocks(base + x.shape[1], size, stride)
        if count == done:
            return before
        new = compress(x[:, done * stride - base : (count - 1) * stride + size - base], compressor, stride)
        return torch.cat([before, new.to(before.dtype)], dim=1)

    def extend_padded(
        self, before: Tensor, base: int, x: Tensor, compressor: MeanCompressor, stride: int, starts: Tensor
    ) -> Tensor:
        """The same in padded rows, whose entries are complete at different tokens: each row adds its own next ones."""
        size, length = compressor.kernel_size, base + x.shape[1]
        count = n_blocks(length, size, stride)
        places = min(count, -(-(length - self.compressed_length) // stride))
        if places == 0:
            return before
        done = (self.compressed_length - starts.long() - size).div(stride, rounding_mode="floor").add(1).clamp(min=0)
        # [B, places]
        entry = done[:, None] + torch.arange(places, device=x.device)
        first = starts.long()[:, None] + entry * stride
        complete = first + size <= length
        new = compress_blocks(x, compressor, first - base, complete).to(before.dtype)
        # one place more than is kept, into which entries that are not complete are written
        added = before.new_zeros(before.shape[0], count + 1 - before.shape[1], *before.shape[2:])
        after = torch.cat([before, added], dim=1)
        row = torch.arange(x.shape[0], device=x.device)[:, None]
        return after.index_put((row, torch.where(complete, entry, count)), new)[:, :count]

    def extend_index(self, keys: Tensor, index: Index) -> IndexKeys:
        """Adds the index's keys of the tokens that have come since the last time.

        Args:
            keys: `[B, Hk, S, D]`, what `update` gave: all tokens held.
            index: the layer's.

        Returns:
            The index's keys of all tokens held.
        """
        self.index = index
        if self.index_keys is None:
            held = index.keys(keys)
        else:
            new = index.keys(keys[:, :, self.index_keys.shape[2] :])
            held = IndexKeys(self.index_keys, self.index_scales).then(new)
        self.index_keys, self.index_scales = held
        self.offload_extra(INDEX)
        return held

    def change_extra(self, change: Callable[[Tensor], Tensor], names: tuple[str, ...] | None = None) -> None:
        """Replaces the tensors of these names (None: all of `EXTRA`) by what `change` makes of them."""
        for name in names or self.EXTRA:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def offload_extra(self, names: tuple[str, ...]) -> None:
        """Moves the tensors of these names to the CPU if the cache is offloaded."""
        if self.offloaded:
            self.change_extra(lambda states: states.to("cpu", non_blocking=True), names)

    def offload(self) -> None:
        # an offloaded cache calls this within `update`: `extend`, which comes after it, sends what it adds along
        super().offload()
        self.offloaded = True

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self.change_extra(lambda states: states.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self.change_extra(lambda states: states[:, :, :length], INDEX)
        if self.keys is not None and self.entry_sizes is not None:
            self.compressed_length = min(self.compressed_length, self.keys.shape[-2])
            entries = n_blocks(self.compressed_length, *self.entry_sizes)
            self.change_extra(lambda states: states[:, :entries], COMPRESSED)

    def reset(self) -> None:
        # dropped: Transformers up to 5.17 zeroes them and keeps their length
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        for name in self.EXTRA:
            setattr(self, name, None)
        self.compressed_length, self.packed, self.knows_starts = 0, False, False
        self.entry_sizes = self.index = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.change_extra(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.change_extra(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.change_extra(lambda states: states[indices, ...])
