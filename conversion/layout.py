"""What the NSA checkpoint of a source holds: its config, and each tensor's name and shape, before a weight is read.

The names and shapes come from the model's own class, built on the meta device; a tensor that is not among them, or is
missing, or has another shape, is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from nsa_hf.errors import NsaError
from nsa_hf.families import family_of, nsa_config_from_dense
from nsa_hf.fields import NSA_FIELDS, full_name

from .files.checkpoint import CheckpointError, SafetensorsCheckpoint, TensorInfo
from .files.loading import IGNORED
from .files.model_folder import refuse_adapter
from .rope import parse_rope_scaling, scaled_config

DTYPE_NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Layout:
    """The tensors of an NSA checkpoint.

    Attributes:
        dense: shape of every tensor that the dense source must hold, by name; experts one by one, as published.
        fused: the same as the model itself holds them, all experts of a layer in one tensor; some are saved like that.
        added: shape of every new parameter, by name; all have `.nsa.` in it.
        tied: name to the name whose tensor it shares; stored once, under the latter.
        ignored: patterns of stored tensors that the family does not read.
    """

    dense: Mapping[str, tuple[int, ...]]
    fused: Mapping[str, tuple[int, ...]]
    added: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    ignored: tuple[re.Pattern[str], ...]

    def as_stored(self, table: Mapping[str, TensorInfo]) -> Layout:
        """This layout under the names that a checkpoint has: its own, or `fused` where a name says so."""
        is_fused = any(name in self.fused and name not in self.dense for name in table)
        return replace(self, dense=self.fused) if is_fused else self

    def check(self, table: Mapping[str, TensorInfo], source: str) -> list[str]:
        """The names to carry over, in the source's order: everything but tied copies and what the family ignores.

        Args:
            table: what the source holds.
            source: the source's name, for the message.

        Raises:
            CheckpointError: missing or unknown tensors, or one of another shape than the config asks for.
        """
        carried = [name for name in table if name in self.dense]
        missing = sorted(self.dense.keys() - carried)
        unknown = [
            name
            for name in table
            if name not in self.dense and name not in self.tied and not any(rule.search(name) for rule in self.ignored)
        ]
        if missing or unknown:
            wrong = " and ".join(
                f"{len(names)} {what} tensors ({_some(names)})"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
            raise CheckpointError(f"{source} does not hold what its config describes: {wrong}")
        for name in carried:
            if table[name].shape != self.dense[name]:
                raise CheckpointError(
                    f"{source}: {name} has shape {list(table[name].shape)}, and the config asks for "
                    f"{list(self.dense[name])}"
                )
        return carried


def layout_of(config: PreTrainedConfig) -> Layout:
    """The layout of the NSA model of a config, from its class; allocates no weights."""
    with torch.device("meta"):
        model = family_of(config).causal_lm_class(config)
    tied = dict(model.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # experts and their like are stored one by one, and put together in the model
    fused = {name: tensor for name, tensor in model.state_dict().items() if ".nsa." not in name}
    stored = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, fused).items()}
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return Layout(
        dense={name: shape for name, shape in stored.items() if name not in tied},
        fused={name: shapes[name] for name in fused if name not in tied},
        added={name: shape for name, shape in shapes.items() if ".nsa." in name},
        tied=tied,
        ignored=(IGNORED, *patterns),
    )


def check_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Holds the weights of a sparse model's folder against its config, by their names and shapes.

    Transformers would make up what is missing, and only warn.

    Raises:
        CheckpointError: there is an adapter, or a tensor is missing, unknown or of another shape.
    """
    refuse_adapter(folder)
    table = SafetensorsCheckpoint(folder).table
    layout = layout_of(config).as_stored(table)
    replace(layout, dense={**layout.dense, **layout.added}).check(table, str(folder))


def target_config(
    dense: PreTrainedConfig, options: Mapping[str, Any], dtype: torch.dtype | None = None
) -> PreTrainedConfig:
    """The NSA config of a dense one.

    Args:
        dense: the source's config, its dtype set.
        options: fields with or without the prefix `nsa_` (`topk=4` is `nsa_topk=4`); those that are None are left out.
            `rope_scaling` is one of its own, see rope.py.
        dtype: the weights' dtype; None keeps the source's.

    Raises:
        NsaError: an unknown field, or a value, family or feature that is refused.
    """
    named = nsa_options(options)
    scaling = named.pop("rope_scaling", None)
    config = nsa_config_from_dense(dense if scaling is None else scaled_config(dense, scaling), **named)
    config.dtype = dtype or dense.dtype
    return config


def nsa_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with their full names, `nsa_...` and `rope_scaling`; those that are None are left out.

    Raises:
        NsaError: one that is no field, naming the nearest, or one given twice.
    """
    named: dict[str, Any] = {}
    for option, value in options.items():
        if option == "rope_scaling":
            named |= {option: parse_rope_scaling(value)} if value is not None else {}
            continue
        name = full_name(option)
        if name not in NSA_FIELDS or name == "nsa_format":
            choices = [field.removeprefix("nsa_") for field in NSA_FIELDS if field != "nsa_format"]
            near = get_close_matches(name.removeprefix("nsa_"), choices, n=1)
            advice = f"did you mean {near[0]}?" if near else f"choose among {', '.join(choices)}"
            raise NsaError(f"unknown option {option!r}: {advice}")
        if name in named:
            raise NsaError(f"{name} is given twice, with and without its prefix: give it once")
        if value is not None:
            named[name] = value
    return named


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name (float32, bfloat16, float16, or fp32, bf16, fp16); None stays None.

    Raises:
        NsaError: another name.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPE_NAMES.values()):
        return dtype
    if isinstance(dtype, str) and dtype in DTYPE_NAMES:
        return DTYPE_NAMES[dtype]
    raise NsaError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {dtype!r}")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` to `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
