"""A dense model in memory to a sparse one: `NsaLlamaForCausalLM.from_dense("path/to/llama", topk=32)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .attention import NsaAttentionMixin
from .branches import dense_twin
from .config import NsaConfigMixin
from .discovery import find_family
from .errors import NsaError
from .fields import NSA_FIELDS, full_name
from .heads import names_with_heads, renamed_decoder
from .registration import PREFIX


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
    def from_dense(cls, source: Any, *, seed: int = 0, **options: Any) -> Self:
        """A sparse model of a dense one, converted in memory: nothing is written.

        A model that is given keeps its own parameters: the new one has copies.

        Args:
            source: a dense model with this class's head, or what the head's `AutoModelFor...from_pretrained` takes (a
                folder, a Hub id). Of a language model's folder another head is drawn anew, as Transformers does.
            seed: of the new parameters' random part, which changes no output before training.
            options: `nsa_*` fields, with or without the prefix (`topk=32`), chosen as recommended (recommend.py) where
                they are not given; others go to `from_pretrained`.

        Raises:
            NsaError: the model is of another family, has another head or cannot be converted, or an option breaks a
                rule.
        """
        fields = {full: value for name, value in options.items() if (full := full_name(name)) in NSA_FIELDS}
        for name in fields:
            if name in options and name.removeprefix(PREFIX) in options:
                raise NsaError(f"{name} is given twice, with and without its prefix: give it once")
        loading = {name: value for name, value in options.items() if full_name(name) not in NSA_FIELDS}
        in_memory = isinstance(source, PreTrainedModel)
        if in_memory and loading:
            raise NsaError(f"unknown option {', '.join(sorted(loading))}: choose among {', '.join(NSA_FIELDS)}")
        if in_memory:
            dense = source
        else:
            renamed = renamed_decoder(cls, find_family(cls.config_class.dense_class.model_type))
            loading = {"dtype": "auto", **({"key_mapping": renamed} if renamed else {}), **loading}
            dense = cls.loaded_by.from_pretrained(source, **loading)
        cls.check_source(dense, stored=not in_memory)
        config: Any = cls.config_class.from_dense_config(dense.config, **fields)
        config.dtype, config.architectures = dense.dtype, [cls.__name__]
        model: Any = on_same_weights(cls, config, dense, seed=seed, copied=in_memory)
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
            NsaError: it is quantised, sparse already, of another family, or has another head.
        """
        if getattr(dense, "hf_quantizer", None) is not None:
            raise NsaError(
                "from_dense takes plain weights, and this model is quantised: convert its plain checkpoint, save that "
                "and load it with quantization_config, which leaves gates and compressors as they are"
            )
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


def on_same_weights(
    model_class: type[Any], config: PreTrainedConfig, model: PreTrainedModel, *, seed: int = 0, copied: bool = False
) -> Any:
    """A sparse model on the weights of another model, which share their memory unless they are copied.

    Args:
        model_class: of the new model.
        config: of the new model.
        model: a dense one, or a sparse one that has all parameters of the new one.
        seed: of new parameters' random part.
        copied: the new model has copies, so that either can be changed.
    """
    with torch.device("meta"):
        new_model: Any = model_class(config)
    state = {name: value.clone() if copied else value for name, value in model.state_dict().items()}
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
