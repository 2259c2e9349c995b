"""What a stage trains: all weights, the NSA parameters, or the attention's projections."""

from __future__ import annotations

from typing import Any

from torch import nn

from nsa_hf.errors import NsaError
from nsa_hf.releases import checkpoint_activations

from .config import RunConfig

PROJECTIONS = {"qk": ("q_proj", "k_proj"), "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj")}


def choose_trained(student: Any, stage: RunConfig) -> None:
    """Freezes what a stage does not train, and sets which activations it computes again.

    Raises:
        NsaError: the model does not have what is to be trained.
    """
    for name, parameter in student.named_parameters():
        rate = stage.lr_nsa if ".nsa." in name else stage.lr_backbone
        parameter.requires_grad_(bool(rate))
    if stage.trains != "all":
        kept = projections(student, stage.trains) if stage.trains in PROJECTIONS else {}
        chosen = {id(parameter) for module in kept.values() for parameter in module.parameters()}
        for name, parameter in student.named_parameters():
            if ".nsa." not in name and id(parameter) not in chosen:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise NsaError(f"trains {stage.trains!r}: this model has no such parameters, or their rate is 0")
    checkpoint_activations(student, stage.gradient_checkpointing)


def projections(student: Any, kind: str) -> dict[str, nn.Module]:
    """The projections in the attentions of a model, by name.

    Args:
        kind: of PROJECTIONS.

    Raises:
        NsaError: an attention has them by other names, as one that makes queries, keys and values together.
    """
    found: dict[str, nn.Module] = {}
    attentions = {id(module) for module in student.attention_layers()}
    for name, module in student.named_modules():
        if id(module) not in attentions:
            continue
        parts = dict(module.named_children())
        if missing := [part for part in PROJECTIONS[kind] if part not in parts]:
            linear = [part for part, child in parts.items() if isinstance(child, nn.Linear)]
            raise NsaError(
                f"{name} has no {missing[0]}, but {', '.join(linear) or 'no linear layers'}: give their names in "
                "lora_targets with trains 'lora', or train all"
            )
        found |= {f"{name}.{part}": parts[part] for part in PROJECTIONS[kind]}
    return found
