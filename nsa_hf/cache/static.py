"""The static cache of a sparse layer, in buffers that never move or grow: for `torch.compile` and CUDA graphs."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.utils import is_torchdynamo_compiling

from nsa_hf.kernels import compress_blocks, n_blocks

from ..entries import Compressors
from ..errors import NsaError
from ..index import Index, IndexKeys
from .extras import COMPRESSED, INDEX, Extras


def in_a_graph() -> bool:
    """Whether this code is being compiled or captured, to be run again with other tensors."""
    return is_torchdynamo_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


class NsaStaticLayer(StaticLayer):
    """A `StaticLayer` that also holds the compressed entries of its keys and values, and the index's keys.

    Of these it has what the model has, in buffers as long as they may get: entries `[B, N, Hk, D]`, where `N` is how
    many `max_cache_len` tokens have, and keys `[B, Hk, max_cache_len, c]`. What is not complete or not there yet is
    undefined. The number of tokens is a tensor on the device (`cumulative_length`) that is never copied to the host, so
    that a decoding step is one graph. Every step writes what it completes, and nothing else.

    Args:
        max_cache_len: tokens that the buffers hold.
        extras: what is held beside keys and values.

    Attributes:
        entry_sizes, index: of the extras.
        new_tokens: how many tokens came last, whose entries and index keys are to be written; `max_cache_len`: all.
        behind: whether tokens are held whose entries and index keys have not been written.
        starts: int32 `[B]`, the rows' first real positions when they were written outside of a graph; None = 0.
        knows_starts: whether any were.
        catches_up: False, so `extend` runs with every forward, dense ones too: later it would need other shapes.
        EXTRA: the names of the tensors that a plain layer does not have.
    """

    # `crop` puts everything back as it was
    is_croppable = True
    catches_up = False
    EXTRA: tuple[str, ...] = (*COMPRESSED, *INDEX)

    def __init__(self, max_cache_len: int, extras: Extras) -> None:
        super().__init__(max_cache_len)
        self.entry_sizes, self.index = extras.entry_sizes, extras.index
        self.compressed_keys: Tensor | None = None
        self.compressed_values: Tensor | None = None
        self.index_keys: Tensor | None = None
        self.index_scales: Tensor | None = None
        self.new_tokens = 0
        self.behind = False
        self.starts: Tensor | None = None
        self.knows_starts = False

    @classmethod
    def adopt(cls, layer: StaticLayer, extras: Extras) -> Self:
        """Takes over a plain layer's buffers and what they hold."""
        adopted = cls(layer.max_cache_len, extras)
        adopted.__dict__.update(layer.__dict__)
        if layer.is_initialized:
            adopted.allocate_entries(layer.keys, layer.values)
            adopted.allocate_index(layer.keys)
            adopted.behind = is_torchdynamo_compiling() or bool(layer.cumulative_length > 0)
        return adopted

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.allocate_entries(key_states, value_states)
        self.allocate_index(key_states)

    def allocate_entries(self, keys: Tensor, values: Tensor) -> None:
        """Makes the buffers for the entries, where there are any, of keys and values that are `[B, Hk, any, D]`."""
        if self.entry_sizes is None:
            return
        entries = n_blocks(self.max_cache_len, *self.entry_sizes)
        for name, states in zip(COMPRESSED, (keys, values), strict=True):
            self.keep_in_place(name, states.new_zeros(states.shape[0], entries, states.shape[1], states.shape[3]))

    def allocate_index(self, keys: Tensor) -> None:
        """Makes the buffers for the index's keys, where there is one, of keys that are `[B, Hk, any, D]`."""
        if self.index is None:
            return
        for name, none in zip(INDEX, self.index.keys(keys[:, :, :0]), strict=True):
            if none is not None:
                self.keep_in_place(name, none.new_zeros(*none.shape[:2], self.max_cache_len, *none.shape[3:]))

    def keep_in_place(self, name: str, buffer: Tensor) -> None:
        """Keeps a buffer under this name, and tells `torch.compile` that it will not move."""
        setattr(self, name, buffer)
        if not is_torchdynamo_compiling():
            torch._dynamo.mark_static_address(buffer)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.new_tokens = key_states.shape[-2]
        if key_states.device.type == "cpu" and not is_torchdynamo_compiling():
            length = int(self.get_seq_length())
            if length + self.new_tokens > self.max_cache_len:
                raise NsaError(
                    f"the static cache has room for {self.max_cache_len} tokens, holds {length} and was given "
                    f"{self.new_tokens} more: make it with a larger max_cache_len"
                )
        if self.behind:
            self.new_tokens, self.behind = self.max_cache_len, False
        return super().update(key_states, value_states, *args, **kwargs)

    def note_starts(self, starts: Tensor | None) -> None:
        """Keeps the rows' first real positions, int32 `[B]`, of a forward with this cache; None = 0."""
        if not in_a_graph():
            self.starts, self.knows_starts = starts, True

    def extend(
        self, keys: Tensor, values: Tensor, compressors: Compressors, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Writes the entries that the last tokens completed; called after every `update`.

        Args:
            keys, values: `[B, Hk, max_cache_len, D]`, what `update` gave.
            compressors: the layer's.
            starts: int32 `[B]`, first real position of each row, the same for the cache's whole life; None = 0.

        Returns:
            The compressed keys and values `[B, N, Hk, D]`: the buffers themselves.
        """
        assert self.compressed_keys is not None and self.compressed_values is not None
        if self.compressed_keys.shape[2] != keys.shape[1]:
            # a family may repeat its heads behind the cache; this happens with the first tokens only
            self.allocate_entries(keys, values)
        entries = self.compressed_keys.shape[1]
        if entries == 0:
            return self.compressed_keys, self.compressed_values
        size, stride = compressors.sizes
        length = self.cumulative_length
        start = length.new_zeros(1) if starts is None else starts.to(length.dtype)
        # as many as these tokens can complete; each row has its own
        places = min(entries, -(-self.new_tokens // stride))
        before = length - self.new_tokens - start - size
        done = (before.div(stride, rounding_mode="floor") + 1).clamp(min=0)
        # [B, places], or [1, places] where all rows agree
        entry = done[:, None] + torch.arange(places, device=length.device)
        first = start[:, None] + entry * stride
        complete = first + size <= length
        batch = keys.shape[0]
        entry, first, complete = (x.expand(batch, -1) for x in (entry, first, complete))
        # An entry that is not complete writes back what stands at its place. No other entry of its row is written
        # there: their places are neighbours, and at most `entries`.
        place, row = entry % entries, torch.arange(batch, device=length.device)[:, None]
        pairs = ((self.compressed_keys, keys, compressors.keys), (self.compressed_values, values, compressors.values))
        for buffer, states, compressor in pairs:
            new = compress_blocks(states.transpose(1, 2), compressor, first, complete).to(buffer.dtype)
            buffer.index_put_((row, place), torch.where(complete[..., None, None], new, buffer[row, place]))
        return self.compressed_keys, self.compressed_values

    def extend_index(self, keys: Tensor, index: Index) -> IndexKeys:
        """Writes the index's keys of the last tokens; called after every `update`.

        Args:
            keys: `[B, Hk, max_cache_len, D]`, what `update` gave.
            index: the layer's, for which the buffers were made.

        Returns:
            The index's keys of all places: the buffers themselves.
        """
        assert self.index_keys is not None and index == self.index
        if self.index_keys.shape[1] != keys.shape[1]:
            self.allocate_index(keys)  # as in `extend`
        first = (self.cumulative_length - self.new_tokens).clamp(min=0)
        place = first + torch.arange(self.new_tokens, device=keys.device)
        for name, new in zip(INDEX, index.keys(keys.index_select(2, place)), strict=True):
            if new is not None:
                getattr(self, name).index_copy_(2, place, new)
        return IndexKeys(self.index_keys, self.index_scales)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; entries that they completed are written again when complete."""
        if tokens_to_remove > 0:
            raise NsaError(POSITIVE_CROP.format(tokens_to_remove))
        if self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def reset(self) -> None:
        super().reset()
        self.behind = self.knows_starts = False
        for name in self.EXTRA:
            if getattr(self, name) is not None:
                getattr(self, name).zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for name in ("keys", "values", *self.EXTRA):
            if (buffer := getattr(self, name)) is not None:
                # in place: graphs know the buffers by their addresses
                buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))
        if self.starts is not None:
            self.starts = self.starts.index_select(0, beam_idx.to(self.starts.device))

    def offload(self) -> None:
        raise NsaError(OFFLOADED_STATIC)


