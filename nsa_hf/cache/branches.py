"""The dynamic cache of a layer whose branches have keys and values of their own: each keeps what it will still read."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from nsa_hf.kernels import n_blocks

from ..entries import Compressors
from ..errors import NsaError
from .dynamic import NsaDynamicLayer

FILLED_BY_ANOTHER = (
    "of a model with keys and values per branch and one without, neither can continue the other's cache: start with an "
    "empty one"
)
PENDING = ("pending_keys", "pending_values")
WINDOW = ("window_keys", "window_values")


class NsaIndependentLayer(NsaDynamicLayer):
    """A cache layer with keys and values of the three branches.

    The selected branch keeps all of them, the compressed branch its entries and the tokens of the entries that are not
    complete, the window branch its last tokens. After `activate_past_recording()` the last two keep all tokens that
    come, until `crop` removes some.

    Attributes:
        pending_keys, pending_values: the compressed branch's tokens from position `pending_from` on, `[B, Hk, P, D]`.
        window_keys, window_values: the window branch's last tokens, `[B, Hk, window_size, D]`.
    """

    catches_up = False
    EXTRA = (*NsaDynamicLayer.EXTRA, *PENDING, *WINDOW)

    def __init__(self) -> None:
        super().__init__()
        self.record_past = False
        self.clear_branches()

    def clear_branches(self) -> None:
        """Removes what the compressed and the window branch keep."""
        self.pending_keys: Tensor | None = None
        self.pending_values: Tensor | None = None
        self.window_keys: Tensor | None = None
        self.window_values: Tensor | None = None
        self.pending_from = 0
        self.window_size = 1
        self.padded = False

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> Self:
        if layer.get_seq_length():
            raise NsaError(FILLED_BY_ANOTHER)
        return super().adopt(layer)

    def activate_past_recording(self) -> None:
        """From now on tokens are kept so that `crop` can take them back."""
        self.record_past = True

    def extend(
        self, keys: Tensor, values: Tensor, compressors: Compressors, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `NsaDynamicLayer.extend`, of the new tokens' keys and values `[B, Hk, T, D]` of the compressed branch."""
        self.padded = starts is not None
        pending = self.joined(PENDING, keys, values)
        entries = self.extend_from(self.pending_from, *pending, compressors, starts)
        for name, states in zip(PENDING, pending, strict=True):
            setattr(self, name, states)
        if not self.record_past:
            self.keep_pending(self.first_pending(self.compressed_length))
        return entries

    def extend_window(self, keys: Tensor, values: Tensor, window_size: int) -> tuple[Tensor, Tensor]:
        """Adds the window branch's keys and values of the new tokens.

        Args:
            keys, values: `[B, Hk, T, D]`.

        Returns:
            The keys and values that the new tokens' windows see, `[B, Hk, Sw, D]`.
        """
        self.window_size = window_size
        joined = self.joined(WINDOW, keys, values)
        for name, states in zip(WINDOW, joined, strict=True):
            setattr(self, name, states if self.record_past else states[:, :, -window_size:].clone())
        seen = window_size - 1 + keys.shape[-2]
        self.offload_extra(WINDOW + PENDING)
        return joined[0][:, :, -seen:], joined[1][:, :, -seen:]

    def joined(self, names: tuple[str, str], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values kept under these names, with new ones behind them."""
        before = [getattr(self, name) for name in names]
        if before[0] is None:
            return keys, values
        return torch.cat([before[0], keys], dim=-2), torch.cat([before[1], values], dim=-2)

    def first_pending(self, length: int) -> int:
        """The first of `length` tokens that an entry not complete yet may need."""
        assert self.entry_sizes is not None
        size, stride = self.entry_sizes
        # padded rows have different unfinished entries, none of which needs more tokens than this
        return max(0, length - size + 1) if self.padded else n_blocks(length, size, stride) * stride

    def keep_pending(self, first: int, last: int | None = None) -> None:
        """Keeps of the pending tokens those at positions `[first, last)`; a copy, which frees the others' memory."""
        places = slice(first - self.pending_from, None if last is None else last - self.pending_from)
        self.change_extra(lambda states: states[:, :, places].clone(), PENDING)
        self.pending_from = first

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, and of those before what no branch needs.

        Raises:
            NsaError: the window or an unfinished entry would need tokens that were not kept.
        """
        removed, length = -tokens_to_remove, self.get_seq_length()
        if removed < 0:
            raise NsaError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}")
        if self.window_keys is None:
            return super().crop(tokens_to_remove)
        left, window_from = max(0, length - removed), length - self.window_keys.shape[-2]
        if window_from > max(0, left - self.window_size) or self.pending_from > self.first_pending(left):
            raise NsaError(
                f"cannot remove {removed} tokens of {length}: of the window and the unfinished block, those before "
                f"token {max(window_from, self.pending_from)} were not kept. Call cache.activate_past_recording() when "
                "the cache holds something, before the tokens that may be removed"
            )
        super().crop(tokens_to_remove)
        end = self.window_keys.shape[-2] - (length - left)
        keep = slice(max(0, end - self.window_size), end)
        self.change_extra(lambda states: states[:, :, keep].clone(), WINDOW)
        self.keep_pending(self.first_pending(left), left)
        return None

    def reset(self) -> None:
        super().reset()
        self.clear_branches()
