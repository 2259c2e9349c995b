"""What a sparse model does beyond its dense family, whichever family that is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from nsa_hf.kernels import LearnedCompressor, ZeroLinear

from .attention import IMPLEMENTATIONS, NsaAttentionMixin
from .cache import UNUSABLE, check_reached, static_length
from .errors import NsaError
from .generation import NsaGenerationMixin
from .releases import CACHE, by_name, cache_among
from .remote_code import SavedByImport
from .segments import Segments, find_segments, static_segments
from .shape import check_shape


class NsaPreTrainedMixin(SavedByImport, NsaGenerationMixin):
    """In front of a family's classes that hold sparse layers: initialisation, the choice of attention, dense mode."""

    # With these True, Transformers or a serving engine would put its own dense attention in the place of ours.
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'; of a folder that `nsa-hf` wrote only with a config of the model in it.

        Raises:
            NsaError: layers, sizes or the like were edited in its config.json.
        """
        if isinstance(pretrained_model_name_or_path, str | os.PathLike):
            check_shape(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        implementation = requested_attention or "nsa"
        if implementation not in IMPLEMENTATIONS:
            raise NsaError(
                f"attn_implementation={implementation!r} is not one of a sparse model's: use 'nsa' (the kernels) or "
                "'eager' (the PyTorch reference); for dense attention, `with model.dense_attention():`"
            )
        return implementation

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        return self.get_correct_attn_implementation(attn_implementation)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            module.reset_parameters()
        elif isinstance(module, LearnedCompressor):
            module.reset_parameters(std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    @classmethod
    def from_dense(cls, source: Any, *, seed: int = 0, **options: Any) -> Any:
        """A sparse model of a dense one, converted in memory: nothing is written. See `from_dense.py`.

        Args:
            source: a dense model, or what `AutoModelForCausalLM.from_pretrained` takes (a folder, a Hub id).
            seed: of the new parameters' random part, which changes no output before training.
            options: `nsa_*` fields, with or without the prefix (`topk=32`); others go to `from_pretrained`.

        Raises:
            NsaError: the model is of another family or cannot be converted, or an option breaks a rule.
        """
        from .from_dense import from_dense

        return from_dense(cls, source, seed, options)

    def attention_layers(self) -> Iterator[NsaAttentionMixin]:
        """The attention modules in order, those that stay dense included."""
        return (module for module in self.modules() if isinstance(module, NsaAttentionMixin))

    @contextmanager
    def dense_attention(self) -> Iterator[None]:
        """Runs the same weights dense inside the block: for verification, as a teacher, for evaluation beside.

        The gates and compressors are not used. A cache filled here can be continued sparse, and the other way round.
        """
        before = {layer: layer.nsa_dense for layer in self.attention_layers()}
        try:
            for layer in before:
                layer.nsa_dense = True
            yield
        finally:
            for layer, dense in before.items():
                layer.nsa_dense = dense

    @contextmanager
    def record_selection(self) -> Iterator[dict[int, Tensor]]:
        """Gives a dict that each forward inside the block fills: layer to the selected blocks of that forward.

        Values are int32 `[B, T, Hk, topk]`, ascending, -1 for unused places (of a topk far beyond the text, as many
        places as it needs); blocks count from the row's (or document's) first real token. Layers that are dense are
        absent.
        """
        record: dict[int, Tensor] = {}
        before = {layer: layer.nsa_record for layer in self.attention_layers()}
        try:
            for layer in before:
                layer.nsa_record = record
            yield record
        finally:
            for layer, recorded in before.items():
                layer.nsa_record = recorded

    def set_gate_blend(self, share: float) -> None:
        """Sets the paper's share of the gates of a model with `nsa_gate="blend"`: 0 is dense, 1 the paper's model.

        Raises:
            NsaError: the model has other gates, or the share is not between 0 and 1.
        """
        if self.config.nsa_gate != "blend":
            raise NsaError(f"set_gate_blend needs nsa_gate='blend', got {self.config.nsa_gate!r}")
        self.config.nsa_gate_blend = share
        self.config.check_nsa()


class HandsDown:
    """In front of a decoder layer that keeps its further arguments from its attention: puts them on it."""

    attention_name: str

    def forward(self, *args: Any, nsa_segments: Segments, **kwargs: Any) -> Any:
        attention = getattr(self, self.attention_name)
        attention.from_layer = {"nsa_segments": nsa_segments, "output_attentions": kwargs.get("output_attentions")}
        return super().forward(*args, **kwargs)


class SegmentsFromLayer:
    """In front of an attention in such a layer."""

    from_layer: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, **self.from_layer})


class NsaModelMixin(NsaPreTrainedMixin):
    """In front of a family's decoder: works the padding and packing out once, for all layers.

    Attributes:
        forward_names: the family's names of its forward's arguments.
        is_recurrent: some layers carry a state from token to token (convolutions, linear attention, Mamba).
    """

    forward_names: tuple[str, ...]
    is_recurrent: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's, with 2D masks only; see `find_segments` for padding and packing."""
        given = by_name(self.forward_names, args, kwargs)
        input_ids, inputs_embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get(CACHE)
        tokens_given = input_ids if input_ids is not None else inputs_embeds
        if tokens_given is None:
            raise NsaError("give input_ids [batch, tokens] or inputs_embeds [batch, tokens, hidden]")
        if cache is not None and not isinstance(cache, Cache):
            raise NsaError(UNUSABLE.format(type(cache).__name__))
        batch, tokens = tokens_given.shape[:2]
        device = tokens_given.device
        static = static_length(cache)
        said: dict[str, Any] = {name: given.get(name) for name in ("attention_mask", "position_ids")}
        said |= {name: given.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        if static is not None:
            segments = static_segments(batch, tokens, *static, device, **said)
        else:
            past = cache.get_seq_length() if cache is not None else 0
            segments = replace(find_segments(batch, tokens, past, **said), past=past)
        if self.is_recurrent and (segments.cu_seqlens is not None or static is not None):
            what = "packed documents" if static is None else "a static cache"
            raise NsaError(
                f"{self.config.model_type} has layers that carry a state from token to token: {what} cannot be used; "
                "pad the rows on the left, and let generate() make its cache"
            )
        if not self.is_recurrent:
            # Families hand a mask of four dimensions through as it is, and build none: theirs would hold T*S numbers.
            # Layers with a state need the one of two; no other is made of it, see attention.py.
            given["attention_mask"] = torch.empty(0, 1, 1, 1, dtype=torch.bool, device=device)
        out = super().forward(**given, nsa_segments=segments)
        held = cache_among(out.values() if isinstance(out, dict) else out)
        if held is not None:
            check_reached(held, self.config)
        return out
