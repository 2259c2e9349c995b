"""The sparse attention layer: the modules it adds, and what it computes in the place of its family's attention."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nsa_hf.kernels import (
    Placement,
    ZeroLinear,
    build_compressor,
    exported_attention,
    is_exporting,
    nsa_attention,
    reference_attention,
)

from .branches import BRANCHES, KeysAndValues, attention_of_branch, branch_modules
from .cache.adopt import CACHE_LOST, adopt_layer, adopt_window_layer, check_lengths
from .cache.dynamic import NsaDynamicLayer
from .cache.extras import Extras
from .cache.static import NsaStaticLayer
from .config import NsaConfigMixin
from .entries import Compressors
from .errors import NsaError
from .features import head_sizes, layer_window
from .index import Index, IndexKeys, index_of_layer
from .modes import Attended, Mode
from .releases import by_name, cache_among
from .segments import Segments
from .sliding import dense_weights, sliding_attention, weighted_values

# The user's choice in `attn_implementation`, and the backend of `nsa_attention` that it means.
IMPLEMENTATIONS = {"nsa": "auto", "eager": "reference"}


class Gate(nn.Module):
    """The gates' MLP: `[B, T, hidden]` to logits `[B, T, Hq, 3]` (compressed, selected, window), all zero at first."""

    def __init__(self, hidden_size: int, gate_dim: int, heads: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, gate_dim)
        self.down = ZeroLinear(gate_dim, heads * 3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(hidden_states))).unflatten(-1, (-1, 3))


def gate_values(logits: Tensor, kind: str, blend: float) -> Tensor:
    """Gates from their logits, `[B, T, Hq, 3]` each; at least float32.

    Args:
        logits: of `Gate`.
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
    """The modules that a sparse layer adds to its family's: `gate`, and `compress_k` and `compress_v` or None.

    With independent keys and values also `compressed` and `window`: see branches.py.
    """

    def __init__(self, config: NsaConfigMixin, heads: int, head_dim: int, value_dim: int):
        super().__init__()
        kind, size, width = config.nsa_compression, config.nsa_kernel_size, config.nsa_compression_dim
        self.compress_k = None if kind == "none" else build_compressor(kind, size, head_dim, width)
        self.compress_v = None if kind == "none" else build_compressor(kind, size, value_dim, width)
        self.gate = Gate(config.hidden_size, config.nsa_gate_dim, heads)  # type: ignore[attr-defined]

    def compressors(self, config: NsaConfigMixin) -> Compressors | None:
        """What makes the layer's entries; None without a compressed branch."""
        if self.compress_k is None or self.compress_v is None:
            return None
        return Compressors(self.compress_k, self.compress_v, config.nsa_kernel_stride)


