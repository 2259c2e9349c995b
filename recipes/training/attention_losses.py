"""Losses that look at each attention by itself: its output beside the teacher's, and its selector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_hf.modes import Attended

from .config import RunConfig
from .losses import LossModel
from .selector_losses import sample_queries, selector_loss


class AttentionLosses(NamedTuple):
    """Float32 scalars.

    Attributes:
        total: the weighted sum, which alone has gradients.
        ce, kl: as of `Losses`.
        layer: error of each sparse attention's output beside the teacher's, relative to its size; mean over layers.
        selector: of `selector_loss`, mean over layers.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    layer: Tensor
    selector: Tensor


def loss_model(student: Any, teacher: Any | None, stage: RunConfig) -> LossModel:
    """The student with the losses of a stage."""
    weights: dict[str, Any] = {"ce_weight": stage.ce_weight, "kl_weight": stage.kl_weight, "chunk": stage.loss_chunk}
    needed = teacher if stage.kl_weight or stage.layer_weight else None
    if stage.layer_weight or stage.selector_weight:
        return AttentionLossModel(student, needed, stage=stage, **weights)
    return LossModel(student, needed, **weights)


class AttentionLossModel(LossModel):
    """A `LossModel` with losses of each attention besides."""

    def __init__(self, student: Any, teacher: Any | None, *, stage: RunConfig, **more: Any):
        """See `LossModel`; `stage` has the weights."""
        super().__init__(student, teacher, **more)
        self.stage = stage

    def forward(  # type: ignore[override]  # its fields are those of `Losses` and two more
        self, input_ids: Tensor, position_ids: Tensor | None = None
    ) -> AttentionLosses:
        """The losses of a batch, see `LossModel`."""
        stage, student = self.stage, self.student
        outputs: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        attended: dict[int, Attended] = {}
        with ExitStack() as recording:
            if stage.layer_weight:
                outputs, targets = (recording.enter_context(attention_outputs(m)) for m in (student, *self.teachers))
            if stage.selector_weight:
                attended = recording.enter_context(student.record_attention())
            losses = super().forward(input_ids, position_ids)
        layer = selector = torch.zeros((), device=input_ids.device)
        if stage.layer_weight:
            layer = torch.stack([relative_error(outputs[name], targets[name]) for name in outputs]).mean()
        sizes = student.config.nsa_sizes
        # in a shorter window every query selects every block
        if stage.selector_weight and input_ids.shape[1] > sizes.exact_tokens:
            rows = sample_queries(input_ids.shape[1], sizes.exact_tokens, stage.selector_queries, input_ids.device)
            compressors = {module.layer_idx: module.nsa.compress_k for module in sparse_layers(student).values()}
            each = [selector_loss(attended[i], compressors[i], sizes, rows, stage.selector_loss) for i in attended]
            selector = torch.stack(each).mean()
        total = losses.total + stage.layer_weight * layer + stage.selector_weight * selector
        return AttentionLosses(total, losses.ce, losses.kl, layer, selector)


def sparse_layers(model: Any) -> dict[str, Any]:
    """The sparse attentions of a model by name."""
    chosen = {id(module) for module in model.attention_layers() if module.nsa is not None}
    return {name: module for name, module in model.named_modules() if id(module) in chosen}


@contextmanager
def attention_outputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Gives a dict that forwards inside the block fill: a sparse attention's name to its output `[B, T, hidden]`.

    What gradient checkpointing computes again, in the backward pass behind the block, is not noted. The outputs of the
    first pass have their gradients all the same, as long as it is the kind of checkpointing that does not forbid them
    there (`use_reentrant=False`).
    """
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in sparse_layers(model).items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of an output `[B, T, D]` as a share of its target's squares, a float32 scalar."""
    target = target.detach().float()
    return (output.float() - target).square().sum() / target.square().sum().clamp(min=1e-12)
