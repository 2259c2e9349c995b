"""Next-token loss and KL to a teacher, without a [tokens, vocabulary] matrix.

Logits exist for one chunk of positions at a time: a chunk's losses and their gradients are computed together, and of
both only the gradients of the hidden states and of the output layer are kept. So nothing is computed a second time in
the backward pass. On a GPU what is between logits and losses is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a label that counts nowhere, as everywhere in Transformers
CHUNK_LOGITS = 1 << 28  # logits of a chunk on a GPU: 512 MiB in bfloat16
CPU_CHUNK = 256  # positions of a chunk on a CPU
Head = Callable[[Tensor], Tensor]


class Losses(NamedTuple):
    """Means over the counted positions, float32 scalars in nats.

    Attributes:
        total: the weighted sum, which alone has gradients.
        ce: next-token loss.
        kl: KL(teacher || student); 0 without a teacher.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor


def output_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [..., V] of a causal LM from its final hidden states [..., D], scaled and capped as the family does."""
    config = model.config
    output = model.get_output_embeddings()
    if getattr(model, "lm_head", output) is not output:  # ModernBERT: one more layer in front
        hidden = model.lm_head(hidden)
    logits = output(hidden)
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


def head_parameters(model: Any) -> list[nn.Parameter]:
    """The trained parameters of what `output_logits` applies."""
    output = model.get_output_embeddings()
    modules = {id(module): module for module in (output, getattr(model, "lm_head", output))}.values()
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(parameters.values())


def loss_sums(logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The two losses of some positions, summed over those that are counted.

    Args:
        logits: the student's, [N, V] of any float dtype.
        teacher_logits: the teacher's, likewise; or None.
        labels: [N] int64; IGNORED counts nowhere.

    Returns:
        The sums of -log p(label) and of KL(teacher || student) = sum_v t_v (log t_v - log s_v), fp32 scalars; the
        second is 0 without a teacher.
    """
    log_student = F.log_softmax(logits.float(), dim=-1)
    nll = F.nll_loss(log_student, labels, ignore_index=IGNORED, reduction="sum")
    if teacher_logits is None:
        return nll, nll.new_zeros(())
    log_teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    # [N]
    kl = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)
    return nll, kl.masked_fill(labels == IGNORED, 0.0).sum()


class ChunkedLosses(torch.autograd.Function):
    """`chunked_losses` of flat positions; its forward computes the gradients too, where somebody wants them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        teacher: tuple[Tensor, Head] | None,
        labels: Tensor,
        weights: tuple[float, float],
        chunk: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        hidden_grad = torch.empty(hidden.shape, dtype=precise, device=hidden.device) if wanted else None
        grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        ce = kl = torch.zeros((), device=hidden.device)
        for places in chunks(len(hidden), chunk):
            teacher_logits = None if teacher is None else teacher[1](teacher[0][places])
            with torch.set_grad_enabled(wanted):
                part = hidden[places].detach().requires_grad_(wanted)
                part_ce, part_kl = sums_on(hidden.device)(head(part), teacher_logits, labels[places])
                total = weights[0] * part_ce + weights[1] * part_kl
            ce, kl = ce + part_ce.detach(), kl + part_kl.detach()
            if hidden_grad is not None:
                part_grad, *parameter_grads = torch.autograd.grad(total, (part, *parameters))
                hidden_grad[places] = part_grad
                for grad, more in zip(grads, parameter_grads, strict=True):
                    grad += more
        counted = (labels != IGNORED).sum().clamp(min=1)
        ctx.dtypes = [hidden.dtype, *(p.dtype for p in parameters)]
        ctx.save_for_backward(counted, *([] if hidden_grad is None else [hidden_grad, *grads]))
        ce, kl = ce / counted, kl / counted
        ctx.mark_non_differentiable(ce, kl)
        return weights[0] * ce + weights[1] * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        counted, *grads = ctx.saved_tensors
        # in the gradients' own precision: with fp16 `total_grad` holds the loss scale, without which they vanish
        scale = total_grad / counted
        hidden_grad, *parameter_grads = (
            (grad * scale).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return hidden_grad, None, None, None, None, None, *parameter_grads


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` places."""
    return (slice(first, first + size) for first in range(0, count, size))


