"""Models with random weights, for generate.py and training.py, and caches filled with a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from nsa_hf.families import nsa_config_from_dense
from nsa_hf.kernels import reference
from nsa_hf.releases import CACHE

from .common import Heads

# How blocks are chosen: as in the paper, and by an index.
PAPER: dict[str, Any] = {"nsa_selector": "compressed"}
INDEX: dict[str, Any] = {
    "nsa_selector": "channels",
    "nsa_selector_dim": 32,
    "nsa_selector_bits": 8,
    "nsa_compression": "none",
}


@dataclass(frozen=True)
class Shape:
    """A model's size.

    Attributes:
        name: `family:layers:hidden:intermediate:vocabulary`.
        heads: of its attention.
    """

    name: str
    heads: Heads

    def config(self, tokens: int) -> Any:
        """The dense config, for texts of up to `tokens`."""
        family, *sizes = self.name.split(":")
        layers, hidden, intermediate, vocabulary = map(int, sizes)
        return AutoConfig.for_model(
            family,
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=intermediate,
            vocab_size=vocabulary,
            num_attention_heads=self.heads.query_heads,
            max_position_embeddings=tokens,
            num_key_value_heads=self.heads.kv_heads,
            head_dim=self.heads.key_dim,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


def make_model(
    shape: Shape,
    tokens: int,
    sparse: bool,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    fields: dict[str, Any] = PAPER,
) -> Any:
    """A model of random numbers, the same in every call; the weights that a sparse one shares with the dense are equal.

    Args:
        tokens: the longest text.
        sparse: converted.
        dtype: of its weights.
        fields: what a sparse one's config has; by default blocks are chosen as in the paper.
    """
    model = empty_model(shape, tokens, sparse, device, dtype, fields)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        # the new parameters last; norms stay 1 and biases 0
        for _, weight in sorted(model.named_parameters(), key=lambda named: (".nsa." in named[0], named[0])):
            if weight.dim() > 1:
                weight.normal_(std=0.02, generator=random)
    return model


def empty_model(
    shape: Shape, tokens: int, sparse: bool, device: str, dtype: torch.dtype, fields: dict[str, Any]
) -> Any:
    """A model of which the weights are to come; see `make_model` for the arguments. On "meta" it has none."""
    config = shape.config(tokens)
    if sparse:
        config = nsa_config_from_dense(config, **fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class CutLayer(StaticLayer):
    """Static buffers of which the attention is given the part that is filled, known on the host.

    Attributes:
        filled: tokens in the buffers.
    """

    is_compileable = False
    filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.filled += key_states.shape[-2]
        return keys[:, :, : self.filled], values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0


def filled_cache(model: Any, ids: Tensor, system: str, room: int) -> Cache:
    """A cache with a prompt in it, which is read in one row and copied to the others.

    Args:
        ids: the prompt, `[B, n]`, the same in every row.
        system: of `generate.SYSTEMS`, which decides the kind of cache.
        room: tokens that a static cache has place for.
    """
    batch, tokens = ids.shape
    row = DynamicCache(config=model.config)
    model(ids[:1], **{CACHE: row}, use_cache=True, logits_to_keep=1)
    if system.endswith("-dynamic"):
        row.batch_repeat_interleave(batch)
        return row
    cache = StaticCache(config=model.config, max_cache_len=room)
    if system == "dense-cut":
        cache.layers = [CutLayer(room) for _ in cache.layers]
    for layer in cache.layers:
        filled = row.layers.pop(0)  # one after the other: the memory is needed
        layer.lazy_initialization(*(x.expand(batch, -1, -1, -1) for x in (filled.keys, filled.values)))
        layer.keys[:, :, :tokens] = filled.keys[:, :, :tokens]
        layer.values[:, :, :tokens] = filled.values[:, :, :tokens]
    cut_back(cache, tokens)
    return cache


def cut_back(cache: Cache, tokens: int) -> None:
    """Takes out of a cache what comes after its first `tokens` tokens."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(tokens)
            if isinstance(layer, CutLayer):
                layer.filled = tokens
        elif (more := layer.get_seq_length() - tokens) > 0:
            layer.crop(-more)


@contextmanager
def select_these(blocks: Iterable[Tensor]) -> Iterator[None]:
    """Within this context the reference attention takes these blocks instead of choosing.

    Args:
        blocks: int32 `[B, 1, Hk, topk]`, one for each call with a single query, no more and no fewer.
    """
    original, remaining = reference.select_blocks, iter(blocks)
    reference.select_blocks = lambda *_: next(remaining).transpose(1, 2).long()
    try:
        yield
        assert next(remaining, None) is None, "blocks are left over"
    finally:
        reference.select_blocks = original
