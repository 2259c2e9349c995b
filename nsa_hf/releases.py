"""All that depends on the release of Transformers; no other module asks which one is installed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .errors import NsaError
from .registration import PREFIX

INSTALLED = Version(transformers.__version__)

# 5.24: `cache` is a forward's argument and output that was `past_key_values` before.
CACHE, OTHER_CACHE = ("cache", "past_key_values") if Version("5.24") <= INSTALLED else ("past_key_values", "cache")


def positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments that may be given by position, without `self`."""
    parameters = inspect.signature(inspect.unwrap(forward)).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A forward's arguments as one dict by name, the cache under the name that it has in this release.

    Args:
        names: of the arguments that may be given by position.

    Raises:
        TypeError: there are more arguments than names, or one came twice.
        NsaError: two caches were given, under the old name and the new one.
    """
    arguments = dict(zip(names, args, strict=False))
    if len(args) > len(names) or arguments.keys() & kwargs.keys():
        raise TypeError(f"expected at most the arguments {', '.join(names)}, each once; got {len(args)} without a name")
    arguments.update(kwargs)
    cache = arguments.pop(OTHER_CACHE, None)
    if cache is not None:
        if arguments.get(CACHE) is not None:
            raise NsaError(f"{CACHE} and {OTHER_CACHE} are two names of one argument, got both: give {CACHE}")
        if OTHER_CACHE == "past_key_values" and not torch.compiler.is_compiling():
            warnings.warn(f"`{OTHER_CACHE}` is deprecated in Transformers: use `{CACHE}`", FutureWarning, stacklevel=3)
        arguments[CACHE] = cache
    return arguments


def note_what_is_recorded(model_class: Any) -> None:
    """Enters a model's class into Transformers' table of what `output_attentions` and its like record.

    `PreTrainedModel.__init__` enters the class of each model; one that is given its class later is missing there.
    """
    # by the class's name in all releases; the plain dict of 5.17 became one whose `[...] =` takes a model
    _CAN_RECORD_REGISTRY.update({str(model_class): model_class._can_record_outputs})


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The cache among the arguments or outputs of a forward, whatever its name there."""
    return next((value for value in values if isinstance(value, Cache)), None)


def tokens_held(cache: Cache) -> int:
    """How many tokens a growing cache holds."""
    length = cache.get_seq_length()
    # 5.17: a tensor, after assisted decoding has cropped sliding layers
    return int(length) if isinstance(length, Tensor) else length


def checkpoint_activations(model: Any, every_n_layers: int) -> None:
    """Gradient checkpointing of every n-th layer; 0 ends it.

    Raises:
        NsaError: Transformers has none for this family.
    """
    if every_n_layers == 0:
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            # 5.23: the method's name
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        return
    if not model.supports_gradient_checkpointing:
        raise NsaError(
            f"gradient checkpointing: Transformers has none for {model.config.model_type.removeprefix(PREFIX)} models, "
            "set gradient_checkpointing=0"
        )
    # 5.23: the method's name
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False}, every_n_layers=every_n_layers)
