"""The index of a layer: the channels of its queries and keys by which blocks are chosen (`nsa_selector="channels"`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_hf.kernels import quantize_index_keys

from .config import NsaConfigMixin
from .errors import NsaError


class IndexKeys(NamedTuple):
    """`keys [B, Hk, S, c]` in the model's dtype; or in int8, with `scales [B, Hk, S]` bfloat16."""

    keys: Tensor
    scales: Tensor | None

    def then(self, more: IndexKeys) -> IndexKeys:
        """These tokens' keys, and behind them those of `more`."""
        scales = None if self.scales is None or more.scales is None else torch.cat([self.scales, more.scales], dim=2)
        return IndexKeys(torch.cat([self.keys, more.keys], dim=2), scales)


@dataclass(frozen=True)
class Index:
    """Which channels of a layer's heads, and in what form their keys are held and compared.

    Attributes:
        runs: the channels as runs `[first, end)`.
        bits: 16: keys in the dtype of the layer's; 8: int8 with a scale for each token and head.
    """

    runs: tuple[tuple[int, int], ...]
    bits: int = 16

    def __str__(self) -> str:
        channels = (str(first) if first + 1 == end else f"{first}-{end - 1}" for first, end in self.runs)
        return f"channels {', '.join(channels)} in {self.bits} bits"

    def cut(self, states: Tensor) -> Tensor:
        """The channels `[..., c]` of queries or keys `[..., D]`: a copy without a gradient."""
        return torch.cat([states[..., first:end] for first, end in self.runs], dim=-1).detach()

    def keys(self, keys: Tensor) -> IndexKeys:
        """The index's keys of a layer's keys `[B, Hk, S, D]`."""
        cut = self.cut(keys)
        return IndexKeys(*quantize_index_keys(cut)) if self.bits == 8 else IndexKeys(cut, None)

    def arguments(self, query: Tensor, held: IndexKeys) -> dict[str, Tensor | None]:
        """What the operation takes, by name, of a layer's queries `[B, Hq, T, D]` and of the index's keys."""
        keys, scales = held
        return {
            "q_index": self.cut(query.transpose(1, 2)),
            "k_index": (keys if scales is not None else keys.to(query.dtype)).transpose(1, 2),
            "k_index_scales": None if scales is None else scales.transpose(1, 2),
        }


def index_of_layer(config: NsaConfigMixin, layer: int, head_size: int) -> Index | None:
    """The index of a sparse layer; None where blocks are scored by compressed keys.

    Raises:
        NsaError: the layer has no channels, or a head has not so many.
    """
    if config.nsa_selector != "channels":
        return None
    assert config.nsa_selector_channels is not None
    channels = config.nsa_selector_channels[layer]
    if not channels or max(channels) >= head_size:
        raise NsaError(
            f"nsa_selector_channels: layer {layer}'s channels must be within 0 .. {head_size - 1}, got "
            f"{max(channels) if channels else 'none'}"
        )
    return Index(runs_of(channels), config.nsa_selector_bits)


def runs_of(channels: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as runs `[first, end)`."""
    runs: list[tuple[int, int]] = []
    for channel in channels:
        if runs and runs[-1][1] == channel:
            runs[-1] = (runs[-1][0], channel + 1)
        else:
            runs.append((channel, channel + 1))
    return tuple(runs)
