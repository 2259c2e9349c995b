"""What a sparse model does beyond its dense family, whichever family that is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.distributed import DistributedConfig

from nsa_hf.kernels import LearnedCompressor, ZeroLinear

from .attention import IMPLEMENTATIONS, NsaAttentionMixin
from .cache.adopt import UNUSABLE, check_reached, check_starts, static_length
from .cache.state import check_states, note_states
from .errors import NsaError
from .generation import NsaGenerationMixin
from .modes import Mode, OfThread, OpenContexts, Recorded, added
from .registration import PREFIX
from .releases import CACHE, by_name, cache_among, tokens_held
from .remote_code import SavedByImport
from .segments import Segments, find_segments, static_segments
from .shape import check_shape

# What quantisers leave as it is, as their pattern: the gates and compressors, and keys and values per branch.
NOT_QUANTISED = r".*\.nsa"
# Families whose layers begin their state anew with several tokens at once: Transformers hands their scan none.
ONE_TOKEN = {f"{PREFIX}jamba"}
# What a forward is given as tensors; the mask is looked at in segments.py.
TENSORS = ("input_ids", "inputs_embeds", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")


class NsaPreTrainedMixin(SavedByImport, NsaGenerationMixin):
    """In front of a family's classes that hold sparse layers: initialisation, the choice of attention, dense mode.

    Attributes:
        dense_class: the family's class.
    """

    dense_class: type[PreTrainedModel]

    # With these True, Transformers or a serving engine would put its own dense attention in the place of ours.
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    # Its context parallelism knows full attention only, and gives it no mask.
    _supports_context_parallel = False
    # The family's plans would divide the attention's heads, and not the gates' (see `prepare_distribute_model`).
    _tp_plan = None
    _pp_plan = None

    # Transformers tells by the source of a class's module, which is not ours, or by whose module it is.

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.dense_class._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: Transformers leaves out some of a family's own initialisation in custom code."""
        return False

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', which asks for it at loading.

        Raises:
            NsaError: the model is to be divided within its layers or between them.
        """
        given = distributed_config
        asked = DistributedConfig.from_dict(given) if isinstance(given, dict) else given
        for size in ("tp_size", "pp_size"):
            if (getattr(asked, size, None) or 1) > 1:
                raise NsaError(
                    f"sparse models cannot be loaded with tensor or pipeline parallelism yet, got {size}="
                    f"{getattr(asked, size)} (tp_plan, tp_size or distributed_config): use FSDP, as "
                    "distributed_config={'fsdp_size': N} or Accelerate's, or device_map='auto', which puts whole "
                    "layers onto each GPU"
                )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

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

    def post_init(self) -> None:
        super().post_init()
        # all of Transformers' quantisers skip what a model names here, whatever else they are told to skip
        self._keep_in_fp32_modules.add(NOT_QUANTISED)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Which parameters have another dtype than the model: none of ours."""
        plan = super()._get_dtype_plan(dtype)
        plan.pop(NOT_QUANTISED, None)
        return plan

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
        from .from_dense import from_dense  # here: it makes families, which are made of this module

        return from_dense(cls, source, seed, options)

    def attention_layers(self) -> Iterator[NsaAttentionMixin]:
        """The attention modules in order, those that stay dense included."""
        return (module for module in self.modules() if isinstance(module, NsaAttentionMixin))

    def open_contexts(self) -> Iterator[OpenContexts]:
        return (module.nsa_contexts for module in self.modules() if isinstance(module, NsaModelMixin))

    @contextmanager
    def dense_attention(self) -> Iterator[None]:
        """Runs the same weights dense inside the block: for verification, as a teacher, for evaluation beside.

        What this thread runs inside it is dense, and stays so when a backward pass computes it again behind it. The
        gates and compressors are not used. A cache filled here can be continued sparse, and the other way round.
        """
        with added(None, [contexts.dense for contexts in self.open_contexts()]):
            yield

    @contextmanager
    def record_selection(self) -> Iterator[dict[int, Tensor]]:
        """Gives a dict that each forward of this thread inside the block fills: layer to its selected blocks.

        Values are int32 `[B, T, Hk, topk]`, ascending, -1 for unused places (of a topk far beyond the text, as many
        places as it needs); blocks count from the row's (or document's) first real token. Layers that are dense are
        absent.
        """
        record: dict[int, Tensor] = {}
        with added(record, [contexts.records for contexts in self.open_contexts()]):
            yield record

    def set_gate_blend(self, share: float) -> None:
        """Sets the paper's share of the gates of a model with `nsa_gate="blend"`: 0 is dense, 1 the paper's model.

        Raises:
            NsaError: the model has other gates, or the share is not between 0 and 1.
        """
        if self.config.nsa_gate != "blend":
            raise NsaError(f"set_gate_blend needs nsa_gate='blend', got {self.config.nsa_gate!r}")
        self.config.nsa_gate_blend = share
        self.config.check_nsa()


