"""What one layer's attention does beyond plain causal attention: a sliding window is kept, the rest refused by name."""

from __future__ import annotations

import ast
from typing import Any

from transformers import PreTrainedConfig

from .discovery import CHECKED_ARGUMENTS
from .errors import NotPlain
from .registration import PREFIX

# Kinds of layers without attention: some families build one in them all the same, and do not use it.
WITHOUT_ATTENTION = {"linear_attention", "conv", "mamba", "moe", "mlp"}


def layer_window(
    attention: Any, call_arguments: dict[str, ast.expr], config: PreTrainedConfig, layer: int | None, masks_slide: bool
) -> int | None:
    """The sliding window of a layer in tokens, the query's own counted; None for full attention.

    Args:
        attention: as its family built it.
        call_arguments: what its family hands to the attention function, name to source.
        config: of the model; `layer_types` says what the layer is.
        layer: its number.
        masks_slide: whether the family's decoder makes masks of a sliding window.

    Raises:
        NotPlain: it has something that sparse attention does not have, or a window where full attention was expected.
    """
    values = {name: _value(source, attention) for name, source in call_arguments.items() if name in CHECKED_ARGUMENTS}
    family = config.model_type.removeprefix(PREFIX)
    if values.get("softcap") is not None:
        raise NotPlain(f"softcap: {family} caps the logits of its attention at {values['softcap']}")
    if values.get("s_aux") is not None:
        raise NotPlain(f"sinks: {family} adds a learned sink to every softmax of its attention (s_aux)")
    if values.get("is_causal", getattr(attention, "is_causal", True)) is False:
        raise NotPlain(f"{family} with this config attends to later tokens too (is_causal is False)")
    if layer is None:
        raise NotPlain(f"{family} has one attention that several layers share")
    kinds = getattr(config, "layer_types", None)
    kind, window = kinds[layer] if kinds else None, values.get("sliding_window")
    if kind == "sliding_attention":
        window = config.sliding_window if window is None else window
        if window is None:
            raise NotPlain(f"sliding_window is null, and layer_types of this {family} names sliding_attention")
        return int(window)
    if kind in WITHOUT_ATTENTION:
        return None
    if kind not in (None, "full_attention"):
        raise NotPlain(f"{family} has layers of the kind {kind}, whose attention is not plain")
    if kind is None and window is None and masks_slide:
        window = getattr(config, "sliding_window", None)
    if window is not None:
        raise NotPlain(
            f"sliding_window: every layer of this {family} model attends to the last {window} tokens only, so there is "
            "no full attention to make sparse"
        )
    return None


def head_sizes(attention: Any, config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, key size and value size of a layer's attention."""
    # some families have other numbers of heads in other layers
    heads = getattr(attention, "num_heads", None) or config.num_attention_heads
    key_size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    key_size = key_size or config.hidden_size // heads
    return heads, key_size, getattr(attention, "v_head_dim", None) or key_size


def _value(expression: ast.expr, attention: Any) -> Any:
    """The value that an argument of the attention function will have: of `self.sliding_window`, for one."""
    # the expression stands in Transformers' own source
    return eval(compile(ast.Expression(expression), "<attention call>", "eval"), {"self": attention})
