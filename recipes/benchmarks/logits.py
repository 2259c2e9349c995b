"""How far a sparse model's logits are off, by compiling and by the kernels: what generate.py checks before it times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nsa_hf.releases import CACHE

from .common import relative_error
from .models import cut_back, select_these

COMPARED = 6  # steps
# A logit's error that is more than rounding. bf16 has 8 bits, and the layers' errors add up: with 36 layers it was .05
# where the same blocks are selected. What compiling may change is measured: no more than the last bit of one number
# in a token's embedding changes where it changes least. With 36 layers that was .06 to .09 on an H100, and .6 to .8
# wherever the first layer selected one other block: with random weights an embedding is small beside what the first
# attention adds to it.
WRONG = 0.1


class Errors(NamedTuple):
    """How far the logits of some steps are off, as a share of their norm.

    Attributes:
        compiled: those of `generate()`, which compiles, beside the same steps without compiling (see
            `generate.rounded_as_uncompiled`); the worst row of the worst step.
        kernels: those without compiling beside the reference attention, which is given the blocks that the kernels
            selected; the worst row of the worst step.
        one_bit: those of steps without compiling whose tokens' embeddings differ in the last bit of one number, as
            rounding may make it; the best row of the best step.
    """

    compiled: float
    kernels: float
    one_bit: float

    def __str__(self) -> str:
        by = f"{self.compiled:.3f} of their norm by compiling, {self.kernels:.3f} by the kernels, {self.one_bit:.3f}"
        return f"the logits are off by {by} at least where one bit of a token's embedding is another"

    @property
    def wrong(self) -> bool:
        """Whether compiling or the kernels change more than rounding does."""
        # NaN is wrong
        return not (self.compiled <= min(self.one_bit, WRONG) and self.kernels <= WRONG)


def with_another_bit(module: Any, arguments: Any, embedded: Tensor) -> Tensor:
    """A forward hook of an embedding, `[.., hidden]`: flips the last bit of each token's largest number."""
    place = embedded.abs().argmax(-1, keepdim=True)
    bits = embedded.gather(-1, place).view({2: torch.int16, 4: torch.int32}[embedded.element_size()])
    return embedded.scatter(-1, place, (bits ^ 1).view(embedded.dtype))


def check(model: Any, ids: Tensor, cache: Cache) -> Errors:
    """Takes COMPARED steps of a sparse model in four ways and compares their logits.

    Args:
        ids: the text, `[B, n]`.
        cache: holds at least all of `ids` but the last; the steps' keys and values stay in it.
    """
    past = ids.shape[1] - 1
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cut_back(cache, past)
    # the first step compresses all that the cache holds at once, which may round differently than step by step
    model(ids[:, past:], **{CACHE: cache}, use_cache=True)
    cut_back(cache, past)
    generated = model.generate(ids, **{CACHE: cache}, max_new_tokens=COMPARED, **options)
    new = generated.sequences[:, past:-1].split(1, dim=1)

    def logits(token: Tensor) -> Tensor:
        return model(token, **{CACHE: cache}, use_cache=True).logits[:, -1]

    cut_back(cache, past)
    plain, selected = [], []
    for token in new:
        with model.record_selection() as record:
            plain.append(logits(token))
        selected += [record[layer] for layer in sorted(record)]
    cut_back(cache, past)
    hook = model.get_input_embeddings().register_forward_hook(with_another_bit)
    try:
        close = [logits(token) for token in new]
    finally:
        hook.remove()
    cut_back(cache, past)
    try:
        model.set_attn_implementation("eager")
        with select_these(selected):
            truth = [logits(token) for token in new]
    finally:
        model.set_attn_implementation("nsa")
    compiled, kernels, one_bit = (row_errors(*x) for x in ((generated.logits, plain), (plain, truth), (close, plain)))
    # each NaN if any of them is
    return Errors(float(compiled.max()), float(kernels.max()), float(one_bit.min()))


def row_errors(steps: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """The relative error of every row of every step.

    Args:
        steps, expected: logits `[B, vocabulary]` of each step.
    """
    pairs = (pair for step in zip(steps, expected, strict=True) for pair in zip(*step, strict=True))
    return torch.tensor([relative_error(row, truth.double()) for row, truth in pairs])
