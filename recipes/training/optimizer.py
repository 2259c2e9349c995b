"""AdamW with separate rates for the backbone and the NSA parameters, and how the rates change over a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import RunConfig


def make_optimizer(student: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained, in groups `nsa`, `backbone` (matrices, which alone decay) and `backbone_vectors`.

    Each group has its highest rate as "peak".
    """
    groups: dict[str, list[nn.Parameter]] = {"nsa": [], "backbone": [], "backbone_vectors": []}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            kind = "nsa" if ".nsa." in name else "backbone" if parameter.dim() > 1 else "backbone_vectors"
            groups[kind].append(parameter)
    rates = {"nsa": config.lr_nsa or 0.0, "backbone": config.lr_backbone, "backbone_vectors": config.lr_backbone}
    decays = {"nsa": 0.0, "backbone": config.weight_decay, "backbone_vectors": 0.0}
    return torch.optim.AdamW(
        [
            {"params": members, "name": kind, "lr": rates[kind], "peak": rates[kind], "weight_decay": decays[kind]}
            for kind, members in groups.items()
            if members
        ],
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=all(p.is_cuda for members in groups.values() for p in members),
    )


def rate_factor(step: int, config: RunConfig) -> float:
    """The share of the peak rate at `step` (from 0): linear warmup, then down to `min_lr_ratio` at the last step.

    `cosine` falls from the end of the warmup on, `wsd` (warmup, stable, decay) linearly in the last `decay_share`.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    first = config.warmup_steps
    if config.schedule == "wsd":
        first = max(first, config.steps - 1 - round(config.decay_share * config.steps))
    progress = min(1.0, max(0, step - first) / max(1, config.steps - 1 - first))
    height = 1 - progress if config.schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * height


def set_rates(optimizer: Any, step: int, config: RunConfig) -> dict[str, float]:
    """Sets the optimizer's rates of a step.

    Args:
        optimizer: of `make_optimizer`.
        step: counted from 0; the rates depend on nothing else but the settings.

    Returns:
        The rates, as "lr_nsa" and "lr_backbone".
    """
    factor = rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return {"lr_nsa": (config.lr_nsa or 0.0) * factor, "lr_backbone": config.lr_backbone * factor}
