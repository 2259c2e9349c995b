"""The dense families, and the sparse classes made of each.

A sparse class is the family's own class with a mixin in front of it. Where a family's `__init__` names the classes of
its parts, it runs with the sparse parts under those names: each model is built once, from its family's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from .attention import NsaAttentionMixin
from .config import NSA_FIELDS, NsaConfigMixin
from .errors import NsaError
from .modeling import NsaModelMixin, NsaPreTrainedMixin

# Dense model_type: the stem of its class names in transformers.models.<model_type>.
SUPPORTED = {"llama": "Llama"}


@dataclass(frozen=True)
class Family:
    """One family's classes: the dense config it starts from, and the sparse ones."""

    model_type: str
    dense_config_class: type[PreTrainedConfig]
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]


def built_with(init: Callable[..., None], parts: dict[str, type]) -> Callable[..., None]:
    """A family's `__init__` that finds the sparse classes where it names the dense ones.

    Raises:
        RuntimeError: it does not name one of them, so that its model would keep a dense part.
    """

    def names(code: Any) -> set[str]:
        return set(code.co_names).union(*(names(inner) for inner in code.co_consts if hasattr(inner, "co_names")))

    missing = set(parts) - names(init.__code__)
    if missing:
        raise RuntimeError(f"{init.__qualname__} does not build {', '.join(sorted(missing))} by name")

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        scope = {**init.__globals__, **parts}
        rebuilt = FunctionType(init.__code__, scope, init.__name__, init.__defaults__, init.__closure__)
        rebuilt.__kwdefaults__ = init.__kwdefaults__
        rebuilt(self, *args, **kwargs)

    return __init__


def define_family(model_type: str, stem: str) -> Family:
    """Makes the sparse classes of one family, under their names in this module, and registers them."""
    dense = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    dense_config: type[PreTrainedConfig] = getattr(dense, f"{stem}Config")

    def define(part: str, bases: tuple[type, ...], text: str, **members: Any) -> type:
        name = f"Nsa{stem}{part}"
        made = type(name, bases, {"__module__": __name__, "__qualname__": name, "__doc__": text, **members})
        globals()[name] = made
        return made

    def dense_part(part: str) -> type:
        return getattr(dense, f"{stem}{part}")

    config: type[PreTrainedConfig] = strict(
        define(
            "Config",
            (NsaConfigMixin, dense_config),
            f"`{dense_config.__name__}` with the `nsa_*` fields.",
            model_type=f"nsa_{model_type}",
        )
    )
    globals()[config.__name__] = config
    attention = define(
        "Attention", (NsaAttentionMixin, dense_part("Attention")), f"`{stem}Attention` with sparse attention inside."
    )
    layer = define(
        "DecoderLayer",
        (dense_part("DecoderLayer"),),
        f"`{stem}DecoderLayer` around sparse attention.",
        __init__=built_with(dense_part("DecoderLayer").__init__, {f"{stem}Attention": attention}),
    )
    layers = {
        name if name != f"{stem}DecoderLayer" else layer.__name__
        for name in dense_part("Model")._no_split_modules or []
    }
    shared = {"config_class": config, "config": config, "_no_split_modules": sorted(layers)}
    model = define(
        "Model",
        (NsaModelMixin, dense_part("Model")),
        f"`{stem}Model` with sparse attention.",
        __init__=built_with(dense_part("Model").__init__, {f"{stem}DecoderLayer": layer}),
        **shared,
    )
    causal_lm = define(
        "ForCausalLM",
        (NsaPreTrainedMixin, dense_part("ForCausalLM"), GenerationMixin),
        f"`{stem}ForCausalLM` with sparse attention.",
        __init__=built_with(dense_part("ForCausalLM").__init__, {f"{stem}Model": model}),
        **shared,
    )
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForCausalLM.register(config, causal_lm)
    return Family(model_type, dense_config, config, model, causal_lm)


FAMILIES = {model_type: define_family(model_type, stem) for model_type, stem in SUPPORTED.items()}


def nsa_config_from_dense(dense_config: PreTrainedConfig, **nsa_fields: Any) -> PreTrainedConfig:
    """The sparse config of a dense one.

    Args:
        dense_config: of a supported family.
        nsa_fields: `nsa_*` fields that differ from their defaults.

    Raises:
        NsaError: the family or a feature of it is not supported, a field is unknown, or a field breaks a rule.
    """
    model_type = dense_config.model_type
    if model_type.startswith("nsa_"):
        raise NsaError(f"the model is already a sparse one ({model_type}): convert its dense source")
    if model_type not in FAMILIES:
        raise NsaError(f"the family {model_type!r} is not supported: this version converts {', '.join(FAMILIES)}")
    unknown = set(nsa_fields) - set(NSA_FIELDS)
    if unknown:
        raise NsaError(f"unknown option {', '.join(sorted(unknown))}: choose among {', '.join(NSA_FIELDS)}")
    fields = dense_config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(name, None)
    family = FAMILIES[model_type]
    return family.config_class(**fields, architectures=[family.causal_lm_class.__name__], **nsa_fields)


def initial_nsa_state(config: PreTrainedConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 values of the parameters that a conversion adds, layer by layer; the same for the same seed."""
    family = next(family for family in FAMILIES.values() if isinstance(config, family.config_class))
    with torch.device("meta"):
        skeleton = family.causal_lm_class(config)
    layers = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, NsaAttentionMixin)]
    for index, (name, module) in enumerate(layers):
        if module.nsa is not None:
            new = module.nsa.float().to_empty(device="cpu")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + index)
                new.apply(skeleton._init_weights)
            yield from ((f"{name}.nsa.{key}", value.detach()) for key, value in new.state_dict().items())
