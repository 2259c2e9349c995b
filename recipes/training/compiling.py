"""Compiled decoder layers: what lies between matrix products and attention becomes few kernels.

    with room_for_graphs():
        compile_layers(student)
        ...

Layers are alike, so that a model is compiled once a kind of layer and not once a layer. What is evaluated between steps
has other shapes: `uncompiled()` runs it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from nsa_hf.errors import NsaError

# Graphs of one layer's code: kinds of layers, training or not, teacher and student, lengths. PyTorch's own limit is 8,
# and beyond it everything runs uncompiled, with a warning that drowns.
GRAPHS = 64
# An entry for each `uncompiled()` that is open; of all threads, as a layer is computed again in another one.
UNCOMPILED: list[None] = []
# By a layer's class the same with its forward compiled; by such a one itself.
COMPILED: dict[type[nn.Module], type[nn.Module]] = {}


def decoder_layers(model: Any) -> Iterator[nn.Module]:
    """The layers of a causal language model, those that Transformers keeps whole on one device."""
    names = set(model._no_split_modules or ())
    return (
        module
        for module in model.modules()
        if any(base.__name__ in names for base in type(module).__mro__) and not isinstance(module, type(model))
    )


def compile_layers(model: Any) -> None:
    """Compiles each decoder layer's forward, when it first runs.

    Only its class changes, so that names, weights and `save_pretrained` are as before; and neither the hooks of FSDP
    and others nor gradient checkpointing are within what is compiled, whichever method of a layer they begin in.

    Raises:
        NsaError: a layer has a forward of its own, which would run instead.
    """
    for layer in decoder_layers(model):
        plain = type(layer)
        if "forward" in vars(layer):
            raise NsaError(
                f"{plain.__name__} has a forward of its own, as a model has that was loaded with device_map: load it "
                "without, and compile it before hooks are added"
            )
        if plain not in COMPILED:
            compiled = compiled_class(plain)
            COMPILED[plain] = COMPILED[compiled] = compiled
        layer.__class__ = COMPILED[plain]


def compiled_class(layer_class: Any) -> type[nn.Module]:
    """A layer's class with its forward compiled, but within `uncompiled()`."""
    plain = layer_class.forward
    compiled = torch.compile(plain, dynamic=False)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (plain if UNCOMPILED else compiled)(*args, **kwargs)

    members = {"forward": forward, "__module__": layer_class.__module__, "__doc__": layer_class.__doc__}
    return type(layer_class.__name__, (layer_class,), members)


def room_for_graphs() -> AbstractContextManager:
    """Within it PyTorch keeps as many graphs of a layer as training needs.

    And it does not cut them where DDP's buckets end: a layer is little beside a bucket, and gradients are sent as the
    backward pass leaves each layer.
    """
    return torch._dynamo.config.patch(recompile_limit=GRAPHS, optimize_ddp=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it compiled layers run as if they were not. What else is compiled stays so: losses are, for memory too.

    A forward pass and its backward pass belong in the same one: layers that are computed again must run as they did.
    """
    UNCOMPILED.append(None)
    try:
        yield
    finally:
        UNCOMPILED.pop()
