"""The sparse classes of every plain family of Transformers, made when one is asked for.

A sparse class is the family's own class with a mixin in front of it. Where a family's `__init__` names the classes of
its parts, it runs with the sparse parts under those names: each model is built once, from its family's own code.

The classes are attributes of this module by name (`NsaQwen3ForCausalLM`); `AutoConfig` finds their configs here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, wraps
from inspect import unwrap
from types import FunctionType, ModuleType
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from . import from_dense
from .attention import NsaAttentionMixin
from .config import NsaConfigMixin
from .discovery import DenseFamily, attention_arguments, families_by_class_name, find_family, names_of
from .errors import NotPlain
from .modeling import HandsDown, NsaModelMixin, NsaPreTrainedMixin, TakesFromLayer
from .registration import PREFIX
from .releases import positional_names

# Held while a family is made: threads that ask for it at once get the same classes.
MAKING = threading.RLock()


@dataclass(frozen=True)
class Family:
    """One family's sparse classes, and the dense ones that they are made of."""

    dense: DenseFamily
    config_class: type[NsaConfigMixin]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]

    @property
    def model_type(self) -> str:
        """Of the dense family."""
        return self.dense.model_type


def built_with(init: Callable[..., None], parts: dict[type, type]) -> Callable[..., None]:
    """A family's `__init__` that finds the sparse classes where it names the dense ones, or a table of them.

    Raises:
        NotPlain: it does not name one of them, so that its model would keep a dense part.
    """
    init = unwrap(init)
    named: dict[str, Any] = {}
    found: set[type] = set()
    for name in names_of(init) & init.__globals__.keys():
        value = init.__globals__[name]
        table = value if isinstance(value, dict) else {None: value}
        here = {part for part in table.values() if isinstance(part, type) and part in parts}
        if here:
            found |= here
            replaced = {key: parts.get(part, part) for key, part in table.items()}
            named[name] = replaced if isinstance(value, dict) else replaced[None]
    if found != parts.keys():
        missing = ", ".join(sorted(part.__name__ for part in parts.keys() - found))
        raise NotPlain(f"{missing} is not built in {init.__qualname__}, but in a way of its own")

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        scope = {**init.__globals__, **named}
        rebuilt = FunctionType(init.__code__, scope, init.__name__, init.__defaults__, init.__closure__)
        rebuilt.__kwdefaults__ = init.__kwdefaults__
        rebuilt(self, *args, **kwargs)

    return __init__


def define_family(model_type: str) -> Family:
    """The sparse classes of one dense family, under their names in this module, registered with the Auto classes.

    Raises:
        NotPlain: the family has a feature that sparse attention does not have.
    """
    with MAKING:
        return make_family(model_type)


