"""What the tests of generation share: texts, lengths around every border, a text given to a cache in steps."""

from __future__ import annotations

import torch

from nsa_hf.releases import CACHE

# With the sizes of `conftest.TINY_SIZES`, longer than any border: kernel and stride 8 and 4, blocks of 16, a window of
# 24, and 64 tokens selected.
LENGTH = 150
BORDERS = sorted({size + step for size in (1, 4, 8, 16, 24, 64) for step in (-1, 0, 1)} - {0})
GREEDY = {"do_sample": False, "eos_token_id": None}


def tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(5))


def in_steps(model, x, steps, cache, **inputs) -> torch.Tensor:
    """The logits of `x` given to `cache` in pieces of these lengths."""
    logits, done = [], 0
    for step in steps:
        now = slice(done, done + step)
        given = {
            name: value[:, now] if name == "position_ids" else value[:, : done + step] for name, value in inputs.items()
        }
        logits.append(model(x[:, now], **{CACHE: cache}, use_cache=True, **given).logits)
        done += step
    return torch.cat(logits, dim=1)


def left_padded(x: torch.Tensor, starts: list[int]) -> dict[str, torch.Tensor]:
    """The mask and positions of rows whose first `starts` tokens are padding."""
    mask = torch.ones_like(x)
    for row, start in enumerate(starts):
        mask[row, :start] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@torch.no_grad()
def check_dense_prefill(model, caches, names) -> None:
    """A text begun dense and continued sparse leaves in the first layer's cache what a sparse pass does.

    Its keys do not depend on attention.

    Args:
        caches: two, both empty.
        names: of what that layer's cache keeps.
    """
    x, (cache, fresh) = tokens(1), caches
    with model.dense_attention():
        model(x[:, :100], **{CACHE: cache})
    model(x[:, 100:], **{CACHE: cache})
    model(x, **{CACHE: fresh})
    for name in names:
        torch.testing.assert_close(getattr(cache.layers[0], name), getattr(fresh.layers[0], name))
