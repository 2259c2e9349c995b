"""The sparse attention layer: what is new in it, and how it is put in the place of a dense family's attention."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nsa_hf.kernels import Placement, ZeroLinear, build_compressor, compress, nsa_attention, reference_attention

from .branches import BRANCHES, KeysAndValues, branch_modules, stand_in
from .cache.adopt import CACHE_LOST, check_in_step, nsa_cache_layer, nsa_window_layer
from .cache.dynamic import NsaDynamicLayer
from .cache.static import NsaStaticLayer
from .config import NsaConfigMixin
from .errors import NsaError
from .features import head_sizes, layer_window
from .modes import Mode
from .releases import by_name, cache_among
from .segments import Segments
from .sliding import dense_weights, sliding_attention

# The user's choice in `attn_implementation`, and the backend of `nsa_attention` that it means.
IMPLEMENTATIONS = {"nsa": "auto", "eager": "reference"}


class Gate(nn.Module):
    """The gates' MLP: `[B, T, hidden]` to logits `[B, T, Hq, 3]` (compressed, selected, window), zero at first."""

    def __init__(self, hidden_size: int, gate_dim: int, heads: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, gate_dim)
        self.down = ZeroLinear(gate_dim, heads * 3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(hidden_states))).unflatten(-1, (-1, 3))


def gate_values(logits: Tensor, kind: str, blend: float) -> Tensor:
    """Gates from their logits, `[B, T, Hq, 3]` each; at least float32.

    Args:
        kind: `sigmoid`, the paper's three independent sigmoids; `residual`, `tanh(z/2)` with 1 added for the selected
            branch, so that zero logits give (0, 1, 0) exactly with a slope of 1/2; `blend`, from (0, 1, 0) to the
            paper's.
        blend: the share of the paper's gates, used by `blend` only.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if kind == "sigmoid":
        return logits.sigmoid()
    # made on the device: a copy from the host would wait for it, at every layer and token
    dense = (torch.arange(3, device=logits.device) == 1).to(logits.dtype)
    if kind == "residual":
        return dense + (logits / 2).tanh()
    return (1 - blend) * dense + blend * logits.sigmoid()


class NsaModules(nn.Module):
    """What a layer has beyond the dense one's parameters: `compress_k`, `compress_v` and `gate`."""

    def __init__(self, config: NsaConfigMixin, heads: int, head_dim: int, value_dim: int):
        super().__init__()
        kind, size, width = config.nsa_compression, config.nsa_kernel_size, config.nsa_compression_dim
        self.compress_k = build_compressor(kind, size, head_dim, width)
        self.compress_v = build_compressor(kind, size, value_dim, width)
        self.gate = Gate(config.hidden_size, config.nsa_gate_dim, heads)  # type: ignore[attr-defined]


