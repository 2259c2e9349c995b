"""What attention costs, dense and sparse: bytes of the cache, and the length from which sparse attention is cheaper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from nsa_hf.kernels import Sizes, n_blocks


@dataclass(frozen=True)
class Scoring:
    """What a query reads beside its selected blocks and its window.

    Attributes:
        entries: whether the compressed entries.
        index_share: of the work with every past token's key and value, the part that an index is.
    """

    entries: bool = True
    index_share: float = 0.0


PAPER = Scoring()


def scoring_of(config: PreTrainedConfig) -> Scoring:
    """What the queries of a converted model read to score blocks, and in the compressed branch."""
    share = index_channels(config) / (2 * head_size(config))
    return Scoring(config.nsa_compression != "none", share)


def index_channels(config: PreTrainedConfig) -> int:
    """How many channels of a head an index reads; 0 where there is none."""
    return config.nsa_selector_dim or 0 if config.nsa_selector == "channels" else 0


def index_bytes(config: PreTrainedConfig) -> int:
    """Bytes of the index's key of one token and head, in 8 bits with its scale."""
    channels = index_channels(config)
    if channels and config.nsa_selector_bits == 8:
        return channels + 2
    return channels * config.dtype.itemsize


def kv_head_count(config: PreTrainedConfig) -> int:
    """Heads of keys and values."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_size(config: PreTrainedConfig) -> int:
    """Numbers of one key of one head."""
    size = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def read_tokens(sizes: Sizes, length: int, scoring: Scoring = PAPER) -> float:
    """How many keys and values one query of a sparse layer reads.

    They are the compressed entries (about S/d), the selected blocks' min(S, n*l') tokens, the window's min(S, w) and an
    index's part of all S.

    Args:
        sizes: of sparse attention: d is its `kernel_stride`, n its `topk`, l' its `block_size`, w its `window_size`.
        length: S, the number of tokens up to the query, its own counted.
        scoring: what is read beside selected blocks and window.
    """
    selected = min(length, sizes.exact_tokens)
    entries = n_blocks(length, sizes.kernel_size, sizes.kernel_stride) if scoring.entries else 0
    return entries + selected + min(length, sizes.window_size) + scoring.index_share * length


def kv_cache(config: PreTrainedConfig, layers: Iterable[dict[str, Any]], length: int) -> dict[str, Any]:
    """Bytes of the cache of one sequence: how many are kept, and read for one more token.

    Args:
        config: the converted model's.
        layers: what `plan` says of each.
        length: tokens in the cache.

    Returns:
        See `kv_cache` in what `plan` returns.
    """
    sizes, entries_alone = config.nsa_sizes, Scoring(config.nsa_compression != "none")
    heads = kv_head_count(config)
    # of one token in one layer
    key_value_bytes = 2 * heads * head_size(config) * config.dtype.itemsize
    layers = list(layers)
    sparse_layers = sum(layer["becomes"] == "nsa" for layer in layers)
    index = sparse_layers * length * heads * index_bytes(config)
    entries = n_blocks(length, sizes.kernel_size, sizes.kernel_stride) if entries_alone.entries else 0
    added = sparse_layers * entries
    if config.nsa_branch_kv == "independent":
        # the tokens that the next entry will need, and the window's
        added += sparse_layers * (length - entries * sizes.kernel_stride + min(length, sizes.window_size))
    dense = sum(length if layer["keeps"] is None else min(length, layer["keeps"]) for layer in layers)
    read = dense + sparse_layers * (int(read_tokens(sizes, length, entries_alone)) - length)
    read_bytes = read * key_value_bytes + index
    return {
        "length": length,
        "dense_bytes": dense * key_value_bytes,
        "nsa_bytes": (dense + added) * key_value_bytes + index,
        "dense_read_bytes": dense * key_value_bytes,
        "nsa_read_bytes": read_bytes,
        "read_less": dense * key_value_bytes / read_bytes,
    }


def pays_from(sizes: Sizes, scoring: Scoring = PAPER) -> dict[str, Any]:
    """From which length a sparse layer's attention takes fewer FLOPs than a dense one's.

    Both cost the same for a query head and a key that it reads, so these are counted: S for dense attention,
    `read_tokens` for sparse. The gate and the compression come on top; they do not grow with the length.

    Args:
        sizes: of sparse attention.
        scoring: what a query reads beside selected blocks and window.

    Returns:
        See `pays_from` in what `plan` returns.
    """
    never = {"one_token": None, "whole_text": None}
    parts = ["blocks(S)"] if scoring.entries else []
    parts += ["min(S, n*l')", "min(S, w)", *([f"{scoring.index_share:.3g}*S"] if scoring.index_share else [])]
    formula = f"S > {' + '.join(parts)}" + (", blocks(S) = (S - l)//d + 1" if scoring.entries else "")
    if scoring.entries * (1 / sizes.kernel_stride) + scoring.index_share >= 1:  # as much as all tokens
        return {**never, "formula": formula}
    # Up to n*l' or w tokens one branch alone reads as much as dense attention; beyond both, sparse attention saves more
    # with every token.
    start = max(sizes.exact_tokens, sizes.window_size)
    period = sizes.kernel_stride
    one_token = _first(start, lambda length: length > read_tokens(sizes, length, scoring), period)
    whole_text = _first(
        one_token, lambda length: length * (length + 1) // 2 > read_tokens_of_text(sizes, length, scoring), period
    )
    return {"one_token": one_token, "whole_text": whole_text, "formula": formula}


def read_tokens_of_text(sizes: Sizes, length: int, scoring: Scoring = PAPER) -> float:
    """How many keys and values all queries of a text read: the sum of `read_tokens` over 1 .. `length`."""

    def sum_of_least(most: int) -> int:
        """The sum of min(S, `most`) over the lengths S = 1 .. `length`."""
        rising = min(length, most)
        return rising * (rising + 1) // 2 + (length - rising) * most

    stride = sizes.kernel_stride
    # lengths with at least one entry; of these, `stride` in a row have the same number
    full, rest = divmod(max(0, length - sizes.kernel_size + 1), stride)
    entries = stride * full * (full + 1) // 2 + rest * (full + 1) if scoring.entries else 0
    index = scoring.index_share * length * (length + 1) / 2
    return entries + sum_of_least(sizes.exact_tokens) + sum_of_least(sizes.window_size) + index


def _first(start: int, holds: Callable[[int], bool], period: int) -> int:
    """The first length from `start` on from which `holds` is true for all.

    Args:
        period: where it is true for so many lengths in a row, it is true for all longer ones.
    """

    def stays(length: int) -> bool:
        return all(holds(length + more) for more in range(period))

    low, high = start - 1, start
    while not stays(high):
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if stays(middle) else (middle, high)
    return high
