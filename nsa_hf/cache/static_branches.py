"""The static cache of a layer whose branches have keys and values of their own."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from ..entries import Compressors
from ..errors import NsaError
from .branches import FILLED_BY_ANOTHER, WINDOW
from .extras import Extras
from .static import NsaStaticLayer, in_a_graph

BRANCH = ("branch_keys", "branch_values")


class NsaStaticIndependentLayer(NsaStaticLayer):
    """A static cache layer with keys and values of the three branches, each in buffers `[B, Hk, max_cache_len, D]`.

    The compressed and the window branch keep all tokens too, and not only those that they will still read: a window's
    keys stand where they do in the text (`nsa_attention` with `lengths`), and a crop can take back any tokens.

    Attributes:
        branch_keys, branch_values: of the compressed branch.
        window_keys, window_values: of the window branch.
    """

    EXTRA = (*NsaStaticLayer.EXTRA, *BRANCH, *WINDOW)

    def __init__(self, max_cache_len: int, extras: Extras) -> None:
        super().__init__(max_cache_len, extras)
        self.branch_keys: Tensor | None = None
        self.branch_values: Tensor | None = None
        self.window_keys: Tensor | None = None
        self.window_values: Tensor | None = None

    @classmethod
    def adopt(cls, layer: StaticLayer, extras: Extras) -> Self:
        """Takes over a plain layer's buffers, which are empty.

        Raises:
            NsaError: they hold tokens, of which the branches' keys and values are not known.
            RuntimeError: the same where this is being compiled and cannot look.
        """
        if layer.is_initialized and in_a_graph():
            torch._assert_async(layer.cumulative_length == 0, FILLED_BY_ANOTHER)
        elif layer.is_initialized and bool(layer.cumulative_length > 0):
            raise NsaError(FILLED_BY_ANOTHER)
        adopted = super().adopt(layer, extras)
        if layer.is_initialized:
            adopted.behind = False
            adopted.allocate_branches(layer.keys, layer.values)
        return adopted

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.allocate_branches(key_states, value_states)

    def allocate_branches(self, keys: Tensor, values: Tensor) -> None:
        """Makes both branches' buffers, for keys and values like these `[B, Hk, any, D]`."""
        for names in (BRANCH, WINDOW):
            for name, states in zip(names, (keys, values), strict=True):
                batch, heads, _, size = states.shape
                self.keep_in_place(name, states.new_zeros(batch, heads, self.max_cache_len, size))

    def extend(
        self, keys: Tensor, values: Tensor, compressors: Compressors, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `NsaStaticLayer.extend`, of the new tokens' keys and values `[B, Hk, T, D]` of the compressed branch."""
        return super().extend(*self.written(BRANCH, keys, values), compressors, starts)

    def extend_window(self, keys: Tensor, values: Tensor, window_size: int) -> tuple[Tensor, Tensor]:
        """Writes the window branch's keys and values of the new tokens, `[B, Hk, T, D]`; called after every `update`.

        Returns:
            Its keys and values of all places, `[B, Hk, max_cache_len, D]`: the buffers themselves.
        """
        return self.written(WINDOW, keys, values)

    def written(self, names: tuple[str, str], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of these names, with the new tokens' keys and values at their places."""
        if getattr(self, names[0]).shape[1] != keys.shape[1]:
            self.allocate_branches(keys, values)  # as in `NsaStaticLayer.extend`
        place = self.cumulative_length - self.new_tokens + torch.arange(self.new_tokens, device=keys.device)
        for name, states in zip(names, (keys, values), strict=True):
            getattr(self, name).index_copy_(2, place, states)
        return getattr(self, names[0]), getattr(self, names[1])
