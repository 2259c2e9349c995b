"""The cache of a sparse layer, as it grows: all keys and values, and the compressed entries of completed blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from nsa_hf.kernels import MeanCompressor, compress, compress_blocks, n_blocks

from ..errors import NsaError

COMPRESSED = ("compressed_keys", "compressed_values")


class NsaDynamicLayer(DynamicLayer):
    """A `DynamicLayer` that also holds the compressed entries of its keys and values, `[B, N, Hk, D]`.

    They cover the first `compressed_length` tokens and are brought up to date by `extend`, so that tokens which came
    another way (a dense forward, a prefix) are caught up with; nothing is computed twice.
    """

    # what came without `extend` (a dense forward) is compressed with the next one
    catches_up = True
    # the tensors that a plain layer does not have
    EXTRA: tuple[str, ...] = (*COMPRESSED, "starts")

    def __init__(self) -> None:
        super().__init__()
        self.compressed_keys: Tensor | None = None
        self.compressed_values: Tensor | None = None
        self.compressed_length = 0
        # of the entries held: kernel_size and kernel_stride
        self.block: tuple[int, int] | None = None
        # the rows' first real positions, int32 [B]; None = 0, where they are known
        self.starts: Tensor | None = None
        self.knows_starts = False
        self.packed = False
        self.offloaded = False

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> NsaDynamicLayer:
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
        self,
        keys: Tensor,
        values: Tensor,
        compress_k: MeanCompressor,
        compress_v: MeanCompressor,
        kernel_stride: int,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Compresses the blocks that have been completed since the last time.

        Args:
            keys, values: `[B, Hk, S, D]`, what `update` gave: all tokens held.
            compress_k, compress_v: the layer's compressors.
            kernel_stride: tokens between two blocks' starts [d].
            starts: int32 `[B]`, first real position of each row, the same for the cache's whole life; None = 0.

        Returns:
            The compressed keys and values `[B, N, Hk, D]` of all tokens held.
        """
        return self.extend_from(0, keys, values, compress_k, compress_v, kernel_stride, starts)

    def extend_from(
        self,
        base: int,
        keys: Tensor,
        values: Tensor,
        compress_k: MeanCompressor,
        compress_v: MeanCompressor,
        kernel_stride: int,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`extend`, of keys and values that begin at token `base`."""
        self.block = (compress_k.kernel_size, kernel_stride)
        self.note_starts(starts)
        entries = []
        for name, states, compressor in zip(COMPRESSED, (keys, values), (compress_k, compress_v), strict=True):
            held, x = getattr(self, name), states.transpose(1, 2)
            if held is None:
                # none yet; in training, one from which gradients (zeros) reach the compressor
                held = compress(x[:, :0], compressor, kernel_stride).to(x.dtype)
            if starts is None:
                grown = self.extend_full(held, base, x, compressor, kernel_stride)
            else:
                grown = self.extend_padded(held, base, x, compressor, kernel_stride, starts)
            setattr(self, name, grown)
            entries.append(grown)
        self.compressed_length = base + keys.shape[-2]
        self.send_away(COMPRESSED)
        return entries[0], entries[1]

    def extend_full(self, held: Tensor, base: int, x: Tensor, compressor: MeanCompressor, stride: int) -> Tensor:
        size = compressor.kernel_size
        done, count = n_blocks(self.compressed_length, size, stride), n_blocks(base + x.shape[1], size, stride)
        if count == done:
            return held
        new = compress(x[:, done * stride - base : (count - 1) * stride + size - base], compressor, stride)
        return torch.cat([held, new.to(held.dtype)], dim=1)

    def extend_padded(
        self, held: Tensor, base: int, x: Tensor, compressor: MeanCompressor, stride: int, starts: Tensor
    ) -> Tensor:
        """Rows complete their blocks at different tokens: each writes its own next ones."""
        size, length = compressor.kernel_size, base + x.shape[1]
        count = n_blocks(length, size, stride)
        places = min(count, -(-(length - self.compressed_length) // stride))
        if places == 0:
            return held
        done = (self.compressed_length - starts.long() - size).div(stride, rounding_mode="floor").add(1).clamp(min=0)
        # [B, places]
        block = done[:, None] + torch.arange(places, device=x.device)
        first = starts.long()[:, None] + block * stride
        complete = first + size <= length
        new = compress_blocks(x, compressor, first - base, complete).to(held.dtype)
        # one place more, where what is not complete goes
        grown = torch.cat([held, held.new_zeros(held.shape[0], count + 1 - held.shape[1], *held.shape[2:])], dim=1)
        row = torch.arange(x.shape[0], device=x.device)[:, None]
        return grown.index_put((row, torch.where(complete, block, count)), new)[:, :count]

    def each_extra(self, change: Callable[[Tensor], Tensor], names: tuple[str, ...] | None = None) -> None:
        """Applies `change` to the tensors of these names (None: all of `EXTRA`), where there are any."""
        for name in names or self.EXTRA:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def send_away(self, names: tuple[str, ...]) -> None:
        if self.offloaded:
            self.each_extra(lambda states: states.to("cpu", non_blocking=True), names)

    def offload(self) -> None:
        # an offloaded cache calls this within `update`: `extend`, which comes after it, sends its entries along
        super().offload()
        self.offloaded = True

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self.each_extra(lambda states: states.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.keys is not None and self.block is not None:
            self.compressed_length = min(self.compressed_length, self.keys.shape[-2])
            entries = n_blocks(self.compressed_length, *self.block)
            self.each_extra(lambda held: held[:, :entries], COMPRESSED)

    def reset(self) -> None:
        # dropped: Transformers up to 5.17 zeroes them and keeps their length
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        self.compressed_keys = self.compressed_values = self.starts = None
        self.compressed_length, self.packed, self.knows_starts, self.block = 0, False, False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.each_extra(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.each_extra(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.each_extra(lambda states: states[indices, ...])
