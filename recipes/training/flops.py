"""How much arithmetic a training step is, and what share of the GPU's peak that makes (MFU).

What the sparse operation really multiplies is counted, not what dense attention would; nor is what gradient
checkpointing computes a second time. As usual only matrix products count.
"""

from __future__ import annotations

from typing import Any

import torch

from nsa_hf.attention import NsaAttentionMixin
from nsa_hf.conversion.costs import Scoring, read_tokens_of_text, scoring_of
from nsa_hf.features import head_sizes

# Dense bfloat16 FLOP/s by a part of the GPU's name, as its maker states them.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}
BACKWARD = 2.5  # of attention's backward pass, in its forwards: five products instead of two


def training_flops(student: Any, length: int, *, teacher: bool, dense: bool = False) -> float:
    """FLOPs of one token of a training step.

    Args:
        student: the sparse model; what is frozen of it needs no gradient.
        length: tokens of a row.
        teacher: whether the same model runs dense beside it.
        dense: whether the student runs dense too.
    """
    all_weights, trained_weights = matrix_weights(student, trained=False), matrix_weights(student, trained=True)
    # forward, gradients of the activations, and gradients of what is trained
    flops = 4.0 * all_weights + 2.0 * trained_weights
    flops += attention_flops(student, length, dense=dense, backward=True) / length
    if teacher:
        flops += 2.0 * all_weights + attention_flops(student, length, dense=True, backward=False) / length
    return flops


def matrix_weights(model: Any, *, trained: bool) -> float:
    """Weights that a token is multiplied with: those of linear layers, and of the experts that it is sent to.

    Args:
        model: a causal language model.
        trained: only those that get a gradient.
    """
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    weights = 0.0
    for name, parameter in model.named_parameters():
        looked_up = embeddings is not None and parameter is embeddings.weight
        if parameter.dim() < 2 or (trained and not parameter.requires_grad):
            continue
        if looked_up and not (output is not None and output.weight is parameter):
            continue
        weights += parameter.numel() * (share if ".experts." in name else 1.0)
    return weights


def attention_flops(model: Any, length: int, *, dense: bool, backward: bool) -> float:
    """FLOPs of all attention layers for a row of `length` tokens."""
    config = model.config
    sizes, scoring = config.nsa_sizes, scoring_of(config)
    index = Scoring(entries=False, index_share=scoring.index_share)
    nothing_else = read_tokens_of_text(sizes, length, Scoring(entries=False))
    flops = 0.0
    for attention in model.attention_layers():
        pair = pair_flops(attention)
        if attention.window is not None or dense or attention.nsa is None:
            window = min(length, attention.window or length)
            read, scored = window * (window + 1) / 2 + (length - window) * window, 0.0
        else:
            scored = read_tokens_of_text(sizes, length, index) - nothing_else  # by an index, without a gradient
            read = read_tokens_of_text(sizes, length, scoring) - scored
        flops += pair * (read * (1 + BACKWARD * backward) + scored)
    return flops


def pair_flops(attention: NsaAttentionMixin) -> float:
    """FLOPs of one query token and one key token, over a layer's heads."""
    heads, key_size, value_size = head_sizes(attention, attention.model_config)
    return 2.0 * heads * (key_size + value_size)


def peak_flops(device: torch.device) -> float | None:
    """A GPU's peak in dense bfloat16 FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
