"""The classes that a dense family of Transformers is made of, found by reading their source; nothing is built.

The causal language model's `__init__` names its decoder's class, the decoder's the layers', a layer's its attention's,
and the attention calls the function that `attn_implementation` chooses. Where this chain breaks, or the call is given
something that sparse attention does not have, the family is refused, and the message names the feature.

Why the call is read as source: every refusal that can be made of a family is made before a model of it is built, for
all configs at once, and names the expression that stands in the way. A forward on the meta device with an attention
function that records its arguments would give their values, as they are with one config. It was tried with Transformers
5.24: the values are the same, and 81 of 82 families run (JetMoE copies numbers to the host; experts need 16 bits). But
the source would have to be read as before, for attentions that are called twice or make masks of their own.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .errors import NotPlain, NsaError
from .registration import PREFIX

# What a family's attention may hand to the attention function by name. The values of the second set are checked in
# every layer (see features.py); those of the first change nothing for causal attention.
PLAIN_ARGUMENTS = {"dropout", "scaling", "position_ids", "output_attentions", "use_cache"}
CHECKED_ARGUMENTS = {"sliding_window", "softcap", "s_aux", "is_causal"}

# Configs inside a config that describe no model.
OWN_SETTINGS = {"attn_config", "ffn_config"}

# Python 3.11 miscounts its own depth where two threads parse at once ("AST constructor recursion depth mismatch").
PARSING = threading.Lock()

# Names in an attention's `__init__` and among its forward's arguments, and the features that they are signs of.
NOT_PLAIN = {
    "encoder_hidden_states": "cross-attention (encoder_hidden_states)",
    "key_value_states": "cross-attention (key_value_states)",
    "cross_attention_states": "cross-attention (cross_attention_states)",
    "shared_kv_states": "layers that share keys and values (shared_kv_states)",
    "kv_lora_rank": "multi-head latent attention (MLA, kv_lora_rank)",
}


@dataclass(frozen=True)
class DenseFamily:
    """The classes of one dense family.

    Attributes:
        model_type: as in its configs.
        config: its config class.
        layers: each class of decoder layers that has attention to the class of that.
        model: its decoder.
        causal_lm: its causal language model.
    """

    model_type: str
    config: type[PreTrainedConfig]
    layers: dict[type[nn.Module], type[nn.Module]]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]

    def sparse_name(self, part: type) -> str:
        """What the sparse class of a dense one is called: `Nsa` and the dense class's name.

        It must say to which family it belongs. So the family's own name is put in where it borrows another family's
        classes, and before the names of parts that are not called after any family (`EncoderLayer`).
        """
        family, lender = (
            config.__name__.removesuffix("Config") for config in (self.config, self.causal_lm.config_class)
        )
        name = part.__name__
        if family != lender and name.startswith(lender):
            name = family + name.removeprefix(lender)
        is_told = self.model_type in families_by_class_name(f"Nsa{name}")
        return f"Nsa{name}" if is_told else f"Nsa{family}{part.__name__}"

    @property
    def masks_slide(self) -> bool:
        """Whether the decoder makes masks of a sliding window: of all layers, where the config names no kinds."""
        return "create_sliding_window_causal_mask" in names_of(self.model.forward)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers carry a state from token to token: convolutions, linear attention, Mamba."""
        return "create_recurrent_attention_mask" in names_of(self.model.forward)

    def attention_without_kwargs(self, layer: type[nn.Module]) -> str | None:
        """The attribute that holds the attention of a layer that does not hand its `**kwargs` on to it, else None."""
        attention = self.layers[layer].__name__
        attributes = [
            target.attr
            for node in ast.walk(source_of(layer.__init__))
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            for target in node.targets
            if isinstance(target, ast.Attribute) and ast.unparse(node.value.func) == attention
        ]
        called_with_kwargs = [
            node.func.attr
            for node in ast.walk(source_of(layer.forward))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and any(keyword.arg is None for keyword in node.keywords)
        ]
        return next((name for name in attributes if name not in called_with_kwargs), None)


def causal_model_types() -> list[str]:
    """The model types of Transformers' causal language models; the sparse ones, which are in its table too, are not."""
    names = (name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING_NAMES)
    return [name for name in names if not name.startswith(PREFIX)]


def families_by_class_name(name: str) -> list[str]:
    """The model types of the families whose sparse classes may have this name, those with the longest names first."""
    if not name.startswith("Nsa"):
        return []

    def family_in_name(model_type: str) -> str:
        stems = [CONFIG_MAPPING_NAMES[model_type].removesuffix("Config")]
        stems.append(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type].removesuffix("ForCausalLM"))
        return max((stem for stem in stems if name.startswith(f"Nsa{stem}")), key=len, default="")

    stems = {model_type: family_in_name(model_type) for model_type in causal_model_types()}
    return sorted((model_type for model_type in stems if stems[model_type]), key=lambda one: -len(stems[one]))