def sums_on(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """`loss_sums`, compiled where that is worth it."""
    return COMPILED_SUMS if device.type == "cuda" else loss_sums


COMPILED_SUMS = torch.compile(loss_sums, dynamic=False)


def chunked_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    parameters: Sequence[Tensor] = (),
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    chunk: int = CPU_CHUNK,
) -> Losses:
    """Mean next-token loss and mean KL(teacher || student), as of whole logits but for the order of additions.

    Args:
        hidden: the student's final hidden states at the positions that predict the labels, [B, T, D].
        head: maps [n, D] to logits [n, V].
        labels: the next tokens (already shifted), [B, T] int64; IGNORED counts nowhere.
        parameters: those of `head` that get gradients.
        teacher_hidden: the teacher's hidden states, [B, T, D'].
        teacher_head: maps [n, D'] to logits [n, V].
        ce_weight, kl_weight: of the two losses in the total.
        chunk: positions whose logits exist at a time.

    Returns:
        Both means, and the total, from which gradients reach `hidden` and `parameters`.

    Raises:
        ValueError: the shapes do not fit.
    """
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together: give both or neither")
    for name, states in (("hidden", hidden), ("teacher_hidden", teacher_hidden)):
        if states is not None and states.shape[:-1] != labels.shape:
            raise ValueError(f"{name} must be [*labels.shape, D], got {tuple(states.shape)} and {tuple(labels.shape)}")
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = (teacher_hidden.flatten(0, -2), teacher_head)
    weights = (ce_weight, kl_weight)
    return Losses(
        *ChunkedLosses.apply(hidden.flatten(0, -2), head, teacher, labels.flatten(), weights, chunk, *parameters)
    )


class LossModel(nn.Module):
    """A student with its losses, as Accelerate prepares it.

    The teacher is in a list, so that it is no part of this module: it is neither trained nor wrapped nor saved.

    Attributes:
        student: the sparse model.
        teachers: the teacher, or nothing.
        ce_weight, kl_weight: of the two losses in the total.
        chunk: positions whose logits exist at a time; 0: as many as suit the device.
    """

    def __init__(self, student: Any, teacher: Any | None, *, ce_weight: float, kl_weight: float, chunk: int = 0):
        super().__init__()
        self.student, self.ce_weight, self.kl_weight, self.chunk = student, ce_weight, kl_weight, chunk
        self.teachers = [teacher] if teacher is not None else []

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Losses:
        """The losses of a batch.

        Args:
            input_ids: [B, T] int64.
            position_ids: [B, T] int64, of packed rows: each document's begin with 0. What follows a document's end is
                not predicted from it.
        """
        labels = input_ids[:, 1:]
        if position_ids is not None:
            labels = labels.masked_fill(position_ids[:, 1:] == 0, IGNORED)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        teacher_side: dict[str, Any] = {}
        for teacher in self.teachers:
            with torch.no_grad(), teacher.dense_attention():
                hidden = teacher.base_model(**inputs).last_hidden_state[:, :-1]
            teacher_side = {"teacher_hidden": hidden, "teacher_head": lambda part, t=teacher: output_logits(t, part)}
        hidden = self.student.base_model(**inputs).last_hidden_state[:, :-1]
        return chunked_losses(
            hidden,
            lambda part: output_logits(self.student, part),
            labels,
            parameters=head_parameters(self.student),
            ce_weight=self.ce_weight,
            kl_weight=self.kl_weight,
            chunk=self.chunk or chunk_for(self.student, input_ids.device),
            **teacher_side,
        )


def chunk_for(model: Any, device: torch.device) -> int:
    """How many positions' logits exist at a time."""
    return CPU_CHUNK if device.type == "cpu" else max(CPU_CHUNK, CHUNK_LOGITS // model.config.vocab_size)
