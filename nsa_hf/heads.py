"""Other heads on a sparse decoder than the next token's: the family's own classes, where it has them."""

from __future__ import annotations

from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from .discovery import DenseFamily

# The Auto classes of the heads, by name.
HEADS = {
    auto.__name__: auto
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)
}


def dense_heads(dense: DenseFamily) -> dict[str, type[PreTrainedModel]]:
    """A dense family's classes with other heads, by the name of the Auto class; those that it lacks are absent."""
    found = {name: auto._model_mapping.get(dense.config, None) for name, auto in HEADS.items()}
    return {name: head for name, head in found.items() if head is not None}
