"""The same weights with the other way to score blocks: what the choice of selector costs."""

from __future__ import annotations

from typing import Any

from nsa_hf.recommend import BITS


def other_selector(config: Any) -> Any:
    """A sparse model's config with the other selector; every parameter of such a model is one of the first's.

    Args:
        config: with `channels` it becomes `compressed`, by entries that are means where there was no compressed branch;
            with `compressed` it becomes `channels` as recommended, half of each head's.

    Raises:
        NotPlain: no channels can be found in the family's attention.
    """
    if config.nsa_selector == "compressed":
        return config.with_fields(nsa_selector="channels", nsa_selector_dim=None, nsa_selector_bits=BITS)
    compression = "mean" if config.nsa_compression == "none" else config.nsa_compression
    return config.with_fields(nsa_selector="compressed", nsa_compression=compression)


def selector_name(config: Any) -> str:
    """How a config scores blocks, in words: `compressed (mlp)` or `channels (32)`."""
    way = config.nsa_compression if config.nsa_selector == "compressed" else config.nsa_selector_dim
    return f"{config.nsa_selector} ({way})"
