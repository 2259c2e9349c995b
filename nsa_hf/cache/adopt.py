"""Caches of a user or of `generate()`: their layers are replaced by ours, which hold entries and an index too."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from ..config import NsaConfigMixin
from ..errors import NsaError
from ..releases import INSTALLED
from ..segments import Segments
from ..tested import NEWEST
from .branches import FILLED_BY_ANOTHER, NsaIndependentLayer
from .dynamic import NsaDynamicLayer
from .extras import Extras
from .static import OFFLOADED_STATIC, NsaStaticLayer, NsaStaticWindowLayer, in_a_graph
from .static_branches import NsaStaticIndependentLayer

OFFLOADED_ON_CPU = "an offloaded cache waits in CPU memory for the GPU, and this model is on the CPU: do without"

UNUSABLE = (
    "sparse attention cannot use a {}: it would give wrong tokens. Use DynamicCache(), which generate() makes by "
    "itself when cache_implementation is not set, or StaticCache (cache_implementation='static')"
)

CACHE_LOST = (
    f"the cache did not reach the sparse layers: Transformers {INSTALLED} hands it over in a way that this nsa_hf does "
    f"not know (tested up to {NEWEST}): pip install 'transformers=={NEWEST}.*', or a newer nsa-hf. In training with "
    "gradient checkpointing it hands none over: give no cache there, and use_cache=False"
)


def adopt_layer(cache: Cache, layer_idx: int, extras: Extras, device: torch.device) -> NsaDynamicLayer | NsaStaticLayer:
    """The cache layer of a sparse layer; a plain one is first replaced by ours, with what it holds.

    Args:
        cache: dynamic (offloaded or not) or static.
        layer_idx: the layer's number in the model.
        extras: what the layer's cache is to hold beside keys and values.
        device: where the model is.

    Raises:
        NsaError: the cache is of a kind that sparse attention cannot use, or holds what another kind of model left
            there; names it and what to use instead.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise NsaError(UNUSABLE.format(type(cache).__name__))
    if cache.offloading and any(type(layer) is StaticLayer for layer in cache.layers):
        raise NsaError(OFFLOADED_STATIC)
    if cache.offloading and device.type == "cpu":
        raise NsaError(f"{type(cache).__name__}(offloading=True) cannot be used: {OFFLOADED_ON_CPU}")
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if type(layer) is DynamicLayer:
        layer = cache.layers[layer_idx] = (NsaIndependentLayer if extras.independent else NsaDynamicLayer).adopt(layer)
    if type(layer) is StaticLayer:
        static = NsaStaticIndependentLayer if extras.independent else NsaStaticLayer
        layer = cache.layers[layer_idx] = static.adopt(layer, extras)
    if not isinstance(layer, NsaDynamicLayer | NsaStaticLayer):
        kind = type(cache).__name__ if layer is None else f"{type(cache).__name__} ({type(layer).__name__})"
        raise NsaError(UNUSABLE.format(kind))
    if isinstance(layer, NsaIndependentLayer | NsaStaticIndependentLayer) is not extras.independent:
        raise NsaError(FILLED_BY_ANOTHER)
    check_extras(layer, extras)
    return layer


def check_extras(layer: NsaDynamicLayer | NsaStaticLayer, wanted: Extras) -> None:
    """Whether a cache layer holds beside keys and values what a model needs, or can catch up with it.

    Raises:
        NsaError: it holds entries of other sizes or an index of other channels or bits: another model's.
    """
    for kind, held, needed in (
        ("entries of nsa_kernel_size and nsa_kernel_stride", layer.entry_sizes, wanted.entry_sizes),
        ("an index of", layer.index, wanted.index),
    ):
        if held != needed and (held is not None or isinstance(layer, NsaStaticLayer)):
            holds = f"has no room for {kind}" if held is None else f"holds {kind} {held}, and the model needs"
            needs = "none" if needed is None else str(needed)
            raise NsaError(f"this cache {holds} {needs}: start with a new cache")


def check_lengths(cache: Cache, layer_idx: int, past: int) -> None:
    """Before a layer adds tokens to a dynamic cache: whether it holds as many as the cache's first layer.

    Args:
        past: how many that holds.

    Raises:
        NsaError: it does not, because a crop or a forward stopped halfway.
    """
    length = cache.get_seq_length(layer_idx)
    if length != past or past < 0:
        raise NsaError(
            f"layer {layer_idx} of this cache holds {length} tokens and the first {past}: a crop or a forward stopped "
            "halfway, or more was cropped than there is. Call cache.reset() and start anew"
        )


def check_starts(cache: Cache, segments: Segments, tokens: int) -> None:
    """Before a forward: whether the rows begin where they did when this cache's entries were compressed.

    A row that held nothing but padding may begin now, and a finished one may be masked from end to end. Inside a graph
    (`torch.compile`, CUDA's) nothing is checked.

    Args:
        segments: of the new tokens, `tokens` of each row.

    Raises:
        NsaError: another mask came than before, or none.
        RuntimeError: the same for single tokens on a GPU in a static cache, as in `static_segments`.
    """
    if in_a_graph():
        return
    layer = next((one for one in cache.layers if isinstance(one, NsaDynamicLayer | NsaStaticLayer)), None)
    if layer is None or not layer.knows_starts:
        return
    lengths = segments.lengths
    some_starts = layer.starts if segments.starts is None else segments.starts
    if some_starts is None:
        return  # all rows began at the first token, and do
    now = torch.zeros_like(some_starts) if segments.starts is None else some_starts
    then = torch.zeros_like(some_starts) if layer.starts is None else layer.starts.to(some_starts.device)
    past = torch.full_like(now, segments.past) if lengths is None else lengths.to(now.device) - tokens
    moved = (now.minimum(past) != then.minimum(past)) & (now < past + tokens)
    if lengths is not None and tokens == 1 and now.device.type != "cpu":
        torch._assert_async(~moved.any(), "attention_mask: rows begin at other tokens than when this cache was filled")
    elif bool(moved.any()):
        raise NsaError(
            f"attention_mask: this cache holds rows that begin at token {then.tolist()}, and now they would begin at "
            f"{now.tolist()}: give the same padding with every forward, the mask of all tokens so far, or start with "
            "an empty cache"
        )


def adopt_window_layer(cache: Cache, layer_idx: int) -> None:
    """Replaces a sliding layer of a static cache by one that knows which tokens it has overwritten; leaves others."""
    if layer_idx < len(cache.layers) and type(cache.layers[layer_idx]) is StaticSlidingWindowLayer:
        cache.layers[layer_idx] = NsaStaticWindowLayer.adopt(cache.layers[layer_idx])


def check_reached_layers(cache: Cache, config: NsaConfigMixin) -> None:
    """After a forward: whether this cache has reached every sparse layer.

    Raises:
        NsaError: the family's code handed it to its layers in a way that ours do not know.
    """
    for layer in range(config.num_hidden_layers):  # type: ignore[attr-defined]
        cache_layer = cache.layers[layer] if layer < len(cache.layers) else None
        if config.is_nsa_layer(layer) and not isinstance(cache_layer, NsaDynamicLayer | NsaStaticLayer):
            raise NsaError(CACHE_LOST)


def static_length(cache: Cache | None) -> tuple[Tensor | int, int] | None:
    """The tokens that a static cache holds (a tensor on its device; 0 before the first), and those it has room for.

    None for other caches.
    """
    for layer in cache.layers if cache is not None else ():
        if isinstance(layer, StaticLayer) and not layer.is_sliding:
            return layer.get_seq_length(), layer.max_cache_len
    return None