class NsaStaticWindowLayer(StaticSlidingWindowLayer):
    """A `StaticSlidingWindowLayer` that refuses to be cropped to tokens which newer ones have overwritten.

    Attributes:
        lost: after such a crop, why it cannot be continued.
    """

    cumulative_length_int: int
    lost: str | None = None

    @classmethod
    def adopt(cls, layer: StaticSlidingWindowLayer) -> NsaStaticWindowLayer:
        """Takes over a plain layer's buffers and what they hold."""
        adopted = cls.__new__(cls)
        adopted.__dict__.update(layer.__dict__)
        return adopted

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.lost is not None:
            raise NsaError(self.lost)
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens.

        Raises:
            NsaError: more tokens have come than the window holds, so that those before it are overwritten.
        """
        length = self.cumulative_length_int
        if tokens_to_remove < 0 and length > self.max_cache_len:
            # other layers may have been cropped before this one
            self.lost = (
                f"cannot remove {-tokens_to_remove} tokens of {length}: a static cache keeps no tokens before a "
                f"sliding window of {self.max_cache_len}. Call cache.reset() and start anew, or use "
                "DynamicCache(config=...) with activate_past_recording()"
            )
            raise NsaError(self.lost)
        if tokens_to_remove > 0:
            raise NsaError(POSITIVE_CROP.format(tokens_to_remove))
        self.cumulative_length_int = max(0, length + tokens_to_remove)
        self.cumulative_length.fill_(self.cumulative_length_int)

    def reset(self) -> None:
        super().reset()
        self.lost = None


POSITIVE_CROP = "crop takes the negative number of tokens to remove, got {}"
OFFLOADED_STATIC = (
    "sparse attention does not support an offloaded static cache: use cache_implementation='offloaded' "
    "(DynamicCache(offloading=True)) to save GPU memory, or 'static' for speed"
)