class NsaAttentionMixin:
    """In front of a family's attention class: its projections, norms, RoPE and cache, with sparse attention inside.

    Attributes:
        forward_names: the family's names of its forward's arguments; the hidden states come first.
        handed: what the family hands to the attention function by name (see discovery.py).
        masks_slide: whether the family's decoder makes masks of a sliding window.
        window: the layer's own sliding window in tokens, or None for full attention.
        nsa: the new modules, or None in a layer that stays dense.
    """

    forward_names: tuple[str, ...]
    handed: dict[str, ast.expr]
    masks_slide: bool

    def __init__(self, config: NsaConfigMixin, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_idx, *args, **kwargs)
        self.model_config = config
        self.layer_idx = layer_idx
        # The family's forward looks its attention up by this name. With "eager" it would take its own dense function,
        # so it always finds "nsa" here, and `nsa_attention_forward` asks the model's config what the user chose.
        self.config = copy.copy(config)
        self.config._attn_implementation_internal = "nsa"
        self.window = layer_window(self, self.handed, config, layer_idx, self.masks_slide)
        self.nsa: NsaModules | None = None
        if config.is_nsa_layer(layer_idx):
            self.nsa = NsaModules(config, *head_sizes(self, config))
            for branch in BRANCHES if config.nsa_branch_kv == "independent" else ():
                setattr(self.nsa, branch, branch_modules(self))
                stand_in(self, branch)  # now: a compiled forward cannot make it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.forward_names, args, kwargs)
        hidden_states, cache = given[self.forward_names[0]], cache_among(given.values())
        layer, branches = None, None
        independent = self.model_config.nsa_branch_kv == "independent"
        if cache is not None:
            nsa_window_layer(cache, self.layer_idx)
            if given["nsa_segments"].lengths is None:
                check_in_step(cache, self.layer_idx, given["nsa_segments"].past)
        elif given["nsa_segments"].past or given["nsa_segments"].lengths is not None:
            raise NsaError(CACHE_LOST)
        if cache is not None and self.nsa is not None:
            sizes, device = self.model_config.nsa_sizes, hidden_states.device
            layer = nsa_cache_layer(cache, self.layer_idx, sizes, device, independent)
        if independent and self.nsa is not None and (layer is not None or not given["nsa_mode"].dense):
            branches = [self.branch_states(branch, hidden_states, given) for branch in BRANCHES]
        own: dict[str, Any] = {"nsa_hidden_states": hidden_states, "nsa_cache_layer": layer, "nsa_branches": branches}
        if cache is not None and self.window is not None and given["nsa_segments"].lengths is not None:
            held = cache.layers[self.layer_idx]
            own["nsa_static"] = (held.get_seq_length(), held.get_mask_sizes(hidden_states.shape[1])[1])
        return super().forward(**given, **own)

    def branch_states(self, branch: str, hidden_states: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A branch's own key and value of the new tokens, `[B, Hk, T, D]` after norms and RoPE."""
        uncached = {name: None if isinstance(value, Cache) else value for name, value in given.items()}
        own: dict[str, Any] = {"nsa_hidden_states": hidden_states, "nsa_cache_layer": None, "nsa_leave": True}
        try:
            super(NsaAttentionMixin, stand_in(self, branch)).forward(**uncached, **own)
        except KeysAndValues as made:
            key, value = made.args
            return key, value
        raise AssertionError("the family's attention did not call the attention function")


def nsa_attention_forward(
    module: NsaAttentionMixin,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    nsa_hidden_states: Tensor,
    nsa_cache_layer: NsaDynamicLayer | NsaStaticLayer | None,
    nsa_segments: Segments,
    nsa_mode: Mode,
    nsa_branches: list[tuple[Tensor, Tensor]] | None = None,
    nsa_leave: bool = False,
    nsa_static: tuple[int, int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What Transformers calls between a family's projections: sparse attention of one layer.

    Args:
        query, key, value: `[B, H, T or S, D]` after RoPE and the cache; key and value are those of all S tokens.
        attention_mask: ignored; `nsa_segments` says the same without T*S numbers.
        nsa_mode: what the forward is run with, the same in its recomputation.
        nsa_hidden_states: `[B, T, hidden]`, what entered the layer; the gates are made of it.
        nsa_branches: with independent keys and values, those of the compressed branch and of the window,
            `[B, Hk, T, D]` of the new tokens; key and value are the selected branch's.
        nsa_leave: raise `KeysAndValues` with key and value instead.
        nsa_static: of a layer with a sliding window and a static cache, see `sliding_attention`.

    Returns:
        `[B, T, Hq, Dv]`, and with `output_attentions` the weights `[B, Hq, T, S]`: of a sparse layer those of the
        selected branch.
    """
    if nsa_leave:
        raise KeysAndValues(key, value)
    config, nsa = module.model_config, module.nsa
    stride = config.nsa_kernel_stride
    starts, lengths, cu_seqlens = nsa_segments.starts, nsa_segments.lengths, nsa_segments.cu_seqlens
    compressed, window = nsa_branches or ((key, value), None)
    entries: Sequence[Tensor] | None = None
    if nsa_cache_layer is None and nsa is not None and key.shape[2] != query.shape[2]:
        raise NsaError(CACHE_LOST)
    if nsa_cache_layer is not None:
        assert nsa is not None
        if cu_seqlens is not None:
            nsa_cache_layer.packed = True
        elif not nsa_mode.dense or not nsa_cache_layer.catches_up:
            entries = nsa_cache_layer.extend(*compressed, nsa.compress_k, nsa.compress_v, stride, starts)
            if window is not None:
                window = nsa_cache_layer.slide(*window, config.nsa_window_size)
        else:
            nsa_cache_layer.note_starts(starts)
    query, key, value = same_dtype(query, key, value)
    weights = None
    if nsa_mode.weights and (module.window is not None or nsa is None or nsa_mode.dense):
        weights = dense_weights(query, key, scaling, module.window, nsa_segments, nsa_static)
    if module.window is not None:
        window_of_layer = (module.window, nsa_segments, nsa_static)
        return sliding_attention(module, query, key, value, scaling, dropout, *window_of_layer), weights
    if nsa is None or nsa_mode.dense:
        return dense_attention(module, query, key, value, scaling, dropout, nsa_segments), weights
    if dropout:
        raise NsaError(f"sparse attention has no attention dropout, got {dropout}: set config.attention_dropout = 0")

    if entries is None:
        pairs = zip(compressed, (nsa.compress_k, nsa.compress_v), strict=True)
        entries = [
            compress(x.to(value.dtype).transpose(1, 2), compressor, stride, starts=starts, cu_seqlens=cu_seqlens)
            for x, compressor in pairs
        ]
    k_win, v_win = (None, None) if window is None else (x.to(value.dtype).transpose(1, 2) for x in window)
    gates = gate_values(nsa.gate(nsa_hidden_states), config.nsa_gate, nsa_mode.gate_blend)
    inputs = (*(x.transpose(1, 2) for x in (query, key, value)), *(x.to(value.dtype) for x in entries), gates)
    # so the selection, which is always made, is no wider than the text needs
    sizes = nsa_mode.sizes.within(key.shape[2])
    places: dict[str, Any] = {"starts": starts, "lengths": lengths, "cu_seqlens": cu_seqlens}
    own_window = {"k_win": k_win, "v_win": v_win}
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    if nsa_mode.weights:
        options: dict[str, Any] = {"placement": Placement(**places), "return_weights": True, **own_window}
        out, selection, weights = reference_attention(*inputs, sizes=sizes, scale=scale, **options)
    else:
        options = {**sizes.by_name(), **places, **own_window}
        out, selection = nsa_attention(*inputs, scale=scale, return_selection=True, backend=nsa_mode.backend, **options)
    if nsa_mode.recorded is not None:
        nsa_mode.recorded.selections[module.layer_idx] = selection
    return out, weights


def same_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype for all three, as PyTorch's own attention does under autocast: RoPE leaves q and k in float32 there."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def dense_attention(
    module: NsaAttentionMixin,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    segments: Segments,
) -> Tensor:
    """Dense causal attention of the same queries, keys and values: `[B, H, T or S, D]` to `[B, T, Hq, Dv]`."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling)[0]

    if segments.borders:
        documents = [slice(a, b) for a, b in zip(segments.borders[:-1], segments.borders[1:], strict=True)]
        return torch.cat([sdpa(query[:, :, d], key[:, :, d], value[:, :, d], None) for d in documents], dim=1)
    tokens, keys = query.shape[2], key.shape[2]
    if segments.starts is None and segments.lengths is None and tokens in (1, keys):
        return sdpa(query, key, value, None)
    # [B or 1, 1, T, 1]
    end = segments.lengths[:, None, None, None] if segments.lengths is not None else keys
    position = end - tokens + torch.arange(tokens, device=query.device)[None, None, :, None]
    past = torch.arange(keys, device=query.device)
    visible = past <= position
    if segments.starts is not None:
        # padding attends to itself, so that no row of the softmax is empty
        visible = visible & (past >= segments.starts[:, None, None, None]) | (past == position)
    return sdpa(query, key, value, visible)


AttentionInterface.register("nsa", nsa_attention_forward)
# The model hands its own `Segments` to the layers (see modeling.py), so no mask is ever needed; a name that is not
# registered would make Transformers drop padding without a word.
AttentionMaskInterface.register("nsa", lambda *args, **kwargs: None)
