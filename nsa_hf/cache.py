"""The cache of a sparse layer: all keys and values, and the compressed entries, extended as blocks are completed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from nsa_hf.kernels import MeanCompressor, compress, compress_blocks, n_blocks

from .errors import NsaError

COMPRESSED = ("compressed_keys", "compressed_values")


class NsaDynamicLayer(DynamicLayer):
    """A `DynamicLayer` that also holds the compressed entries of its keys and values, `[B, N, Hk, D]`.

    They cover the first `compressed_length` tokens and are brought up to date by `extend`, so that tokens which came
    another way (a dense forward, a prefix) are caught up with; nothing is computed twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.compressed_keys: Tensor | None = None
        self.compressed_values: Tensor | None = None
        self.compressed_length = 0
        self.block = (1, 1)
        self.packed = False

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> NsaDynamicLayer:
        """Takes over what a plain layer holds."""
        adopted = cls()
        adopted.__dict__.update(layer.__dict__)
        return adopted

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.packed:
            raise NsaError("this cache holds packed documents and cannot be continued: start with an empty cache")
        return super().update(key_states, value_states, *args, **kwargs)

    def extend(
        self, compress_k: MeanCompressor, compress_v: MeanCompressor, kernel_stride: int, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compresses the blocks that have been completed since the last time.

        Args:
            compress_k, compress_v: the layer's compressors.
            kernel_stride: tokens between two blocks' starts [d].
            starts: int32 `[B]`, first real position of each row, the same for the cache's whole life; None = 0.

        Returns:
            The compressed keys and values `[B, N, Hk, D]` of all tokens held.
        """
        compressors = (compress_k, compress_v)
        length = self.keys.shape[-2]
        self.block = (compress_k.kernel_size, kernel_stride)
        for name, states, compressor in zip(COMPRESSED, (self.keys, self.values), compressors, strict=True):
            held = getattr(self, name)
            if held is None:
                held = states.new_zeros(states.shape[0], 0, states.shape[1], states.shape[3])
            x = states.transpose(1, 2)
            if starts is None:
                grown = self.extend_full(held, x, compressor, kernel_stride)
            else:
                grown = self.extend_padded(held, x, compressor, kernel_stride, starts)
            setattr(self, name, grown)
        self.compressed_length = length
        return self.compressed_keys, self.compressed_values  # type: ignore[return-value]

    def extend_full(self, held: Tensor, x: Tensor, compressor: MeanCompressor, stride: int) -> Tensor:
        size = compressor.kernel_size
        done, count = n_blocks(self.compressed_length, size, stride), n_blocks(x.shape[1], size, stride)
        if count == done:
            return held
        new = compress(x[:, done * stride : (count - 1) * stride + size], compressor, stride)
        return torch.cat([held, new.to(held.dtype)], dim=1)

    def extend_padded(self, held: Tensor, x: Tensor, compressor: MeanCompressor, stride: int, starts: Tensor) -> Tensor:
        """Rows complete their blocks at different tokens: each writes its own next ones."""
        size, length = compressor.kernel_size, x.shape[1]
        count = n_blocks(length, size, stride)
        places = min(count, -(-(length - self.compressed_length) // stride))
        if places == 0:
            return held
        done = (self.compressed_length - starts.long() - size).div(stride, rounding_mode="floor").add(1).clamp(min=0)
        # [B, places]
        block = done[:, None] + torch.arange(places, device=x.device)
        first = starts.long()[:, None] + block * stride
        complete = first + size <= length
        new = compress_blocks(x, compressor, first, complete).to(held.dtype)
        # one place more, where what is not complete goes
        grown = torch.cat([held, held.new_zeros(held.shape[0], count + 1 - held.shape[1], *held.shape[2:])], dim=1)
        row = torch.arange(x.shape[0], device=x.device)[:, None]
        return grown.index_put((row, torch.where(complete, block, count)), new)[:, :count]

    def each_compressed(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies `change` to the compressed keys and to the compressed values, where there are any."""
        for name in COMPRESSED:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.compressed_length = min(self.compressed_length, self.keys.shape[-2])
            self.each_compressed(lambda entries: entries[:, : n_blocks(self.compressed_length, *self.block)])

    def reset(self) -> None:
        super().reset()
        self.compressed_keys = self.compressed_values = None
        self.compressed_length, self.packed = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.each_compressed(lambda entries: entries.index_select(0, beam_idx.to(entries.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.each_compressed(lambda entries: entries.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.each_compressed(lambda entries: entries[indices, ...])


def nsa_cache_layer(cache: Cache, layer_idx: int) -> NsaDynamicLayer:
    """Layer `layer_idx` of a user's or `generate()`'s dynamic cache, made one that holds compressed entries too.

    Raises:
        NsaError: the cache is of a kind that sparse attention cannot use; names it and what to use instead.
    """
    if cache.offloading:
        raise NsaError(
            "sparse attention does not support an offloaded cache yet: use DynamicCache() without offloading"
        )
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if type(layer) is DynamicLayer:
        layer = cache.layers[layer_idx] = NsaDynamicLayer.adopt(layer)
    if not isinstance(layer, NsaDynamicLayer):
        kind = type(cache).__name__ if layer is None else f"{type(cache).__name__} ({type(layer).__name__})"
        raise NsaError(
            f"sparse attention cannot use a {kind}: it would give wrong tokens. Use DynamicCache(), which generate() "
            "makes by itself when cache_implementation is not set"
        )
    return layer
