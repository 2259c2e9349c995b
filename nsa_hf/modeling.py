"""What every sparse model does beyond its dense family: the mixins in front of the family's model classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.distributed import DistributedConfig

from nsa_hf.kernels import LearnedCompressor, ZeroLinear, choosing_once

from .attention import IMPLEMENTATIONS, NsaAttentionMixin
from .cache.adopt import UNUSABLE, check_reached_layers, check_starts, static_length
from .cache.state import check_states, note_states
from .discovery import calls_attention, find_family
from .errors import NotPlain, NsaError
from .generation import NsaGenerationMixin
from .heads import renamed_decoder
from .in_memory import FromDenseMixin
from .modes import Attended, Mode, OpenContexts, Recorded, Recorder, appended
from .registration import PREFIX
from .releases import CACHE, by_name, cache_among, tokens_held
from .remote_code import SavedByImport
from .segments import Segments, find_segments, static_segments
from .shape import check_shape

# What quantisers leave as it is, as their pattern: the gates and compressors, and keys and values per branch.
NOT_QUANTISED = r".*\.nsa"
# Families whose layers begin their state anew with several tokens at once: Transformers hands their scan none.
ONE_TOKEN = {f"{PREFIX}jamba"}
# To vLLM and SGLang, which ask a class before they build it, and then set an `attn_implementation` of these names.
SERVED = (
    "vLLM and SGLang cannot serve sparse models: they would put dense attention of their own in the place of ours. Use "
    "`nsa-hf serve`, or generate() in Python; docs/serving.md of nsa-hf says what is missing"
)
ENGINES = ("vllm", "sglang")
# What a forward is given as tensors; the mask is looked at in segments.py.
TENSORS = ("input_ids", "inputs_embeds", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")


class NsaPreTrainedMixin(FromDenseMixin, SavedByImport, NsaGenerationMixin):
    """In front of a family's classes that hold sparse layers: initialisation, the choice of attention, dense mode.

    Attributes:
        dense_class: the family's class.
        sparse_classes: of the family's decoder, layers and attentions, dense class to sparse class.
    """

    dense_class: type[PreTrainedModel]
    sparse_classes: dict[type[nn.Module], type[nn.Module]]

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

    # Transformers finds the next three out by a class's module: by its source, or whether it is one of its own.

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.dense_class._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Never. vLLM and SGLang ask, and nobody else: with False, vLLM would go on and fail later, out of sight.

        Raises:
            NsaError: always; says how to serve a sparse model.
        """
        raise NsaError(f"{cls.__name__}: {SERVED}")

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, because Transformers leaves some of a family's initialisation out where the code is not its own."""
        return False

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', which asks for it at loading.

        Raises:
            NsaError: the model is to be divided within its layers or between them; in one process too, where a plan
                would divide nothing.
        """
        config = distributed_config
        if isinstance(config, dict):
            config = DistributedConfig.from_dict(config)
        for name in ("tp_plan", "tp_size", "pp_size"):
            asked = getattr(config, name, None) or 1
            if asked != 1:
                raise NsaError(
                    f"sparse models cannot be loaded with tensor or pipeline parallelism yet, got {name}={asked!r} "
                    "(tp_plan, tp_size or distributed_config): use FSDP, as distributed_config={'fsdp_size': N} or "
                    "Accelerate's, or device_map='auto', which puts whole layers onto each GPU"
                )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'; of a folder that `nsa-hf` wrote only with a config of the model in it.

        The decoder is found where the model with another head that was saved calls it otherwise (see heads.py).

        Raises:
            NsaError: layers, sizes or the like were edited in its config.json.
        """
        if isinstance(pretrained_model_name_or_path, str | os.PathLike):
            check_shape(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        renamed = renamed_decoder(cls, find_family(cls.config_class.dense_class.model_type))
        if renamed:
            kwargs["key_mapping"] = {**renamed, **(kwargs.get("key_mapping") or {})}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if used := getattr(model, "_weight_conversions", None):
            # Transformers would save the names as they were read
            model._weight_conversions = [one for one in used if not renamed.keys() & set(one.source_patterns)]
        return loaded

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The implementation that was asked for; `nsa` where none was.

        Raises:
            NsaError: it is not one of `IMPLEMENTATIONS`.
        """
        implementation = requested_attention or "nsa"
        if implementation.startswith(ENGINES):
            raise NsaError(SERVED)
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
        """As Transformers', with which a family ends its `__init__`; the parts, built dense, become sparse before."""
        make_parts_sparse(self, self.sparse_classes)
        super().post_init()
        # all of Transformers' quantisers skip what a model names here, whatever else they are told to skip
        self._keep_in_fp32_modules.add(NOT_QUANTISED)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        """As Transformers'; a layer that is computed again keeps the blocks that it has chosen."""
        if enable:
            gradient_checkpointing_func = choosing_once(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Which parameters have another dtype than the model: none of ours."""
        plan = super()._get_dtype_plan(dtype)
        plan.pop(NOT_QUANTISED, None)
        return plan

    def attention_layers(self) -> Iterator[NsaAttentionMixin]:
        """The attention modules in order, those that stay dense included."""
        return (module for module in self.modules() if isinstance(module, NsaAttentionMixin))

    def open_contexts(self) -> Iterator[OpenContexts]:
        """Those of every decoder in this model."""
        return (module.nsa_contexts for module in self.modules() if isinstance(module, NsaModelMixin))

    @contextmanager
    def dense_attention(self, layers: Iterable[int] | None = None) -> Iterator[None]:
        """Runs the same weights dense inside the block: for verification, as a teacher, for evaluation beside.

            >>> model = nsa_hf.from_dense("path/to/llama")
            >>> ids = torch.arange(200)[None]
            >>> with torch.no_grad(), model.dense_attention():
            ...     dense = model(ids).logits
            >>> bool((dense - model(ids).logits).abs().max() < 1e-3)  # within config.nsa_exact_tokens
            True

        What this thread runs inside it is dense, and stays so when a backward pass computes it again behind it. The
        gates and compressors are not used. A cache filled here can be continued sparse, and the other way round.

        Args:
            layers: these layers only, negative ones counted from the end; None: all.

        Raises:
            NsaError: there is no such layer.
        """
        contexts = list(self.open_contexts())
        if layers is None:
            with appended(None, [context.dense for context in contexts]):
                yield
        else:
            chosen = frozenset(self.config.checked_layers(list(layers), "layers"))
            with appended(chosen, [context.dense_layers for context in contexts]):
                yield

    @contextmanager
    def record_selection(self) -> Iterator[dict[int, Tensor]]:
        """Gives a dict that each forward of this thread inside the block fills: layer to its selected blocks.

            >>> model = nsa_hf.from_dense("path/to/llama", topk=4)
            >>> with model.record_selection() as blocks:
            ...     logits = model(torch.arange(256)[None]).logits
            >>> blocks[0][0, -1, 0].tolist()[:1]  # the last query of layer 0 selects, first of all, the first block
            [0]

        Values are int32 `[B, T, Hk, topk]`, ascending, -1 for unused places (of a topk far beyond the text, as many
        places as it needs); blocks count from the row's (or document's) first real token. Layers that are dense are
        absent.
        """
        record: dict[int, Tensor] = {}
        with appended(record, [contexts.records for contexts in self.open_contexts()]):
            yield record

    @contextmanager
    def record_attention(self, keep: Callable[[Attended], Any] | None = None) -> Iterator[dict[int, Any]]:
        """Gives a dict that each forward of this thread inside the block fills: sparse layer to what it attended with.

            >>> model = nsa_hf.from_dense("path/to/llama")
            >>> with model.record_attention() as attended:
            ...     logits = model(torch.arange(200)[None]).logits
            >>> sorted(attended) == list(range(model.config.num_hidden_layers))
            True

        For losses and measurements of what selects blocks. Values are `Attended`, without gradients: the queries and
        keys of all layers, which for a long text are large. With `keep` they are what it makes of them, and nothing
        else is held:

            >>> with model.record_attention(lambda attended: attended.query.norm(dim=-1).mean().item()) as sizes:
            ...     logits = model(torch.arange(200)[None]).logits
            >>> type(sizes[0])
            <class 'float'>

        Layers that run dense are absent.

        Args:
            keep: what is kept of each layer; it is called within the forward. None keeps all.

        Raises:
            NsaError: `keep` is not a function.
        """
        if keep is not None and not callable(keep):
            raise NsaError(f"record_attention takes a function of what a layer attended with, got {keep!r}")
        recorder = Recorder(keep or (lambda attended: attended), {})
        with appended(recorder, [contexts.recorders for contexts in self.open_contexts()]):
            yield recorder.kept

    def set_gate_blend(self, share: float) -> None:
        """Sets the paper's share of the gates of a model with `nsa_gate="blend"`: 0 is dense, 1 the paper's model.

            >>> model = nsa_hf.from_dense("path/to/llama", gate="blend")
            >>> model.set_gate_blend(0.5)
            >>> model.config.nsa_gate_blend
            0.5

        Raises:
            NsaError: the model has other gates, or the share is not between 0 and 1.
        """
        if self.config.nsa_gate != "blend":
            raise NsaError(f"set_gate_blend needs nsa_gate='blend', got {self.config.nsa_gate!r}")
        self.config.nsa_gate_blend = share
        self.config.check_nsa()


def checkpoints_activations(model: Any) -> bool:
    """Whether gradient checkpointing is on in some part of a model."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def make_parts_sparse(model: NsaPreTrainedMixin, sparse_classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Gives the parts of a model, which its family has built dense, their sparse classes, and adds the new modules.

    The way of PyTorch's `fully_shard`: only `module.__class__` changes, so that names, weights and hooks stay.

    Raises:
        NotPlain: a part has a feature that sparse attention does not have, or an attention would stay dense.
    """
    for module in list(model.modules()):
        sparse_class = sparse_classes.get(type(module))
        if sparse_class is not None:
            module.__class__ = sparse_class
            if isinstance(module, NsaAttentionMixin):
                module.become_sparse(model.config)
            elif isinstance(module, NsaModelMixin):
                # noted of the dense class; the second `post_init` notes it again, and initialises the new modules only
                del module._no_split_modules
                module.post_init()
        elif module is not model and calls_attention(type(module)) and not isinstance(module, NsaAttentionMixin):
            raise NotPlain(f"{type(module).__name__} is not among the attentions of the family's layers")


class NsaModelMixin(NsaPreTrainedMixin):
    """In front of a family's decoder: finds out once what is padded or packed, for all layers.

    Attributes:
        forward_names: the family's names of its forward's arguments.
        is_recurrent: some layers carry a state from token to token (convolutions, linear attention, Mamba).
        nsa_contexts: the `with` blocks that each thread is inside of.
    """

    forward_names: tuple[str, ...]
    is_recurrent: bool

    def post_init(self) -> None:
        """As Transformers'; with the parts, the decoder too gets what its sparse class has beyond the family's."""
        self.nsa_contexts = OpenContexts()
        super().post_init()

    def _replicate_for_data_parallel(self) -> Any:
        # `nn.DataParallel` runs every replica in a thread of its own
        replica = super()._replicate_for_data_parallel()
        replica.nsa_contexts = self.nsa_contexts.of_this_thread()
        return replica

    def mode(self, weights: bool | None) -> Mode:
        """The mode of a forward that this thread begins now.

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
            dense_layers=tuple(contexts.dense_layers),
            recorded=(
                Recorded(bool(contexts.records), contexts.recorders) if contexts.records or contexts.recorders else None
            ),
        )

    def segments_of(self, arguments: dict[str, Any], inputs: Tensor) -> Segments:
        """Which positions of a forward belong to which row or document, checked against its cache.

        Args:
            arguments: the forward's by name; `cu_seq_lens` are taken out, as no family knows them.
            inputs: `[B, T, ...]`, its tokens or their embeddings.

        Raises:
            NsaError: the mask, the packing or the cache cannot be used, with this model or with each other.
        """
        batch, tokens = inputs.shape[:2]
        cache = arguments.get(CACHE)
        static = static_length(cache)
        layout: dict[str, Any] = {name: arguments.get(name) for name in ("attention_mask", "position_ids")}
        layout |= {name: arguments.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        if static is not None:
            segments = static_segments(batch, tokens, *static, inputs.device, **layout)
        else:
            past = tokens_held(cache) if cache is not None else 0
            segments = find_segments(batch, tokens, past, **layout)
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
        return segments

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's, with 2D masks only; see `find_segments` for padding and packing."""
        arguments = by_name(self.forward_names, args, kwargs)
        for name in TENSORS:
            if (value := arguments.get(name)) is not None and not isinstance(value, Tensor):
                raise NsaError(f"{name} must be a tensor, got {type(value).__name__}: give torch.tensor(...) of it")
        input_ids, inputs_embeds, cache = (arguments.get(name) for name in ("input_ids", "inputs_embeds", CACHE))
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise NsaError("give input_ids [batch, tokens] or inputs_embeds [batch, tokens, hidden]")
        if inputs.dim() != (2 if inputs is input_ids else 3) or 0 in inputs.shape:
            raise NsaError(
                "give input_ids [batch, tokens] or inputs_embeds [batch, tokens, hidden] with at least one row of at "
                f"least one token, got {list(inputs.shape)}"
            )
        if cache is not None and not isinstance(cache, Cache):
            raise NsaError(UNUSABLE.format(type(cache).__name__))
        segments = self.segments_of(arguments, inputs)
        if arguments.get("position_ids") is None:
            arguments["position_ids"] = segments.position_ids(inputs.shape[1])
        if not self.is_recurrent:
            # A mask of four dimensions keeps a family from building its own, of T*S numbers. Layers with a state need
            # the one of two dimensions; no other is made of it, see attention.py.
            arguments["attention_mask"] = torch.empty(0, 1, 1, 1, dtype=torch.bool, device=inputs.device)
        if cache is None and self.training and torch.is_grad_enabled() and checkpoints_activations(self):
            # Transformers' layers drop caches then, and some families make one all the same
            arguments["use_cache"] = False
        mode = self.mode(arguments.get("output_attentions"))
        out = super().forward(**arguments, nsa_segments=segments, nsa_mode=mode)
        if mode.recorded is not None:
            for record in self.nsa_contexts.records:
                record.update(mode.recorded.selections or {})
            mode.recorded.end()
        cache = cache_among(out.values() if isinstance(out, dict) else out)
        if cache is not None:
            check_reached_layers(cache, self.config)
            if self.is_recurrent:
                note_states(cache, segments.past + inputs.shape[1])
        return out