@cache
def find_family(model_type: str) -> DenseFamily:
    """The classes of a dense family.

    Raises:
        NotPlain: it cannot be made sparse; the message names the feature.
        NsaError: it is a sparse one.
    """
    if model_type.startswith(PREFIX):
        raise NsaError(f"the model is already a sparse one ({model_type}): convert its dense source")
    if model_type not in causal_model_types():
        raise NotPlain(f"{model_type} is not among Transformers {transformers.__version__}'s causal language models")
    config = CONFIG_MAPPING[model_type]
    causal_lm = _load(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    inner = [name for name in config.sub_configs if name not in OWN_SETTINGS]
    if inner:
        raise NotPlain(f"{model_type} is several models in one, as multimodal ones are ({', '.join(inner)})")
    models = [part for part in parts_of(causal_lm) if issubclass(part, PreTrainedModel)]
    layers = {
        layer: attention
        for model in models
        for layer in parts_of(model)
        for attention in parts_of(layer)
        if calls_attention(attention)
    }
    if not layers:
        raise NotPlain(f"{model_type} has {_describe_attention(config, causal_lm)}")
    (model,) = (model for model in models if set(parts_of(model)) & layers.keys())
    for attention in layers.values():
        _check_attention(model_type, attention)
    return DenseFamily(model_type, config, layers, model, causal_lm)


def parts_of(module: type[nn.Module]) -> list[type[nn.Module]]:
    """The classes of modules that a module's `__init__` names, directly or through a table of its file."""
    scope = vars(sys.modules[module.__module__])
    names = names_of(module.__init__)
    # methods that help it
    helpers = [vars(module)[name] for name in names if inspect.isfunction(vars(module).get(name))]
    parts: list[type[nn.Module]] = []
    for name in sorted(names.union(*map(names_of, helpers))):
        value = scope.get(name)
        for part in value.values() if isinstance(value, dict) else [value]:
            if inspect.isclass(part) and issubclass(part, nn.Module) and part.__module__ == module.__module__:
                parts.append(part)
    return parts


def names_of(function: Callable[..., Any]) -> set[str]:
    """The names that a function's code reads: globals, attributes, also inside comprehensions."""

    def names(code: Any) -> set[str]:
        return set(code.co_names).union(*(names(inner) for inner in code.co_consts if hasattr(inner, "co_names")))

    return names(inspect.unwrap(function).__code__)


def calls_attention(module: type[nn.Module]) -> bool:
    """Whether a module looks its attention function up by `attn_implementation`."""
    return "ALL_ATTENTION_FUNCTIONS" in names_of(module.forward)


def attention_arguments(attention: type[nn.Module]) -> dict[str, ast.expr]:
    """What an attention class hands to the attention function by name: name to expression, as source.

    Raises:
        NotPlain: it calls that function not exactly once, or with another mask than the one it was given.
    """
    function = source_of(attention.forward)
    calls = list(_attention_calls(function))
    if len(calls) != 1:
        raise NotPlain(f"{attention.__name__} has {len(calls)} attentions in one layer (differential attention)")
    arguments = {keyword.arg: keyword.value for keyword in calls[0].keywords if keyword.arg is not None}
    # module, query, key, value, mask
    mask = arguments.pop("attention_mask", None) or calls[0].args[4]
    stored = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if not isinstance(mask, ast.Name) or mask.id != "attention_mask" or "attention_mask" in stored:
        raise NotPlain(f"{attention.__name__} makes an attention mask of its own ({ast.unparse(mask)})")
    return arguments


def _check_attention(model_type: str, attention: type[nn.Module]) -> None:
    forward = inspect.signature(attention.forward)
    names = names_of(attention.__init__) | set(forward.parameters)
    for name, feature in NOT_PLAIN.items():
        if name in names:
            raise NotPlain(f"{model_type} has {feature}")
    arguments = _family_arguments(model_type, attention)
    other = sorted(arguments.keys() - PLAIN_ARGUMENTS - CHECKED_ARGUMENTS)
    if other:
        raise NotPlain(f"{model_type} has an attention that takes more than q, k and v ({', '.join(other)})")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in forward.parameters.values()):
        raise NotPlain(f"{model_type} has an attention ({attention.__name__}) that hands no arguments through")


def _family_arguments(model_type: str, attention: type[nn.Module]) -> dict[str, ast.expr]:
    try:
        return attention_arguments(attention)
    except NotPlain as reason:
        raise NotPlain(f"{model_type}: {reason}") from None


def _describe_attention(config: type[PreTrainedConfig], causal_lm: type[PreTrainedModel]) -> str:
    """What attention a model has in which no layer with attention of the supported kind was found."""
    inside = _all_parts(causal_lm)
    attentions = [part.__name__ for part in inside if "attention" in part.__name__.lower()]
    names = set().union(*(names_of(part.forward) | names_of(part.__init__) for part in inside))
    parameters = {name for part in inside for name in inspect.signature(part.forward).parameters}
    if not attentions:
        return "no attention at all"
    if {"encoder_hidden_states", "key_value_states"} & parameters:
        return "cross-attention, as the decoder of an encoder or an encoder used as one (encoder_hidden_states)"
    if any("alibi" in name for name in names | parameters):
        return f"ALiBi, a bias on every pair of positions ({attentions[0]})"
    if any(map(calls_attention, inside)):
        return f"its layers in a decoder inside its decoder ({inside[1].__name__})"
    return f"an attention that does not go through Transformers' attention interface ({attentions[0]})"


def _all_parts(module: type[nn.Module]) -> list[type[nn.Module]]:
    """A module's class and those of everything inside it, the outer ones first."""
    parts, new = [module], [module]
    while new:
        new = [part for outer in new for part in parts_of(outer) if part not in parts]
        parts += new
    return list(dict.fromkeys(parts))


def _load(model_type: str, name: str) -> Any:
    module = import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    return getattr(module, name, None) or getattr(transformers, name)


def source_of(function: Callable[..., Any]) -> ast.FunctionDef:
    """A function's source, parsed."""
    with PARSING:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]  # type: ignore[return-value]


def _attention_calls(function: ast.FunctionDef) -> Iterator[ast.Call]:
    """The calls of what was looked up in `ALL_ATTENTION_FUNCTIONS`."""
    interfaces = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and node.value is not None
        and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in interfaces:
            yield node
