"""A student in parts, one in each process (FSDP2): weights, gradients and the optimizer's state of each layer.

    plugin = sharding_plugin()                                   # for Accelerate, before it is made
    model, optimizer, loader = prepare_sharded(accelerator, model, student, optimizer, loader)
    call_whole(model, lambda: student(ids))                      # another forward pass than the training's
    gather_weights(student)                                      # at the end: whole in the main process, to be saved

Parameters are put together in float32 and cast by autocast as in one process, so that both compute the same. All
functions are to be called in all processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from nsa_hf.errors import NsaError

from .compiling import decoder_layers

Result = TypeVar("Result")


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


def prepare_sharded(
    accelerator: Any, model: nn.Module, student: Any, optimizer: torch.optim.Optimizer, loader: Any
) -> tuple[Any, Any, Any]:
    """As `accelerator.prepare`, with each decoder layer of the student sharded by itself, and the rest together.

    Args:
        model: the module that is called in training.
        student: the causal language model in it.

    Raises:
        NsaError: the model does not say which classes its layers have.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    classes = {type(layer).__name__ for layer in decoder_layers(student)}
    if not classes:
        raise NsaError(f"FSDP: {type(student).__name__} names no class of its layers (_no_split_modules): use DDP")
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(classes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # which Accelerate leaves to a policy that would cast norms and gates as well
    model.forward = accelerator.autocast()(model.forward)
    model.call = lambda function: function()  # type: ignore[assignment]
    register_fsdp_forward_method(model, "call")
    return model, optimizer, loader


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` is in parts."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def call_whole(model: Any, function: Callable[[], Result]) -> Result:
    """Calls a function in which the student may run as if it were whole, without gradients.

    Args:
        model: as prepared, sharded or not.
        function: runs the student equally often in all processes.
    """
    if not is_sharded(model):
        return function()
    with torch.no_grad():
        result: Result = model.call(function)
    model.reshard()
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
