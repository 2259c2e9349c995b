"""Heads on a sparse decoder: the next token's, and the family's own classes with others, where it has them."""

from __future__ import annotations

import os
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .discovery import DenseFamily
from .errors import NsaError

# The Auto classes of other heads than the next token's, by name.
HEADS: dict[str, Any] = {
    auto.__name__: auto
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)
}


def dense_heads(dense: DenseFamily) -> dict[str, type[PreTrainedModel]]:
    """A dense family's classes with other heads, by the name of the Auto class; those that it lacks are absent."""
    found = {name: auto._model_mapping.get(dense.config, None) for name, auto in HEADS.items()}
    return {name: head for name, head in found.items() if head is not None}


def names_with_heads(dense: DenseFamily) -> dict[str, str]:
    """The dense class's name to the sparse one's of a family's models with a head, the language model's first."""
    return {head.__name__: dense.sparse_name(head) for head in (dense.causal_lm, *dense_heads(dense).values())}


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that loads a model with its own head, dense or sparse: by the class that its config names.

    `AutoModelForCausalLM` where that is none with another head.
    """
    classes = ((auto, auto._model_mapping.get(type(config), None)) for auto in HEADS.values())
    named = (auto for auto, head in classes if head is not None and head.__name__ in (config.architectures or []))
    return next(named, AutoModelForCausalLM)


def check_next_token(config: PreTrainedConfig, name: str | os.PathLike) -> None:
    """Whether a model is a language model.

    Args:
        config: the model's.
        name: of the model, for the message.

    Raises:
        NsaError: it has another head.
    """
    auto = auto_class(config)
    if auto is not AutoModelForCausalLM:
        raise NsaError(
            f"{name} is no language model, which is needed here: its head is that of a "
            f"{', '.join(config.architectures or [])}; load it with {auto.__name__}"
        )


def renamed_decoder(model_class: type[PreTrainedModel], family: DenseFamily) -> dict[str, str]:
    """How names are read that were stored where the decoder is called otherwise, as Transformers' `key_mapping`.

    Llama's question answering calls `transformer` what its language model calls `model`. Neither would find its decoder
    in the other's folder, and Transformers would draw it anew.

    Args:
        model_class: of the model, dense or sparse.
        family: its dense one.
    """
    own = model_class.base_model_prefix
    others = {head.base_model_prefix for head in (family.causal_lm, *dense_heads(family).values())} - {own}
    return {rf"^{other}\.": f"{own}." for other in sorted(others)}
