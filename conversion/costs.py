"""What attention costs, dense and sparse: bytes of the cache, and the length from which sparse attention is cheaper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedConfig

from nsa_hf.kernels import Sizes, n_blocks


def read_tokens(sizes: Sizes, length: int) -> int:
    """Cache entries that one query reads at `length` tokens, its own counted.

    They are the compressed blocks (about S/d), the selected blocks' min(S, n*l') tokens and the window's min(S, w).
    """
    selected = min(length, sizes.exact_tokens)
    return n_blocks(length, sizes.kernel_size, sizes.kernel_stride) + selected + min(length, sizes.window_size)


def kv_cache(config: PreTrainedConfig, layers: Iterable[dict[str, Any]], length: int) -> dict[str, Any]:
    """Bytes of the cache, kept and read per decoded token, of one sequence of `length` tokens; see `plan`."""
    sizes = config.nsa_sizes
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None) or config.hidden_size // heads
    # one token's key and value in one layer
    entry = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim * config.dtype.itemsize
    layers = list(layers)
    nsa = sum(layer["becomes"] == "nsa" for layer in layers)
    entries = n_blocks(length, sizes.kernel_size, sizes.kernel_stride)
    kept = nsa * entries
    if config.nsa_branch_kv == "independent":
        # the tokens of the block that is not complete, and the window's
        kept += nsa * (length - entries * sizes.kernel_stride + min(length, sizes.window_size))
    dense = sum(length if layer["keeps"] is None else min(length, layer["keeps"]) for layer in layers)
    read = dense + nsa * (read_tokens(sizes, length) - length)
    return {
        "length": length,
        "dense_bytes": dense * entry,
        "nsa_bytes": (dense + kept) * entry,
        "dense_read_bytes": dense * entry,
        "nsa_read_bytes": read * entry,
        "read_less": dense / read,
    }


def pays_from(sizes: Sizes) -> dict[str, Any]:
    """From which length an NSA layer's attention takes fewer FLOPs than a dense one's.

    Both cost the same per query head and entry read, so entries are compared: S for dense, `read_tokens` for NSA. The
    gate and the compression come on top; they do not grow with the length.
    """
    never = {"one_token": None, "whole_text": None}
    formula = "S > blocks(S) + min(S, n*l') + min(S, w), blocks(S) = (S - l)//d + 1"
    if sizes.kernel_stride == 1:  # as many compressed entries as tokens
        return {**never, "formula": formula}
    # Up to n*l' or w tokens one branch alone costs as much as dense; beyond both, what a token gains only rises.
    start = max(sizes.exact_tokens, sizes.window_size)
    one_token = _first(start, lambda length: length > read_tokens(sizes, length))
    whole_text = _first(one_token, lambda length: length * (length + 1) // 2 > read_tokens_of_text(sizes, length))
    return {"one_token": one_token, "whole_text": whole_text, "formula": formula}


def read_tokens_of_text(sizes: Sizes, length: int) -> int:
    """The sum of `read_tokens` over the lengths 1 .. `length`: what all queries of a text read."""

    def capped(most: int) -> int:
        top = min(length, most)
        return top * (top + 1) // 2 + (length - top) * most

    stride = sizes.kernel_stride
    # lengths with at least one block; of these, `stride` in a row have the same number
    some = max(0, length - sizes.kernel_size + 1)
    full, rest = divmod(some, stride)
    blocks = stride * full * (full + 1) // 2 + rest * (full + 1)
    return blocks + capped(sizes.exact_tokens) + capped(sizes.window_size)


def _first(start: int, holds: Callable[[int], bool]) -> int:
    """The first length from `start` on for which `holds`, which once true stays true."""
    low, high = start - 1, start
    while not holds(high):
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