@cache
def make_family(model_type: str) -> Family:
    dense = find_family(model_type)

    def define(of: type, bases: tuple[type, ...], text: str, **members: Any) -> Any:
        name = dense.sparse_name(of)
        return type(name, bases, {"__module__": __name__, "__qualname__": name, "__doc__": text, **members})

    name = dense.config.__name__
    config: Any = strict(
        define(
            dense.config,
            (NsaConfigMixin, dense.config),
            f"`{name}` with the `nsa_*` fields.",
            model_type=PREFIX + model_type,
            base_model_tp_plan=None,
            base_model_pp_plan=None,
            dense_class=dense.config,
            dense_causal_lm_name=dense.causal_lm.__name__,
            causal_lm_name=dense.sparse_name(dense.causal_lm),
        )
    )
    made: dict[type, Any] = {dense.config: config}
    for layer, attention in dense.layers.items():
        handed = dense.hands_down(layer)
        made[attention] = define(
            attention,
            (*((TakesFromLayer,) if handed else ()), NsaAttentionMixin, attention),
            f"`{attention.__name__}` with sparse attention inside.",
            handed=attention_arguments(attention),
            masks_slide=dense.masks_slide,
            forward_names=positional_names(attention.forward),
        )
        made[layer] = define(
            layer,
            (HandsDown, layer) if handed else (layer,),
            f"`{layer.__name__}` around sparse attention.",
            __init__=built_with(layer.__init__, {attention: made[attention]}),
            attention_name=handed,
        )
    named = {part.__name__: sparse for part, sparse in made.items()}
    layers = {named[name].__name__ if name in named else name for name in dense.model._no_split_modules or []}
    shared = {"config_class": config, "config": config, "_no_split_modules": sorted(layers)}
    made[dense.model] = define(
        dense.model,
        (NsaModelMixin, dense.model),
        f"`{dense.model.__name__}` with sparse attention.",
        build=built_with(dense.model.__init__, {layer: made[layer] for layer in dense.layers}),
        is_recurrent=dense.is_recurrent,
        forward_names=positional_names(dense.model.forward),
        dense_class=dense.model,
        **shared,
    )
    made[dense.causal_lm] = define(
        dense.causal_lm,
        (NsaPreTrainedMixin, dense.causal_lm, GenerationMixin),
        f"`{dense.causal_lm.__name__}` with sparse attention.",
        __init__=built_with(dense.causal_lm.__init__, {dense.model: made[dense.model]}),
        dense_class=dense.causal_lm,
        **shared,
    )
    globals().update({sparse.__name__: sparse for sparse in made.values()})
    # anew, where nsa_hf was imported anew
    AutoModel.register(config, made[dense.model], exist_ok=True)
    AutoModelForCausalLM.register(config, made[dense.causal_lm], exist_ok=True)
    # of a folder whose files do not name its tokenizer's class
    if (tokenizer := TOKENIZER_MAPPING.get(dense.config, None)) is not None:
        TOKENIZER_MAPPING.register(config, tokenizer, exist_ok=True)
    put_into_transformers(made[dense.causal_lm], config.model_type)
    # how experts and their like are stored
    for name in (model_type, dense.model.__name__, dense.causal_lm.__name__):
        stored = get_checkpoint_conversion_mapping(name)
        if stored is not None:
            sparse = config.model_type if name == model_type else f"Nsa{name}"
            register_checkpoint_conversion_mapping(sparse, stored, overwrite=True)
    return Family(dense, config, made[dense.model], made[dense.causal_lm])


def put_into_transformers(model_class: type, model_type: str) -> None:
    """Pipelines and `transformers serve` look a model's class up by name in the package `transformers`, and only there.

    Whoever imported it early has another object of it: it imports itself anew while it is imported. Its table of causal
    models says to Trainer whether label smoothing shifts the labels, and to `transformers serve` what the model does.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = model_class.__name__
    AutoModelForCausalLM._model_mapping._modules[model_type_to_module_name(model_type)] = sys.modules[__name__]
    holders = [sys.modules, *(getattr(module, "__dict__", {}) for module in list(sys.modules.values()))]
    packages = {id(held): held for held in (holder.get("transformers") for holder in holders)}
    for package in packages.values():
        if isinstance(package, ModuleType) and package.__name__ == "transformers":
            setattr(package, model_class.__name__, model_class)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a sparse model's config."""
    return define_family(config.model_type.removeprefix(PREFIX))


def __getattr__(name: str) -> Any:
    """The sparse classes by name: the family that the name belongs to is made now."""
    reasons = []
    for model_type in families_by_class_name(name):
        try:
            define_family(model_type)
        except NotPlain as reason:
            # several models in one, for one, may be called as the one of text among them
            reasons.append(reason)
        if name in globals():
            return globals()[name]
    if reasons:
        raise AttributeError(f"there is no {name}: {reasons[0]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def nsa_config_from_dense(dense_config: PreTrainedConfig, **nsa_fields: Any) -> Any:
    """The sparse config of a dense one.

    Args:
        dense_config: of a supported family.
        nsa_fields: `nsa_*` fields that differ from their defaults.

    Raises:
        NsaError: the family or a feature of it is not supported, a field is unknown, or a field breaks a rule.
    """
    model_type = dense_config.model_type
    try:
        family = define_family(model_type)
    except NotPlain as reason:
        raise NotPlain(f"the family {model_type!r} cannot be converted: {reason}") from None
    return family.config_class.from_dense_config(dense_config, **nsa_fields)


def initial_nsa_state(config: PreTrainedConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a conversion adds to the model of a sparse config: see `from_dense.initial_nsa_state`."""
    return from_dense.initial_nsa_state(family_of(config).causal_lm_class, config, seed)
