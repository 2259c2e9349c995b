"""A forward pass that begins at a layer in the middle, from what an earlier pass over the same text had there.

begin_at = resumable(model, window)     # runs the model once, dense
with begin_at(7):
    final_states(model, [window])       # layers 0 to 6 compute nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nsa_hf.attention import NsaAttentionMixin

from .models import final_states
from .tokens import Window

BeginAt = Callable[[int], AbstractContextManager[None]]


def resumable(model: Any, window: Window) -> BeginAt:
    """Runs a sparse model dense over a text and keeps each layer's output.

    Args:
        model: the sparse model.
        window: the text.

    Returns:
        A function that makes a context: in it, the layers before the given one give what they gave dense, at no cost.
        It does nothing where a family's layers hand on more than their output, which a trial shows.
    """
    layers = decoder_layers(model)
    if not layers:
        return lambda layer: nullcontext()
    outputs: list[Any] = [None] * len(layers)

    def note(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            outputs[place] = output

        return hook

    def dense() -> Tensor:
        with model.dense_attention():
            return final_states(model, [window])[0]

    hooks = [layer.register_forward_hook(note(place)) for place, layer in enumerate(layers)]
    try:
        whole = dense()
    finally:
        for hook in hooks:
            hook.remove()
    # the last one twice, since a layer may write into what it is given
    for first in (*range(1, len(layers)), len(layers) - 1):
        with beginning_at(layers, first, outputs):
            if not torch.equal(dense(), whole):
                return lambda layer: nullcontext()
    return lambda layer: beginning_at(layers, layer, outputs)


@contextmanager
def beginning_at(layers: list[nn.Module], first: int, outputs: list[Any]) -> Iterator[None]:
    """Inside, the layers before `first` give the output of the last of them, whatever they are given."""
    before = layers[: max(0, first)]
    for layer in before:
        layer.forward = lambda *args, **kwargs: outputs[first - 1]  # hides the class's
    try:
        yield
    finally:
        for layer in before:
            del layer.forward


def decoder_layers(model: Any) -> list[nn.Module]:
    """A decoder's layers by their numbers; none where they are not one list."""
    for stack in model.base_model.children():
        if isinstance(stack, nn.ModuleList) and len(stack) == model.config.num_hidden_layers:
            inside = [(place, module) for place, layer in enumerate(stack) for module in layer.modules()]
            numbers = [(place, module.layer_idx) for place, module in inside if isinstance(module, NsaAttentionMixin)]
            if len(numbers) == len(list(model.attention_layers())) and all(a == b for a, b in numbers):
                return list(stack)
    return []
