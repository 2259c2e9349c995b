"""How well blocks are chosen: beside the dense attention of the same queries and keys, layer by layer.

For some queries of each layer the dense attention's probabilities are computed, never those of all. The *oracle* takes
the blocks with the most of them; the first and the local blocks are taken by both, and the rest is up for choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa_hf.modes import Attended

from ..terminal import track
from ..training.data import Window

QUERIES = 64  # of each text and layer
TEXTS = 8  # at most


@torch.no_grad()
def recall_by_layer(model: Any, windows: Sequence[Window], queries: int = QUERIES) -> list[dict[str, Any]]:
    """Runs the sparse model over texts and compares what is selected with what dense attention looks at.

    Args:
        model: the sparse model.
        windows: name and token ids of each text; the first of them are read.
        queries: how many queries of each text, spread over those that have a choice.

    Returns:
        For each sparse layer, means over queries, KV heads and texts: `recall`, the share of the oracle's blocks (of
        those up for choice) that are selected; `captured`, the share of the dense attention's probability that lies in
        the selected blocks; `oracle`, the share in the oracle's. None where no query has a choice.
    """
    config = model.config
    sums: dict[int, list[Tensor]] = defaultdict(list)
    for _, ids in track(windows[:TEXTS], "Recall"):
        if len(ids) <= config.nsa_sizes.exact_tokens:
            continue
        rows = torch.linspace(config.nsa_sizes.exact_tokens, len(ids) - 1, queries).long().unique().to(model.device)
        keep = partial(mass_by_block, rows=rows, block_size=config.nsa_block_size)
        with model.record_attention(keep) as masses, model.record_selection() as selection:
            model.base_model(torch.tensor([ids], device=model.device), use_cache=False)
        for layer, blocks in selection.items():
            sums[layer].append(compare_blocks(masses[layer], blocks[0, rows], rows, config))
    return [
        dict(zip(("layer", "recall", "captured", "oracle"), (layer, *figures(sums[layer])), strict=True))
        for layer in sorted(sums)
    ]


def figures(parts: list[Tensor]) -> list[float | None]:
    """Sums of `compare_blocks` as recall and the two shares."""
    hits, wanted, captured, oracle, pairs = torch.stack(parts).sum(0).tolist()
    return [hits / wanted if wanted else None, captured / pairs, oracle / pairs]


def mass_by_block(attended: Attended, rows: Tensor, block_size: int) -> Tensor:
    """Dense attention's probability in each block, the mean over a group's heads: `[R, Hk, blocks]` fp32.

    Args:
        attended: of one row.
        rows: `[R]` int64, positions.
        block_size: tokens of a block.
    """
    query, key = attended.query[0, :, rows], attended.key[0]
    heads, tokens, _ = key.shape
    future = torch.arange(tokens, device=key.device) > rows[:, None]
    masses = []
    for head, of_group in zip(key.float(), query.float().unflatten(0, (heads, -1)), strict=True):
        # [G, R, T]
        logits = (of_group @ head.T).mul_(attended.scale).masked_fill_(future, -torch.inf)
        mass = torch.nn.functional.pad(logits.softmax(-1).mean(0), (0, -tokens % block_size))
        masses.append(mass.unflatten(-1, (-1, block_size)).sum(-1))
    return torch.stack(masses, 1)


def compare_blocks(mass: Tensor, selected: Tensor, rows: Tensor, config: Any) -> Tensor:
    """What is selected beside the oracle.

    Args:
        mass: `[R, Hk, blocks]`, see `mass_by_block`.
        selected: `[R, Hk, topk]` int, -1 for unused places.
        rows: `[R]` int64, positions.
        config: the model's.

    Returns:
        `[5]` fp64 sums over queries and KV heads: the oracle's blocks that are selected, the oracle's blocks (both of
        those up for choice), the mass in the selected blocks, the mass in the oracle's, and the number of pairs.
    """
    blocks = mass.shape[-1]
    block, own = torch.arange(blocks, device=mass.device), (rows // config.nsa_block_size)[:, None, None]
    forced = ((block < config.nsa_init_blocks) | (own - block < config.nsa_local_blocks)) & (block <= own)
    chosen = torch.zeros(*mass.shape[:-1], blocks + 1, device=mass.device, dtype=torch.bool)
    chosen = chosen.scatter(-1, selected.long().masked_fill(selected < 0, blocks), True)[..., :blocks]
    order = mass.masked_fill(forced, torch.inf).masked_fill(block > own, -1)
    best = torch.zeros_like(chosen).scatter(-1, order.topk(min(config.nsa_topk, blocks), -1).indices, True)
    wanted = best & ~forced
    counts = [(wanted & chosen).sum(), wanted.sum(), (mass * chosen).sum(), (mass * best).sum()]
    return torch.stack([*counts, torch.full_like(counts[0], mass[..., 0].numel())]).double()
