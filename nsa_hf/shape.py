"""Whether the config.json of a folder still describes the model whose weights are in it, by its manifest.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .errors import NsaError
from .registration import PREFIX

MANIFEST = "manifest.json"

# Which tensors there are, of what size, and how they are cut into layers, heads and experts, where a family has the
# field. Everything else (nsa_topk, RoPE, dtype, ...) may be edited.
FIELDS = (
    "num_hidden_layers",
    "layer_types",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "nsa_selector",
    "nsa_selector_channels",
    "nsa_kernel_size",
    "nsa_compression",
    "nsa_compression_dim",
    "nsa_branch_kv",
    "nsa_gate_dim",
    "nsa_dense_layers",
)


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Those of `FIELDS` that a config has, with their values; JSON-able."""
    values = {name: getattr(config, name, None) for name in FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def check_shape(folder: str | os.PathLike, config: PreTrainedConfig | None = None) -> None:
    """Compares a local folder's config with the manifest that `nsa-hf` wrote beside it, if there is one.

    Args:
        folder: of a model.
        config: the folder's, if it has been read.

    Raises:
        NsaError: the manifest is damaged, or the config is of another model.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, shape = manifest.get("model_type"), manifest.get("shape", {})
        if not str(kind).startswith(PREFIX):  # another program's file of that name, or an old one's
            return
        recorded = {"model_type": kind, **shape}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise NsaError(f"{path} is damaged ({error!r}): convert again, or remove it if its model is sound") from error
    config = config or AutoConfig.from_pretrained(folder)
    actual = {"model_type": config.model_type, **shape_of(config)}
    # another version of Transformers may have no such field
    edited = [name for name in recorded if name in actual and actual[name] != recorded[name]]
    if edited:
        changes = ", ".join(f"{name} {actual[name]!r} instead of {recorded[name]!r}" for name in edited)
        raise NsaError(
            f"{folder}: config.json is not of the model in this folder, by {MANIFEST}: it says {changes}. Put it back; "
            f"if the weights were changed with it, remove {MANIFEST}"
        )
