"""What a model selects and how open its gates are on a text: `nsa-hf inspect OUT --text FILE`, into OUT/inspect.json.

(Not `inspect.py`: a script started from this folder would get it in place of Python's own module.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from nsa_hf.attention import NsaAttentionMixin, gate_values
from nsa_hf.conversion.files.staging import write_json

from .load import check_finite, check_token_ids, load_nsa_model, load_tokenizer
from .training.data import held_out_documents, held_out_windows
from .training.folder import machine

NAME = "inspect.json"
BRANCHES = ("compressed", "selected", "window")
MAP_BINS = 64  # a map has at most this many rows and columns


def inspect_model(
    out: Path,
    text: tuple[str, str] | None = None,
    length: int = 2048,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Runs the model once over a text.

    Args:
        out: the model's folder.
        text: name and text; None takes a held-out one.
        length: tokens of the text that are read.
        device: where to run.
        trust_remote_code: run the code of its own that the tokenizer may have.

    Returns:
        The result, also written to `out`/inspect.json. `map[layer][head]` is a square matrix: of the queries of query
        block i (rows), the share that select key block j (columns). `gates[layer]` has the mean gate of each of
        `branches` over tokens and heads, `distance[layer]` how many blocks back the selections lie that are not forced.

    Raises:
        NsaError: the folder or the text is wrong.
    """
    model, tokenizer = load_nsa_model(out, device), load_tokenizer(out, trust_remote_code)
    named_text = text or held_out_documents("stdlib", 1)[0]
    name, ids = held_out_windows([named_text], tokenizer, length)[0]
    check_token_ids(model, ids)
    with torch.no_grad(), model.record_selection() as selection, record_gates(model) as gates:
        hidden = model.base_model(torch.tensor([ids], device=device), use_cache=False).last_hidden_state
    check_finite(hidden, out)
    config = model.config
    layers = sorted(selection)
    blocks = -(-length // config.nsa_block_size)
    branches = [0, 1, 2] if config.nsa_compression != "none" else [1, 2]
    maps = {layer: selection_map(selection[layer][0], blocks, config.nsa_block_size) for layer in layers}
    result = {
        "format": 1,
        "text": name,
        "length": length,
        "block_size": config.nsa_block_size,
        "topk": config.nsa_topk,
        "forced": {"init": config.nsa_init_blocks, "local": config.nsa_local_blocks},
        "blocks_per_bin": -(-blocks // MAP_BINS),
        "layers": layers,
        "branches": [BRANCHES[branch] for branch in branches],
        "gates": [[round(gates[layer][branch], 5) for branch in branches] for layer in layers],
        "distance": [by_distance(selection[layer][0], config) for layer in layers],
        "map": [[rounded(pool(head, MAP_BINS)) for head in maps[layer]] for layer in layers],
        **machine(),
    }
    write_json(out / NAME, result)
    return result


@contextmanager
def record_gates(model: Any) -> Iterator[dict[int, list[float]]]:
    """Within it a forward notes its gates.

    Yields:
        A dict that the forward fills: layer to the three branches' gates, means over tokens and heads.
    """
    means: dict[int, list[float]] = {}
    handles = []
    for module in model.modules():
        if isinstance(module, NsaAttentionMixin) and module.nsa is not None:

            def keep(gate: Any, inputs: Any, logits: Tensor, layer: int = module.layer_idx) -> None:
                # [B, T, Hq, 3]
                values = gate_values(logits, model.config.nsa_gate, model.config.nsa_gate_blend)
                means[layer] = values.flatten(0, -2).double().mean(0).tolist()

            handles.append(module.nsa.gate.register_forward_hook(keep))
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


def selection_map(selection: Tensor, blocks: int, block_size: int) -> Tensor:
    """The share of each query block's queries that select each key block.

    Args:
        selection: [T, Hk, topk] int, -1 for unused places.
        blocks: of the text.
        block_size: tokens of a block.

    Returns:
        [Hk, blocks, blocks] fp32, query blocks before key blocks.
    """
    tokens, heads, _ = selection.shape
    picked = torch.zeros(tokens, heads, blocks + 1)
    picked.scatter_(-1, selection.long().cpu().masked_fill(selection.cpu() < 0, blocks), 1.0)
    row = torch.arange(tokens) // block_size
    sums = torch.zeros(blocks, heads, blocks).index_add_(0, row, picked[..., :blocks])
    return (sums / torch.bincount(row, minlength=blocks)[:, None, None]).transpose(0, 1)


def by_distance(selection: Tensor, config: Any) -> dict[str, Any]:
    """How many blocks back the selections lie that are not forced.

    Counted for the queries that have a choice: those beyond the exact range.

    Args:
        selection: [T, Hk, topk] int, -1 for unused places.
        config: the model's.

    Returns:
        "share" of the selections that lie 1, 2-3, 4-7, ... blocks back (None where there are no selections), the first
        number of each as "from_blocks", and how many "selections" there are.
    """
    tokens = selection.shape[0]
    query_block = (torch.arange(tokens) // config.nsa_block_size)[:, None, None]
    key_block = selection.long().cpu()
    back = query_block - key_block
    has_choice = query_block >= config.nsa_topk
    back = back[(key_block >= config.nsa_init_blocks) & (back >= config.nsa_local_blocks) & has_choice]
    edges = [1]
    while edges[-1] * 2 < tokens / config.nsa_block_size:
        edges.append(edges[-1] * 2)
    counts = [int(((back >= edge) & (back < 2 * edge)).sum()) for edge in edges]
    total = sum(counts)
    shares = [round(count / total, 5) if total else None for count in counts]
    return {"from_blocks": edges, "share": shares, "selections": total}


def pool(matrix: Tensor, bins: int) -> Tensor:
    """A square matrix averaged to at most `bins` rows and columns."""
    size = matrix.shape[0]
    step = -(-size // bins)
    if step == 1:
        return matrix
    count = -(-size // step)
    index = torch.arange(size) // step
    weights = torch.zeros(count, size).index_put_((index, torch.arange(size)), torch.ones(size))
    weights /= weights.sum(1, keepdim=True)
    return weights @ matrix @ weights.T


def rounded(matrix: Tensor) -> list[list[float]]:
    """A matrix as lists, with three decimals."""
    return [[round(value, 3) for value in row] for row in matrix.tolist()]


def render_inspection(result: dict[str, Any]) -> Table:
    """A result of `inspect_model` as a table: gates, and how many blocks back selections lie, layer by layer."""
    text = f"{result['text']}, {result['length']:,} tokens"
    table = Table(title=f"{text}\nmean gates, and selections that are not forced by how many blocks they lie back")
    edges = result["distance"][0]["from_blocks"] if result["distance"] else []
    for heading in ("layer", *result["branches"], *(str(e) if e == 1 else f"{e}-{2 * e - 1}" for e in edges)):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, gates, distance in zip(result["layers"], result["gates"], result["distance"], strict=True):
        shares = ["-" if share is None else f"{share:.0%}" for share in distance["share"]]
        table.add_row(str(layer), *(f"{gate:.4f}" for gate in gates), *shares)
    return table
