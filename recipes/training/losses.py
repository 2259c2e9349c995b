"""Next-token loss and KL to a teacher, without a [tokens, vocabulary] matrix.

Hidden states are kept; logits exist for `chunk` positions at a time and are computed again in the backward pass. At
2,048 tokens and a vocabulary of 49,152, whole fp32 logits of both models with their softmaxes and gradients would take
about 2 GB; chunks of 256 take an eighth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a label that counts nowhere, as everywhere in Transformers
Head = Callable[[Tensor], Tensor]


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


def chunked_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """Mean next-token loss and mean KL(teacher || student), as of whole logits but for the order of additions.

    Args:
        hidden: the student's final hidden states at the positions that predict the labels, [B, T, D].
        head: maps [n, D] to logits [n, V].
        labels: the next tokens (already shifted), [B, T] int64; IGNORED counts nowhere.
        teacher_hidden: the teacher's hidden states, [B, T, D'].
        teacher_head: maps [n, D'] to logits [n, V].
        chunk: positions whose logits exist at a time.

    Returns:
        Both means over the counted positions, in nats. Gradients reach `hidden` and the parameters of `head`.

    Raises:
        ValueError: the shapes do not fit.
    """
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together: give both or neither")
    for name, states in (("hidden", hidden), ("teacher_hidden", teacher_hidden)):
        if states is not None and states.shape[:-1] != labels.shape:
            raise ValueError(f"{name} must be [*labels.shape, D], got {tuple(states.shape)} and {tuple(labels.shape)}")

    def sums(student: Tensor, teacher: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        teacher_logits = None
        if teacher is not None and teacher_head is not None:
            with torch.no_grad():
                teacher_logits = teacher_head(teacher)
        return loss_sums(head(student), teacher_logits, targets)

    students = hidden.flatten(0, -2).split(chunk)
    teachers: Any = [None] * len(students)
    if teacher_hidden is not None:
        teachers = teacher_hidden.flatten(0, -2).split(chunk)
    nll = kl = torch.zeros((), device=hidden.device)
    for student, teacher, targets in zip(students, teachers, labels.flatten().split(chunk), strict=True):
        chunk_nll, chunk_kl = checkpoint(sums, student, teacher, targets, use_reentrant=False)
        nll, kl = nll + chunk_nll, kl + chunk_kl
    counted = (labels != IGNORED).sum().clamp(min=1)
    return nll / counted, kl / counted


class LossModel(nn.Module):
    """A student with its two losses, as Accelerate prepares it.

    The teacher is in a list, so that it is no part of this module: it is neither trained nor wrapped nor saved.

    Attributes:
        student: the sparse model.
        teachers: the teacher, or nothing.
        chunk: positions whose logits exist at a time.
    """

    def __init__(self, student: Any, teacher: Any | None, chunk: int):
        super().__init__()
        self.student, self.chunk = student, chunk
        self.teachers = [teacher] if teacher is not None else []

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean next-token loss and mean KL(teacher || student) of a batch, in nats.

        Args:
            input_ids: [B, T] int64.
        """
        teacher_side: dict[str, Any] = {}
        for teacher in self.teachers:
            with torch.no_grad(), teacher.dense_attention():
                hidden = teacher.base_model(input_ids, use_cache=False).last_hidden_state[:, :-1]
            teacher_side = {"teacher_hidden": hidden, "teacher_head": lambda part, t=teacher: output_logits(t, part)}
        hidden = self.student.base_model(input_ids, use_cache=False).last_hidden_state[:, :-1]
        head = lambda part: output_logits(self.student, part)  # noqa: E731
        return chunked_losses(hidden, head, input_ids[:, 1:], chunk=self.chunk, **teacher_side)