def checkpoints_activations(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class HandsDown:
    """In front of a decoder layer that keeps its further arguments from its attention: leaves them with it."""

    attention_name: str

    def forward(self, *args: Any, nsa_segments: Segments, nsa_mode: Mode, **kwargs: Any) -> Any:
        from_layer = getattr(self, self.attention_name).from_layer
        from_layer.arguments = {"nsa_segments": nsa_segments, "nsa_mode": nsa_mode}
        try:
            return super().forward(*args, **kwargs)
        finally:
            from_layer.arguments = {}


class FromLayer(OfThread):
    """What a layer leaves with its attention, which it calls in the same thread."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}


class TakesFromLayer:
    """In front of an attention in such a layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.from_layer = FromLayer()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs, **self.from_layer.arguments)


class NsaModelMixin(NsaPreTrainedMixin):
    """In front of a family's decoder: works the padding and packing out once, for all layers.

    Attributes:
        forward_names: the family's names of its forward's arguments.
        is_recurrent: some layers carry a state from token to token (convolutions, linear attention, Mamba).
        build: the family's `__init__`, with sparse layers.
        nsa_contexts: whether it runs dense, and where selections are recorded, in each thread.
    """

    forward_names: tuple[str, ...]
    is_recurrent: bool
    build: Callable[..., None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.build(*args, **kwargs)
        self.nsa_contexts = OpenContexts()

    def _replicate_for_data_parallel(self) -> Any:
        # `nn.DataParallel` runs every replica in a thread of its own
        replica = super()._replicate_for_data_parallel()
        replica.nsa_contexts = self.nsa_contexts.of_this_thread()
        return replica

    def mode(self, weights: bool | None) -> Mode:
        """What a forward of this thread is run with from here on.

        Args:
            weights: whether attention weights are asked for; None leaves it to the config.

        Raises:
            NsaError: the config names an attention that is not ours.
        """
        config, contexts = self.config, self.nsa_contexts
        if config._attn_implementation not in IMPLEMENTATIONS:
            raise NsaError(
                f"attn_implementation={config._attn_implementation!r} is not one of a sparse model's: use "
                f"{' or '.join(map(repr, IMPLEMENTATIONS))}, or run it dense inside `with model.dense_attention():`"
            )
        return Mode(
            sizes=config.nsa_sizes,
            backend=IMPLEMENTATIONS[config._attn_implementation],
            gate_blend=config.nsa_gate_blend,
            weights=bool(config.output_attentions if weights is None else weights),
            dense=len(contexts.dense) > 0,
            recorded=Recorded() if contexts.records else None,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's, with 2D masks only; see `find_segments` for padding and packing."""
        given = by_name(self.forward_names, args, kwargs)
        for name in TENSORS:
            if (value := given.get(name)) is not None and not isinstance(value, Tensor):
                raise NsaError(f"{name} must be a tensor, got {type(value).__name__}: give torch.tensor(...) of it")
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
            past = tokens_held(cache) if cache is not None else 0
            segments = find_segments(batch, tokens, past, **said)
        if cache is not None:
            check_starts(cache, segments, tokens)
        if self.is_recurrent and (segments.cu_seqlens is not None or static is not None):
            what = "packed documents" if static is None else "a static cache"
            raise NsaError(
                f"{self.config.model_type} has layers that carry a state from token to token: {what} cannot be used; "
                "pad the rows on the left, and let generate() make its cache"
            )
        if self.is_recurrent and cache is not None:
            check_states(cache, segments.past)
            if segments.past and tokens > 1 and self.config.model_type in ONE_TOKEN:
                raise NsaError(
                    f"{self.config.model_type} takes one token at a time over a filled cache (Transformers begins its "
                    f"state anew with several), got {tokens}: give them one by one, or all of the text with an empty "
                    "cache and without prefill_chunk_size"
                )
        if said["position_ids"] is None:
            given["position_ids"] = segments.position_ids(tokens)
        if not self.is_recurrent:
            # Families hand a mask of four dimensions through as it is, and build none: theirs would hold T*S numbers.
            # Layers with a state need the one of two; no other is made of it, see attention.py.
            given["attention_mask"] = torch.empty(0, 1, 1, 1, dtype=torch.bool, device=device)
        if cache is None and self.training and torch.is_grad_enabled() and checkpoints_activations(self):
            # Transformers' layers drop caches then, and some families make one all the same
            given["use_cache"] = False
        mode = self.mode(given.get("output_attentions"))
        out = super().forward(**given, nsa_segments=segments, nsa_mode=mode)
        if mode.recorded is not None:
            for record in self.nsa_contexts.records:
                record.update(mode.recorded.selections)
            # what a recomputation selects is of a forward that is over
            mode.recorded.selections = {}
        held = cache_among(out.values() if isinstance(out, dict) else out)
        if held is not None:
            check_reached(held, self.config)
            if self.is_recurrent:
                note_states(held, segments.past + tokens)
        return out
