"""The tensors of a converted model by name and shape, before a weight is read.

Names and shapes come from the model's own class, built on the meta device. A tensor of the source that is not among
them, is missing or has another shape is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from nsa_hf.errors import NsaError
from nsa_hf.families import family_of

from .files.checkpoint import SafetensorsCheckpoint
from .files.loading import IGNORED
from .files.model_folder import refuse_adapter
from .files.pieces import TensorInfo


@dataclass(frozen=True)
class ConvertedTensors:
    """What a converted model holds.

    Attributes:
        model: the name of the dense source's class.
        dense: shape of every tensor that the dense source must hold, by name; experts one by one, as published.
        fused: the same as the model itself holds them, all experts of a layer in one tensor; some are saved like that.
        added: shape of every new parameter, by name; all have `.nsa.` in it.
        tied: for the name of a tensor that shares another's values, the other's name, under which both are stored once.
        ignored: patterns of stored tensors that the family does not read.
    """

    model: str
    dense: Mapping[str, tuple[int, ...]]
    fused: Mapping[str, tuple[int, ...]]
    added: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    ignored: tuple[re.Pattern[str], ...]

    def as_stored(self, table: Mapping[str, TensorInfo]) -> ConvertedTensors:
        """The same with `dense` under the names that a checkpoint uses: those of `fused` where one of them is in it.

        Args:
            table: what the checkpoint holds, by name.
        """
        is_fused = any(name in self.fused and name not in self.dense for name in table)
        return replace(self, dense=self.fused) if is_fused else self

    def check(self, table: Mapping[str, TensorInfo], source: str) -> list[str]:
        """Holds a dense source against `dense`.

        Args:
            table: what the source holds, by name.
            source: the source's name, for the message.

        Returns:
            The names to carry over, in the source's order: all but copies of tied tensors and what the family ignores.

        Raises:
            NsaError: missing or unknown tensors, or one of another shape than the config asks for.
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
                f"{len(names)} {what} tensors ({_first_names(names)})"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
            raise NsaError(f"{source} does not hold what its config describes, a {self.model}: {wrong}")
        for name in carried:
            if table[name].shape != self.dense[name]:
                raise NsaError(
                    f"{source}: {name} has shape {list(table[name].shape)}, and the config asks for "
                    f"{list(self.dense[name])}"
                )
        return carried


def converted_tensors(config: PreTrainedConfig) -> ConvertedTensors:
    """The tensors of a converted model, from its class; allocates no weights.

    Args:
        config: the sparse model's.
    """
    with torch.device("meta"):
        model = family_of(config).class_of(config)(config)
    tied = dict(model.all_tied_weights_keys)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    # experts and their like are stored one by one, and put together in the model
    fused = {name: tensor for name, tensor in state.items() if ".nsa." not in name}
    stored = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, fused).items()}
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return ConvertedTensors(
        model=model.dense_class.__name__,
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
        NsaError: there is an adapter, or a tensor is missing, unknown or of another shape.
    """
    refuse_adapter(folder)
    table = SafetensorsCheckpoint(folder).table
    tensors = converted_tensors(config).as_stored(table)
    replace(tensors, dense={**tensors.dense, **tensors.added}).check(table, str(folder))


def _first_names(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
