"""A dense model to a sparse one in memory, nothing written: `nsa_hf.from_dense`, and `from_dense` of each class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .adapted import plain_weights, without_peft
from .attention import NsaAttentionMixin
from .branches import dense_twin
from .config import NsaConfigMixin
from .discovery import find_family
from .errors import NsaError
from .fields import NSA_FIELDS, full_name, named_fields, unknown_option
from .heads import names_with_heads, renamed_decoder

# What `from_pretrained` is given beside the fields, where the dense model is not in memory.
LOADING = (
    "dtype",
    "torch_dtype",
    "config",
    "device_map",
    "max_memory",
    "revision",
    "subfolder",
    "variant",
    "gguf_file",
    "key_mapping",
    "use_safetensors",
    "weights_only",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "code_revision",
    "quantization_config",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
)
# Those of them that say where it is.
WHERE = (
    "gguf_file",
    "revision",
    "subfolder",
    "trust_remote_code",
    "code_revision",
    "token",
    "cache_dir",
    "local_files_only",
    "proxies",
)


class FromDenseMixin:
    """In front of a sparse model's class: its conversion in memory.

    Attributes:
        config_class: the sparse config's class.
        dense_class: the family's class.
        loaded_by: the Auto class of such models, sparse and dense.
    """

    config_class: type[NsaConfigMixin]
    dense_class: type[PreTrainedModel]
    loaded_by: ClassVar[Any] = AutoModelForCausalLM

    @classmethod
    def from_dense(cls, source: PreTrainedModel | str | os.PathLike[str], *, seed: int = 0, **options: Any) -> Self:
        """As `nsa_hf.from_dense`, of a model of this class's family and with its head.

            >>> nsa_hf.NsaLlamaForCausalLM.from_dense("path/to/llama", topk=32).config.nsa_topk
            32

        Of a language model's folder another head is drawn anew, as Transformers does.

        Raises:
            NsaError: as there; or the model is of another family, or has another head.
        """
        opened = open_dense(cls, source, options)
        dense = opened.model
        cls.check_source(dense, opened.stored)
        config: Any = cls.config_class.from_dense_config(dense.config, **opened.fields)
        config.dtype, config.architectures = dense.dtype, [cls.__name__]
        if opened.attention is not None:
            config._attn_implementation = opened.attention
        model: Any = on_same_weights(cls, config, dense, seed=seed, weights=opened.weights)
        if dense.can_generate():
            model.generation_config = dense.generation_config
        return model

    @classmethod
    def check_source(cls, dense: PreTrainedModel, stored: bool) -> None:
        """Whether a model can be converted to this class.

        Args:
            dense: the model.
            stored: it was loaded, and its config names the class that was saved.

        Raises:
            NsaError: it is sparse already, of another family, or has another head.
        """
        family = find_family(dense.config.model_type)
        names = names_with_heads(family)
        causal_lm = family.causal_lm.__name__
        given = next((base.__name__ for base in type(dense).__mro__ if base.__name__ in names), type(dense).__name__)
        if stored and (saved := [name for name in dense.config.architectures or [] if name in names]):
            # a language model's folder may be given another head
            given = given if saved[0] == causal_lm else saved[0]
        if given not in names:
            raise NsaError(f"{cls.__name__}.from_dense was given a {given}: expected a {cls.dense_class.__name__}")
        if names[given] != cls.__name__:
            raise NsaError(
                f"{cls.__name__}.from_dense was given a {family.model_type} model, {given}: use "
                f"{names[given]}.from_dense"
            )


@dataclass(frozen=True)
class DenseModel:
    """A dense model in memory that is to be converted.

    Attributes:
        model: itself, without what PEFT has put around it.
        weights: its state dict; copies where somebody else has the model.
        fields: `nsa_*` fields that were asked for.
        attention: the sparse model's `attn_implementation`; None: its default.
        stored: it was loaded, and its config names the class that was saved.
    """

    model: PreTrainedModel
    weights: Mapping[str, Tensor]
    fields: Mapping[str, Any]
    attention: str | None
    stored: bool


def open_dense(
    sparse_class: type[FromDenseMixin], source: PreTrainedModel | str | os.PathLike[str], options: Mapping[str, Any]
) -> DenseModel:
    """A dense model, loaded where it is not in memory, with what is asked of its conversion.

    Args:
        sparse_class: what it is to become.
        source: a dense model, also inside a `PeftModel`; a folder; a Hub id.
        options: `nsa_*` fields with or without the prefix, `attn_implementation`; and where `source` is no model
            those of LOADING and fields of its config.

    Raises:
        NsaError: an option is unknown or given twice, or the model is not of plain weights in one place.
    """
    options = dict(options)
    attention = options.pop("attn_implementation", None)
    fields = named_fields({name: value for name, value in options.items() if full_name(name) in NSA_FIELDS})
    loading = {name: value for name, value in options.items() if full_name(name) not in NSA_FIELDS}
    is_path = isinstance(source, str | os.PathLike)
    family = find_family(sparse_class.config_class.dense_class.model_type)
    own = {*family.config().to_dict(), "num_labels", "label2id", "id2label"} if is_path else set()
    for name in loading.keys() - own:
        if name not in LOADING:
            raise unknown_option(name, ("attn_implementation", "seed", *(LOADING if is_path else ())))
        if not is_path:
            raise NsaError(f"{name} is for loading, and the model is loaded already: load it so, and leave {name} out")
    if isinstance(source, str | os.PathLike):
        renamed = renamed_decoder(sparse_class, family)
        defaults: dict[str, Any] = {} if "torch_dtype" in loading else {"dtype": "auto"}
        if renamed:
            loading["key_mapping"] = {**renamed, **(loading.get("key_mapping") or {})}
        model = sparse_class.loaded_by.from_pretrained(source, **{**defaults, **loading})
    else:
        model = dense_model(source)
    if getattr(model, "hf_quantizer", None) is not None:
        raise NsaError(
            "from_dense takes plain weights, and this model is quantised: convert its plain checkpoint, save that "
            "and load it with quantization_config, which leaves gates and compressors as they are"
        )
    weights = plain_weights(model)
    devices = sorted({str(value.device) for value in weights.values()})
    if len(devices) > 1 or devices == ["meta"]:
        raise NsaError(
            f"from_dense takes weights on one device, and this model's are on {', '.join(devices)}: convert its folder "
            "with nsa_hf.convert(source, out), and load that with device_map"
        )
    if not is_path:
        weights = {name: value.clone() for name, value in weights.items()}
    return DenseModel(model, weights, fields, attention, is_path)


def dense_model(source: Any) -> PreTrainedModel:
    """A model of Transformers that is in memory, without a `PeftModel` around it; NsaError where it is none."""
    model = without_peft(source)
    if not isinstance(model, PreTrainedModel):
        raise NsaError(
            "from_dense takes a model of Transformers, a folder or a Hub id, got a "
            f"{type(source).__name__}: give the model itself, without what is wrapped around it"
        )
    return model


def on_same_weights(
    model_class: type[Any],
    config: PreTrainedConfig,
    model: PreTrainedModel,
    *,
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """A sparse model on the weights of another model.

    Args:
        model_class: of the new model.
        config: of the new model.
        model: a dense one, or a sparse one that has all parameters of the new one.
        seed: of new parameters' random part.
        weights: what the new model is given for the other's state dict; None: that itself, in the same memory.
    """
    with torch.device("meta"):
        new_model: Any = model_class(config)
    state = dict(model.state_dict() if weights is None else weights)
    for name in new_model.state_dict().keys() - state.keys():
        if (twin := dense_twin(name)) is not None:
            state[name] = state[twin].clone()
    for name, value in initial_nsa_state(model_class, config, seed):
        if name not in state:
            state[name] = value.to(model.device, model.dtype)
    new_model.load_state_dict(state, assign=True)
    new_model.tie_weights()
    take_buffers(new_model, model)
    return new_model.train(model.training)


def initial_nsa_state(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 values of the parameters that a conversion adds, layer by layer; the same for the same seed.

    Without those that start as copies of dense ones (`dense_twin`, with independent keys and values).

    Args:
        model_class: the family's sparse causal language model.
        config: of such a model.
        seed: of the first layer; every further one has the next.
    """
    with torch.device("meta"):
        skeleton = model_class(config)
    layers = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, NsaAttentionMixin)]
    for index, (name, module) in enumerate(layers):
        if module.nsa is not None:
            new = module.nsa.float().to_empty(device="cpu")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + index)
                new.apply(skeleton._init_weights)
            named = ((f"{name}.nsa.{key}", value.detach()) for key, value in new.state_dict().items())
            yield from ((key, value) for key, value in named if dense_twin(key) is None)


def take_buffers(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Copies into a model on the meta device the buffers that no state dict holds, RoPE's frequencies for one."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, key = name.rpartition(".")
            value: Tensor = dense.get_buffer(name).clone()
            model.get_submodule(owner).register_buffer(key, value, persistent=key in dense.state_dict())
