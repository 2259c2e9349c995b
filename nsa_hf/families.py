"""The sparse classes of Transformers' families: made here, from the family's own, the first time one is asked for.

A sparse class is the family's class with a mixin in front of it. A sparse model builds itself with its family's code,
dense; then its parts (decoder, layers, attentions) are given their sparse classes and the modules that these add.

The classes are attributes of this module by name (`NsaQwen3ForCausalLM`); `AutoConfig` finds their configs here.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from . import adapters, class_docs, in_memory
from .attention import NsaAttentionMixin
from .config import NsaConfigMixin
from .discovery import DenseFamily, attention_arguments, families_by_class_name, find_family
from .errors import NotPlain, NsaError
from .heads import HEADS, auto_class, dense_heads, names_with_heads
from .modeling import NsaModelMixin, NsaPreTrainedMixin
from .passing import PassesArguments, ReceivesArguments
from .projections import default_targets
from .recommend import Choice
from .registration import PREFIX
from .releases import note_what_is_recorded, positional_names

if TYPE_CHECKING:  # what every family's classes are, to type checkers and editors

    class SparseConfig(NsaConfigMixin, PreTrainedConfig):
        """A config with the `nsa_*` fields."""

    class SparseCausalLM(NsaPreTrainedMixin, PreTrainedModel, GenerationMixin):
        """A sparse causal language model."""

        config: SparseConfig


FAMILIES = "nsa-hf's docs/families.md says which can be, and why others cannot"

# Locked while a family is made: threads that ask for it at once get the same classes.
MAKING = threading.RLock()


@dataclass(frozen=True)
class Family:
    """One family's sparse classes, and the dense ones that they are made of.

    Attributes:
        dense: the dense ones.
        config_class: of the sparse model's config.
        model_class: the decoder.
        causal_lm_class: the causal language model.
        head_classes: the decoder with other heads, by the name of the Auto class that loads it (heads.py).
    """

    dense: DenseFamily
    config_class: type[NsaConfigMixin]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    head_classes: Mapping[str, type[PreTrainedModel]]

    @property
    def model_type(self) -> str:
        """Of the dense family."""
        return self.dense.model_type

    def class_of(self, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """That of a sparse model by its config: the class that this names, else the causal language model's."""
        named = (head for head in self.head_classes.values() if head.__name__ in (config.architectures or []))
        return next(named, self.causal_lm_class)


def define_family(model_type: str) -> Family:
    """The sparse classes of one dense family: attributes of this module, registered with the Auto classes.

    Args:
        model_type: of the dense family.

    Raises:
        NotPlain: the family has a feature that sparse attention does not have.
    """
    with MAKING:
        return make_family(model_type)


@cache
def make_family(model_type: str) -> Family:
    """As `define_family`, in one thread at a time."""
    dense = find_family(model_type)
    config_class = make_config_class(dense)
    parts = make_parts(dense)
    shared = {
        "config_class": config_class,
        "config": config_class,
        "_no_split_modules": names_not_split(dense),
        "sparse_classes": parts,
    }
    model_class = parts[dense.model] = make_class(
        dense,
        dense.model,
        (NsaModelMixin, dense.model),
        class_docs.MODEL.format(dense=dense.model.__name__, causal_lm=dense.sparse_name(dense.causal_lm)),
        is_recurrent=dense.is_recurrent,
        forward_names=positional_names(dense.model.forward),
        forward=forward_like(dense.model.forward),
        dense_class=dense.model,
        **shared,
    )
    causal_lm_class = make_class(
        dense,
        dense.causal_lm,
        (NsaPreTrainedMixin, dense.causal_lm, GenerationMixin),
        class_docs.CAUSAL_LM.format(
            dense=dense.causal_lm.__name__, folder=dense.model_type, config=config_class.__name__
        ),
        dense_class=dense.causal_lm,
        loaded_by=AutoModelForCausalLM,
        **shared,
    )
    head_classes = {
        auto: make_class(
            dense,
            head,
            (NsaPreTrainedMixin, head),
            f"`{head.__name__}` with sparse attention.",
            dense_class=head,
            loaded_by=HEADS[auto],
            **shared,
        )
        for auto, head in dense_heads(dense).items()
    }
    classes = (config_class, *parts.values(), causal_lm_class, *head_classes.values())
    globals().update({sparse_class.__name__: sparse_class for sparse_class in classes})
    family = Family(dense, config_class, model_class, causal_lm_class, head_classes)
    register_family(family)
    return family


