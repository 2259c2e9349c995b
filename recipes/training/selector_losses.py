"""Losses of the compressed selector: its scores beside the dense attention's own weights, for some queries a layer.

What scores blocks is trained through nothing else, as the choice of blocks has no gradient. Queries and keys are taken
as they are; the gradient is that of the layer's `compress_k` alone. For R queries and S keys, R x S weights exist, of
one layer at a time and without gradients.

What a layer has attended with is kept without a gradient, and its entries are made again here. So the loss does not
depend on how the layer itself ran: under gradient checkpointing as without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_hf.kernels import Placement, Sizes, compress
from nsa_hf.kernels.reference import Positions, compressed_importance, find_positions, probabilities
from nsa_hf.modes import Attended

SMALLEST = 1e-9  # a score of nothing, whose logarithm is finite


class Blocks(NamedTuple):
    """The blocks of R queries, each counted from its row's or document's first.

    Attributes:
        scores: the selector's, `[B, Hk, R, blocks]`, with gradients.
        mass: the dense attention's weights, summed over a block's tokens and a group's heads, likewise.
        open: bool `[B or 1, 1, R, blocks]`: up for choice, neither forced nor behind the query.
    """

    scores: Tensor
    mass: Tensor
    open: Tensor


def sample_queries(tokens: int, exact_tokens: int, count: int, device: torch.device) -> Tensor:
    """Positions of queries that have a choice, int64 `[count or fewer]`, ascending: by PyTorch's random numbers.

    Args:
        tokens: of a window.
        exact_tokens: those up to which every block is selected.
        count: how many.
    """
    return (exact_tokens + torch.randperm(tokens - exact_tokens)[:count].sort().values).to(device)


def selector_loss(attended: Attended, compressor: Any, sizes: Sizes, rows: Tensor, kind: str) -> Tensor:
    """The loss of one layer's selector, a float32 scalar.

    Args:
        attended: what the layer has attended with.
        compressor: its `compress_k`.
        sizes: the model's.
        rows: int64 `[R]`, positions of the queries that are looked at.
        kind: 'kl', of the mass to the scores, both as shares of all blocks that are up for choice; 'bce', whether a
            block is among those with most mass, of how far its score is from the selection's threshold.
    """
    with torch.autocast(rows.device.type, enabled=False):
        blocks = score_blocks(attended, compressor, sizes, rows)
        choices = sizes.topk - sizes.init_blocks - sizes.local_blocks
        has_choice = (blocks.open.sum(-1) > choices).expand(blocks.mass.shape[:-1])
        losses = kl_of_mass(blocks) if kind == "kl" else bce_of_top_blocks(blocks, choices)
        return losses.masked_fill(~has_choice, 0).sum() / has_choice.sum().clamp(min=1)


def kl_of_mass(blocks: Blocks) -> Tensor:
    """KL(mass || scores) `[B, Hk, R]`."""
    mass, scores = (share(x, blocks.open) for x in (blocks.mass, blocks.scores))
    return (mass * (mass.clamp(min=SMALLEST).log() - scores.clamp(min=SMALLEST).log())).sum(-1)


def bce_of_top_blocks(blocks: Blocks, choices: int) -> Tensor:
    """Binary cross-entropy `[B, Hk, R]`, mean over the blocks that are up for choice.

    Args:
        choices: how many of them a query selects.
    """
    if choices < 1 or choices >= blocks.mass.shape[-1]:
        return blocks.scores.sum(-1) * 0
    masked = [x.masked_fill(~blocks.open, -1) for x in (blocks.mass, blocks.scores.detach())]
    top = torch.zeros_like(blocks.mass).scatter_(-1, masked[0].topk(choices, dim=-1).indices, 1.0)
    # halfway between the last score that is selected and the first that is not
    nearest = masked[1].topk(choices + 1, dim=-1).values[..., -2:].clamp(min=SMALLEST).log()
    logits = blocks.scores.clamp(min=SMALLEST).log() - nearest.mean(-1, keepdim=True)
    losses = F.binary_cross_entropy_with_logits(logits, top, reduction="none").masked_fill(~blocks.open, 0)
    return losses.sum(-1) / blocks.open.sum(-1).clamp(min=1)


def share(values: Tensor, among: Tensor) -> Tensor:
    """Values as shares of the sum of those among which they are, 0 for the others."""
    values = values.masked_fill(~among, 0)
    return values / values.sum(-1, keepdim=True).clamp(min=SMALLEST)


def score_blocks(attended: Attended, compressor: Any, sizes: Sizes, rows: Tensor) -> Blocks:
    """Scores and mass of the blocks before some queries (see `selector_loss` for the arguments)."""
    segments, keys = attended.segments, attended.key.shape[2]
    sizes = sizes.within(keys)
    where: dict[str, Any] = {"starts": segments.starts, "cu_seqlens": segments.cu_seqlens}
    # [B, N, Hk, D]
    entries = compress(attended.compressed_key.float().transpose(1, 2), compressor, sizes.kernel_stride, **where)
    found = find_positions(keys, keys, entries.shape[1], sizes, Placement(**where), rows.device)
    document_block = None if found.document_block is None else found.document_block[rows]
    position, start = found.query[:, rows], found.query_start[:, rows]
    found = Positions(position, start, found.key_start, found.block_first, document_block)
    # [B, Hk, G, R, D]
    query = attended.query[:, :, rows].float() * attended.scale
    query = query.unflatten(1, (attended.key.shape[1], -1))
    first = found.block_first[:, None, :]
    visible = (first >= start[..., None]) & (first + sizes.kernel_size - 1 <= position[..., None])
    entries = entries.transpose(1, 2)
    shares = probabilities(query, entries, visible[:, None])
    count = -(-keys // sizes.block_size)
    scores = compressed_importance(shares, found, (0, len(rows)), count, sizes)
    own = (position - start) // sizes.block_size
    block = torch.arange(count, device=rows.device)
    is_open = (block >= sizes.init_blocks) & (block <= (own - sizes.local_blocks)[..., None])
    return Blocks(scores, dense_mass(query, attended.key, found, count, sizes.block_size), is_open[:, None])


@torch.no_grad()
def dense_mass(query: Tensor, key: Tensor, found: Positions, count: int, block_size: int) -> Tensor:
    """The dense attention's weights a block, summed over a group's heads, `[B, Hk, R, count]`.

    Args:
        query: `[B, Hk, G, R, D]`, scaled.
        key: `[B, Hk, S, D]`.
        found: the positions of these queries and of all keys.
    """
    place = torch.arange(key.shape[2], device=key.device)
    seen = (place >= found.query_start[..., None]) & (place <= found.query[..., None])
    key = key.float()
    mass: Any = 0
    for head in query.unbind(2):
        logits = (head @ key.transpose(-1, -2)).masked_fill(~seen[:, None], float("-inf"))
        mass = mass + logits.softmax(-1)
    block = ((place - found.key_start).clamp(min=0) // block_size)[:, None, None, :].expand_as(mass)
    return torch.zeros(*mass.shape[:-1], count, device=key.device).scatter_add_(-1, block, mass)
