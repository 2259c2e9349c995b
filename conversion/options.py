"""What a user asks of a conversion: options by their full names, dtypes by name, and the config that follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from nsa_hf.errors import NsaError
from nsa_hf.families import chosen_config
from nsa_hf.fields import FOUND_FIELDS, full_name, named_fields, unknown_option
from nsa_hf.recommend import Choice

from .rope import parse_rope_scaling, scaled_config

DTYPE_NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def target_config(
    dense: PreTrainedConfig, options: Mapping[str, Any], dtype: torch.dtype | None = None
) -> tuple[PreTrainedConfig, dict[str, Choice]]:
    """The converted model's config, and what was chosen for it and why (see nsa_hf/recommend.py).

    Args:
        dense: the source's config, its dtype set.
        options: fields with or without the prefix `nsa_` (`topk=4` is `nsa_topk=4`), and `rope_scaling`, see rope.py;
            those that are None are left out.
        dtype: the weights' dtype; None keeps the source's.

    Raises:
        NsaError: an unknown field, or a value, family or feature that is refused.
    """
    named = nsa_options(options)
    scaling = named.pop("rope_scaling", None)
    config, choices = chosen_config(dense if scaling is None else scaled_config(dense, scaling), named)
    config.dtype = dtype or dense.dtype
    return config, choices


def nsa_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their full names, `nsa_...` and `rope_scaling`.

    Args:
        options: names with or without the prefix; those whose value is None are left out.

    Raises:
        NsaError: a name that is no field (the message names the nearest), or one given with and without its prefix.
    """
    scaling = parse_rope_scaling(options.get("rope_scaling"))
    fields = {option: value for option, value in options.items() if option != "rope_scaling"}
    for option in fields:
        if full_name(option) in FOUND_FIELDS:
            raise unknown_option(option)
    named = {name: value for name, value in named_fields(fields).items() if value is not None}
    return named if scaling is None else {**named, "rope_scaling": scaling}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype of weights.

    Args:
        dtype: float32, bfloat16 or float16, or one of their short names fp32, bf16, fp16; None stays None.

    Raises:
        NsaError: another dtype or name.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPE_NAMES.values()):
        return dtype
    if isinstance(dtype, str) and dtype in DTYPE_NAMES:
        return DTYPE_NAMES[dtype]
    raise NsaError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {dtype!r}")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` to `bfloat16`."""
    return str(dtype).removeprefix("torch.")