def forward_like(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The sparse decoder's forward with the signature of the family's, which tells others what arguments there are."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return NsaModelMixin.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(dense_forward)  # type: ignore[attr-defined]
    forward.__doc__ = NsaModelMixin.forward.__doc__
    return forward


def make_class(dense: DenseFamily, dense_class: type, bases: tuple[type, ...], text: str, /, **members: Any) -> Any:
    """A sparse class with this docstring and these attributes, under the name that belongs to `dense_class`."""
    name = dense.sparse_name(dense_class)
    return type(name, bases, {"__module__": __name__, "__qualname__": name, "__doc__": text, **members})


def make_config_class(dense: DenseFamily) -> type[Any]:
    """The config's class: the family's with the `nsa_*` fields, and without its plans for dividing a model."""
    config_class: type[Any] = strict(
        make_class(
            dense,
            dense.config,
            (NsaConfigMixin, dense.config),
            class_docs.CONFIG.format(
                dense=dense.config.__name__, folder=dense.model_type, fields=class_docs.described_fields()
            ),
            model_type=PREFIX + dense.model_type,
            base_model_tp_plan=None,
            base_model_pp_plan=None,
            dense_class=dense.config,
            names_with_heads=names_with_heads(dense),
        )
    )
    return config_class


def make_parts(dense: DenseFamily) -> dict[type[nn.Module], type[nn.Module]]:
    """The sparse classes of a family's attentions and of the layers around them: dense class to sparse class."""
    parts: dict[type[nn.Module], type[nn.Module]] = {}
    for layer, attention in dense.layers.items():
        attribute = dense.attention_without_kwargs(layer)
        parts[attention] = make_class(
            dense,
            attention,
            (*((ReceivesArguments,) if attribute else ()), NsaAttentionMixin, attention),
            f"`{attention.__name__}` with sparse attention inside.",
            call_arguments=attention_arguments(attention),
            masks_slide=dense.masks_slide,
            forward_names=positional_names(attention.forward),
        )
        parts[layer] = make_class(
            dense,
            layer,
            (PassesArguments, layer) if attribute else (layer,),
            f"`{layer.__name__}` around sparse attention.",
            attention_name=attribute,
        )
    return parts


def names_not_split(dense: DenseFamily) -> list[str]:
    """The family's list of classes that stay on one device whole, with the sparse names of those that have one."""
    layers = {layer.__name__: dense.sparse_name(layer) for layer in (*dense.layers, *dense.layers.values())}
    return sorted({layers.get(name, name) for name in dense.model._no_split_modules or []})


def register_family(family: Family) -> None:
    """Enters a family's sparse classes into Transformers' tables of classes and of names."""
    dense, config_class, causal_lm_class = family.dense, family.config_class, family.causal_lm_class
    sparse_type = PREFIX + dense.model_type
    # exist_ok: nsa_hf may have been imported before
    AutoModel.register(config_class, family.model_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal_lm_class, exist_ok=True)
    for auto, head_class in family.head_classes.items():
        HEADS[auto].register(config_class, head_class, exist_ok=True)
    # for folders whose files do not name their tokenizer's class
    if (tokenizer := TOKENIZER_MAPPING.get(dense.config, None)) is not None:
        TOKENIZER_MAPPING.register(config_class, tokenizer, exist_ok=True)
    put_into_transformers(causal_lm_class, sparse_type)
    note_what_is_recorded(family.model_class)
    adapters.add_family(sparse_type, dense.model_type, partial(default_targets, dense))
    # how checkpoints store experts and the like
    for dense_name, sparse_name in (
        (dense.model_type, sparse_type),
        (dense.model.__name__, f"Nsa{dense.model.__name__}"),
        (dense.causal_lm.__name__, f"Nsa{dense.causal_lm.__name__}"),
        *((head.dense_class.__name__, head.__name__) for head in family.head_classes.values()),
    ):
        stored = get_checkpoint_conversion_mapping(dense_name)
        if stored is not None:
            register_checkpoint_conversion_mapping(sparse_name, stored, overwrite=True)


def put_into_transformers(model_class: type, model_type: str) -> None:
    """Makes a class an attribute of the package `transformers`, and names it in its table of causal models.

    Pipelines and `transformers serve` look a model's class up there by name, and only there. Whoever imported the
    package early has another object of it, because it replaces itself while it is imported: all of them get the class.
    The table says to Trainer whether label smoothing shifts the labels, and to `transformers serve` what the model
    does.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = model_class.__name__
    AutoModelForCausalLM._model_mapping._modules[model_type_to_module_name(model_type)] = sys.modules[__name__]
    namespaces = [sys.modules, *(getattr(module, "__dict__", {}) for module in list(sys.modules.values()))]
    packages = {id(package): package for package in (names.get("transformers") for names in namespaces)}
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
            # the name may also belong to another family: a multimodal one is named like its text model
            reasons.append(reason)
        if name in globals():
            return globals()[name]
    if reasons:
        raise AttributeError(f"there is no {name}: {reasons[0]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def from_dense(
    model_or_path: PreTrainedModel | str | os.PathLike[str], *, seed: int = 0, **options: Any
) -> SparseCausalLM:
    """A sparse model of a dense one of any supported family, converted in memory: nothing is written.

        >>> model = nsa_hf.from_dense("path/to/llama", topk=32)
        >>> type(model).__name__, model.config.nsa_topk
        ('NsaLlamaForCausalLM', 32)

    A model that is given keeps its own parameters: the new one has copies. `nsa_hf.convert` does the same on the disk,
    for models that are larger than memory.

    Args:
        model_or_path: a dense model, or what `from_pretrained` takes (a folder, a Hub id); its head is kept. Of a
            `PeftModel` its base model, if the adapter is merged into that.
        seed: of the new parameters' random part, which changes no output before training.
        options: `nsa_*` fields (`nsa_hf.NSA_FIELDS`), with or without the prefix, chosen as recommended (recommend.py)
            where they are not given; `attn_implementation` of the sparse model; and of a path what `from_pretrained`
            takes, such as `dtype`, `device_map` and `revision`.

    Raises:
        NsaError: the model is of a family that cannot be converted, is quantised, has an adapter that is not merged, or
            is not all in one place; or an option is unknown or breaks a rule.
    """
    return class_for(model_or_path, options).from_dense(model_or_path, seed=seed, **options)


def class_for(source: Any, options: Mapping[str, Any]) -> type[Any]:
    """The sparse class that a dense model is converted to: of its family, with its head.

    Args:
        source: the model, or where it is loaded from.
        options: of `from_dense`.

    Raises:
        NsaError: there is none, or the source is no model.
    """
    if isinstance(source, str | os.PathLike):
        if os.path.isfile(source):
            raise NsaError(
                f"{source} is a file: expected a folder or a Hub id; nsa_hf.convert(source, out) takes .gguf files"
            )
        given = {name: value for name, value in options.items() if name in in_memory.WHERE}
        config: Any = options.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config or source, **given)
        family = named_family(config.model_type)
        return family.head_classes.get(auto_class(config).__name__, family.causal_lm_class)
    model = in_memory.dense_model(source)
    family = named_family(model.config.model_type)
    with_heads = {head.dense_class: head for head in family.head_classes.values()}
    return next((with_heads[base] for base in type(model).__mro__ if base in with_heads), family.causal_lm_class)


def nsa_config_from_dense(dense_config: PreTrainedConfig, **nsa_fields: Any) -> SparseConfig:
    """The sparse config of a dense one.

        >>> config = nsa_hf.nsa_config_from_dense(AutoConfig.from_pretrained("path/to/llama"), topk=32)
        >>> config.model_type, config.nsa_topk
        ('nsa_llama', 32)

    Args:
        dense_config: of a supported family.
        nsa_fields: `nsa_*` fields, with or without the prefix; what is not given is chosen as recommended, see
            recommend.py.

    Raises:
        NsaError: the family or a feature of it is not supported, a field is unknown, or a field breaks a rule.
    """
    return chosen_config(dense_config, nsa_fields)[0]


def chosen_config(
    dense_config: PreTrainedConfig, nsa_fields: Mapping[str, Any]
) -> tuple[SparseConfig, dict[str, Choice]]:
    """As `nsa_config_from_dense`, with what was chosen and why."""
    config_class: Any = named_family(dense_config.model_type).config_class
    return config_class.chosen_from_dense(dense_config, nsa_fields)


def named_family(model_type: str) -> Family:
    """As `define_family`, with a refusal that names the family.

    Raises:
        NotPlain: the family has a feature that sparse attention does not have.
    """
    try:
        return define_family(model_type)
    except NotPlain as reason:
        raise NotPlain(f"the family {model_type!r} cannot be converted: {reason} ({FAMILIES})") from None


def initial_nsa_state(config: PreTrainedConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a conversion adds to the model of a sparse config: see `in_memory.initial_nsa_state`."""
    return in_memory.initial_nsa_state(family_of(config).class_of(config), config, seed)