class NsaAttentionMixin:
    """In front of a family's attention class: sparse attention between the family's projections, norms and RoPE.

    A module is built as the family's attention and is given this class afterwards (`become_sparse`).

    Attributes:
        layer_idx: the layer's number in the model, by the family.
        forward_names: the family's names of its forward's arguments; the hidden states come first.
        call_arguments: what the family hands to the attention function, name to source (see discovery.py).
        masks_slide: whether the family's decoder makes masks of a sliding window.
        window: the layer's own sliding window in tokens, or None for full attention.
        nsa: the new modules, or None in a layer that stays dense.
        nsa_index: the channels by which a sparse layer chooses blocks; None: by compressed keys.
    """

    layer_idx: int
    forward_names: tuple[str, ...]
    call_arguments: dict[str, ast.expr]
    masks_slide: bool

    def become_sparse(self, config: NsaConfigMixin) -> None:
        """Adds what this class has beyond the family's class, of which the module was until now.

        Args:
            config: the model's.

        Raises:
            NotPlain: the layer has a feature that sparse attention does not have.
        """
        self.model_config = config
        # The family's forward looks its attention up by this name. With "eager" it would take its own dense function,
        # so it always finds "nsa" here, and `nsa_attention_forward` asks the model's config what the user chose.
        self.config = copy.copy(config)
        self.config._attn_implementation_internal = "nsa"
        self.window = layer_window(
            self, self.call_arguments, config, getattr(self, "layer_idx", None), self.masks_slide
        )
        self.nsa: NsaModules | None = None
        self.nsa_index: Index | None = None
        if config.is_nsa_layer(self.layer_idx):
            heads, head_size, value_size = head_sizes(self, config)
            self.nsa = NsaModules(config, heads, head_size, value_size)
            self.nsa_index = index_of_layer(config, self.layer_idx, head_size)
            for branch in BRANCHES if config.nsa_branch_kv == "independent" else ():
                setattr(self.nsa, branch, branch_modules(self))
                attention_of_branch(self, branch)  # made now: a compiled forward cannot make it

    def extras(self) -> Extras | None:
        """What a sparse layer's cache holds beside keys and values; None of a layer that stays dense."""
        if self.nsa is None:
            return None
        compressors = self.nsa.compressors(self.model_config)
        independent = self.model_config.nsa_branch_kv == "independent"
        return Extras(None if compressors is None else compressors.sizes, self.nsa_index, independent)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's, with `nsa_segments` and `nsa_mode` among its further arguments."""
        arguments = by_name(self.forward_names, args, kwargs)
        hidden_states, cache = arguments[self.forward_names[0]], cache_among(arguments.values())
        segments, mode = arguments["nsa_segments"], arguments["nsa_mode"]
        independent = self.model_config.nsa_branch_kv == "independent"
        cache_layer, branches, static = None, None, None
        if cache is not None:
            adopt_window_layer(cache, self.layer_idx)
            if segments.lengths is None:
                check_lengths(cache, self.layer_idx, segments.past)
            elif self.window is not None:
                window_layer = cache.layers[self.layer_idx]
                static = (window_layer.get_seq_length(), window_layer.get_mask_sizes(hidden_states.shape[1])[1])
        elif segments.past or segments.lengths is not None:
            raise NsaError(CACHE_LOST)
        if cache is not None and (extras := self.extras()) is not None:
            cache_layer = adopt_layer(cache, self.layer_idx, extras, hidden_states.device)
        if independent and self.nsa is not None and (cache_layer is not None or not mode.runs_dense(self.layer_idx)):
            branches = [self.branch_states(branch, hidden_states, arguments) for branch in BRANCHES]
        return super().forward(
            **arguments,
            nsa_hidden_states=hidden_states,
            nsa_cache_layer=cache_layer,
            nsa_branches=branches,
            nsa_static=static,
        )

    def branch_states(self, branch: str, hidden_states: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A branch's own key and value of the new tokens, `[B, Hk, T, D]` after norms and RoPE.

        Args:
            branch: one of `BRANCHES`.
            hidden_states: `[B, T, hidden]`, what entered the layer.
            arguments: of the layer's forward, by name.
        """
        uncached = {name: None if isinstance(value, Cache) else value for name, value in arguments.items()}
        try:
            super(NsaAttentionMixin, attention_of_branch(self, branch)).forward(
                **uncached, nsa_hidden_states=hidden_states, nsa_cache_layer=None, nsa_only_keys_and_values=True
            )
        except KeysAndValues as states:
            key, value = states.args
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
    nsa_only_keys_and_values: bool = False,
    nsa_static: tuple[int, int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of one layer, which the family's forward calls between its projections.

    Args:
        query, key, value: `[B, H, T or S, D]` after RoPE and the cache; key and value are those of all S tokens.
        attention_mask: ignored; `nsa_segments` says the same without T*S numbers.
        nsa_hidden_states: `[B, T, hidden]`, what entered the layer; the gates are made of it.
        nsa_cache_layer: the layer's cache, where there is one.
        nsa_segments: which positions belong to which row or document.
        nsa_mode: what the forward runs with, the same in its recomputation.
        nsa_branches: with independent keys and values, those of the compressed branch and of the window,
            `[B, Hk, T, D]` of the new tokens; key and value are the selected branch's.
        nsa_only_keys_and_values: raise `KeysAndValues` with key and value instead.
        nsa_static: of a layer with a sliding window and a static cache, see `sliding_attention`.

    Returns:
        `[B, T, Hq, Dv]`, and with `output_attentions` the weights `[B, Hq, T, S]`: of a sparse layer those of the
        selected branch.
    """
    if nsa_only_keys_and_values:
        raise KeysAndValues(key, value)
    nsa, segments, mode = module.nsa, nsa_segments, nsa_mode
    compressed, window = nsa_branches or ((key, value), None)
    entries, index_keys = None, None
    if nsa_cache_layer is None and nsa is not None and key.shape[2] != query.shape[2]:
        raise NsaError(CACHE_LOST)
    if nsa_cache_layer is not None:
        entries, window, index_keys = extend_cache_layer(
            module, nsa_cache_layer, key, compressed, window, segments, mode
        )
    key_as_cached = key
    query, key, value = same_dtype(query, key, value)
    weights = None
    if mode.weights and (module.window is not None or nsa is None or mode.runs_dense(module.layer_idx)):
        weights = dense_weights(query, key, scaling, module.window, segments, nsa_static)
    if weights is not None and not dropout:
        return weighted_values(weights, value), weights
    if module.window is not None:
        window_of_layer = (module.window, segments, nsa_static)
        return sliding_attention(module, query, key, value, scaling, dropout, *window_of_layer), weights
    if nsa is None or mode.runs_dense(module.layer_idx):
        return dense_attention(module, query, key, value, scaling, dropout, segments), weights
    if dropout:
        raise NsaError(f"sparse attention has no attention dropout, got {dropout}: set config.attention_dropout = 0")
    if mode.recorded is not None and mode.recorded.recorders:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        states = (query.detach(), key.detach(), compressed[0].detach())
        mode.recorded.note_attended(module.layer_idx, Attended(*states, scale, segments))
    compressors = nsa.compressors(module.model_config)
    if entries is None and compressors is not None:
        entries = compressors.entries(*compressed, value.dtype, segments)
    if index_keys is None and module.nsa_index is not None:
        index_keys = module.nsa_index.keys(key_as_cached)
    gates = gate_values(nsa.gate(nsa_hidden_states), module.model_config.nsa_gate, mode.gate_blend)
    return sparse_attention(module, query, key, value, scaling, entries, index_keys, window, gates, segments, mode)


def extend_cache_layer(
    module: NsaAttentionMixin,
    cache_layer: NsaDynamicLayer | NsaStaticLayer,
    key: Tensor,
    compressed: tuple[Tensor, Tensor],
    window: tuple[Tensor, Tensor] | None,
    segments: Segments,
    mode: Mode,
) -> tuple[Sequence[Tensor] | None, tuple[Tensor, Tensor] | None, IndexKeys | None]:
    """Brings what a sparse layer's cache holds beside keys and values up to date.

    Args:
        key: of all tokens held, `[B, Hk, S, D]`.
        compressed: key and value of the compressed branch, `[B, Hk, S or T, D]`.
        window: those of the window branch, `[B, Hk, T, D]`; None where it shares the selected branch's.

    Returns:
        The compressed keys and values `[B, N, Hk, D]`, the keys and values that the new tokens' windows see, and the
        index's keys; of the first and the last None where there are none, or they were not brought up to date.
    """
    if segments.cu_seqlens is not None:
        cache_layer.packed = True
        return None, window, None
    cache_layer.note_starts(segments.starts)
    if mode.runs_dense(module.layer_idx) and cache_layer.catches_up:
        return None, window, None
    nsa, config = module.nsa, module.model_config
    assert nsa is not None
    entries, index_keys, compressors = None, None, nsa.compressors(config)
    if compressors is not None:
        entries = cache_layer.extend(*compressed, compressors, segments.starts)
    if window is not None:
        window = cache_layer.extend_window(*window, config.nsa_window_size)
    if module.nsa_index is not None:
        index_keys = cache_layer.extend_index(key, module.nsa_index)
    return entries, window, index_keys


def sparse_attention(
    module: NsaAttentionMixin,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    entries: Sequence[Tensor] | None,
    index_keys: IndexKeys | None,
    window: tuple[Tensor, Tensor] | None,
    gates: Tensor,
    segments: Segments,
    mode: Mode,
) -> tuple[Tensor, Tensor | None]:
    """Sparse attention of one layer; the selection is recorded where the mode says so.

    Args:
        query, key, value: `[B, H, T or S, D]`.
        entries: compressed keys and values, `[B, N, Hk, D]`; None where there is no compressed branch.
        index_keys: of all S tokens; None where blocks are scored by the compressed keys.
        window: key and value of the window branch, `[B, Hk, Sw, D]`; None where it shares the selected branch's.
        gates: `[B, T, Hq, 3]`.

    Returns:
        `[B, T, Hq, Dv]`, and the selected branch's weights `[B, Hq, T, S]` where the mode asks for them.
    """
    k_win, v_win = (None, None) if window is None else (x.to(value.dtype).transpose(1, 2) for x in window)
    compressed = (None, None) if entries is None else (x.to(value.dtype) for x in entries)
    inputs = (*(x.transpose(1, 2) for x in (query, key, value)), *compressed, gates)
    # so the selection, which is always made, is no wider than the text needs
    exporting = is_exporting()
    sizes = mode.sizes if exporting else mode.sizes.within(key.shape[2])
    places: dict[str, Any] = {"starts": segments.starts, "lengths": segments.lengths, "cu_seqlens": segments.cu_seqlens}
    more: dict[str, Any] = {"k_win": k_win, "v_win": v_win}
    if module.nsa_index is not None and index_keys is not None:
        more |= module.nsa_index.arguments(query, index_keys)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = None
    if exporting and not mode.weights:
        # a node of a graph has all its arguments
        index = {name: more.get(name) for name in ("q_index", "k_index", "k_index_scales")}
        node = {"k_win": k_win, "v_win": v_win, **index, "starts": segments.starts, "lengths": segments.lengths}
        numbers = {"sizes": list(sizes.by_name().values()), "scale": scale, "backend": mode.backend}
        return exported_attention(*inputs, **node, **numbers), None
    if mode.weights:
        more |= {"placement": Placement(**places), "return_weights": True}
        out, selection, weights = reference_attention(*inputs, sizes=sizes, scale=scale, **more)
    else:
        more |= {**sizes.by_name(), **places}
        out, selection = nsa_attention(*inputs, scale=scale, return_selection=True, backend=mode.backend, **more)
    if mode.recorded is not None and mode.recorded.selections is not None:
        mode.recorded.selections[module.layer_idx] = selection
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
