"""A student in parts, one in each process (FSDP2): weights, gradients and the optimizer's state of each layer.

    plugin = sharding_plugin()                                   # for Accelerate, before it is made
    model, optimizer = prepare_sharded(accelerator, losses, student, optimizer)
    call_whole(student, lambda: student(ids))                    # another forward pass than the training's
    gather_weights(student)                                      # at the end: whole in the main process, to be saved

Parameters are put together in float32 and cast by autocast as in one process, so that both compute the same. All
functions are to be called in all processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

from nsa_hf.errors import NsaError

from .compiling import decoder_layers

Result = TypeVar("Result")
WHOLE = "sharded_in"  # where a student keeps the module of which it is the parts


def sharding_plugin() -> Any:
    """Accelerate's plugin for FSDP2; which modules are sharded is added when the model is known."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(),
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true"),
    )


def shard_on_cpu(accelerator: Any, plugin: Any) -> None:
    """Has Accelerate, which knows FSDP on GPUs only, shard on CPUs as well; PyTorch does."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP


class Sharded(nn.Module):
    """What is in parts: a student, called through what computes its losses, which may be another in each stage.

    Attributes:
        student: the causal language model.
        autocast: makes the context in which the losses are computed.
        losses: that module; in a list, so that it is no part of this one.
    """

    def __init__(self, student: Any, autocast: Callable[[], AbstractContextManager]):
        super().__init__()
        self.student, self.autocast = student, autocast
        self.losses: list[nn.Module] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the losses' module gives."""
        with self.autocast():
            return self.losses[0](*args, **kwargs)

    def call(self, function: Callable[[], Result]) -> Result:
        """What a function gives that runs the student."""
        return function()


def prepare_sharded(
    accelerator: Any, losses: nn.Module, student: Any, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """As `accelerator.prepare`, with each decoder layer of the student sharded by itself, and the rest together.

    A student that a stage before has sharded stays as it is.

    Args:
        losses: the module that is called in training.
        student: the causal language model in it.

    Raises:
        NsaError: the model does not say which classes its layers have.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    whole: Sharded | None = student.__dict__.get(WHOLE)
    if whole is None:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(student)
        model, optimizer = accelerator.prepare(Sharded(student, accelerator.autocast), optimizer)
        register_fsdp_forward_method(model, "call")
        student.__dict__[WHOLE] = model
    else:
        assert all(isinstance(parameter, DTensor) for parameter in student.parameters()), "see check_stage"
        # the optimizer has the parts already, which `accelerator.prepare` would look for
        model, optimizer = accelerator.prepare_model(whole), accelerator.prepare_optimizer(optimizer)
    model.losses = [losses]
    begin_state(model, optimizer)
    return model, optimizer


def begin_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer its state before the first step.

    Where there is none when it is saved, PyTorch takes a step to have one: with zeros, but it counts as the first.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    get_optimizer_state_dict(model, optimizer)
    for state in optimizer.state.values():
        state["step"].zero_()


def layer_classes(student: Any) -> list[str]:
    """The names of the classes of a model's decoder layers; NsaError where it does not tell."""
    classes = {type(layer).__name__ for layer in decoder_layers(student)}
    if not classes:
        raise NsaError(f"FSDP2: {type(student).__name__} names no class of its layers (_no_split_modules): use DDP")
    return sorted(classes)


def call_whole(student: Any, function: Callable[[], Result]) -> Result:
    """Calls a function in which a student may run outside of training, sharded or not, without gradients.

    Args:
        student: a model, or one that `prepare_sharded` has put into parts.
        function: runs the student equally often in all processes.
    """
    whole: Any = student.__dict__.get(WHOLE)
    if whole is None:
        return function()
    with torch.no_grad():
        result: Result = whole.call(function)
    whole.reshard()
    return result


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is in parts, put together; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_weights(student: nn.Module, keep: bool) -> None:
    """Puts a sharded student's parameters together, on the CPU and one by one; it can be saved then, not run.

    Args:
        keep: whether this process keeps them.
    """
    from torch.distributed.tensor import DTensor

    whole: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in list(student.modules()):
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor):
                if id(parameter) not in whole:
                    full = parameter.detach().full_tensor()
                    whole[id(parameter)] = nn.Parameter(full.cpu() if keep else torch.empty(0), requires_grad=False)
                module._parameters[name] = whole[id(parameter)]
