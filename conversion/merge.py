"""An adapter (LoRA, IA3, ... by PEFT) merged into a sparse model: a plain model again, with manifest.

    from nsa_hf.conversion import merge
    merge("llama-nsa", "adapter", "llama-nsa-merged")

The adapter may have been trained on the sparse model or on its dense source, whose layers have the same names.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nsa_hf.adapters import import_peft
from nsa_hf.errors import NsaError, check_folder, check_path
from nsa_hf.heads import auto_class

from . import manifest as manifests
from .files.hashes import hash_file
from .files.loading import load_whole, read_config, reading, refuse_quantised, transformers_progress
from .files.staging import check_output, staged_folder
from .saving import save_changed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def merge(model: str | Path, adapter: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the model that a sparse model and an adapter are together.

        >>> from nsa_hf.conversion import merge
        >>> from peft import LoraConfig, get_peft_model
        >>> folder = nsa_hf.convert("path/to/llama", "llama-nsa")
        >>> model = AutoModelForCausalLM.from_pretrained(folder)
        >>> get_peft_model(model, LoraConfig()).save_pretrained("adapter")
        >>> merge(folder, "adapter", "llama-merged").name
        'llama-merged'

    Weights keep their dtype: what the adapter makes of them is computed in float32, 4 bytes a weight, and rounded once.

    Args:
        model: a folder that `convert` wrote, or one trained from it, here or elsewhere.
        adapter: a folder that PEFT's `save_pretrained` wrote.
        out: the folder to write; new or empty unless `overwrite`.
        overwrite: replace the model in `out`; it stays until the new one is complete.

    Returns:
        `out`. Its manifest says that it is trained, with the adapter's hashes.

    Raises:
        NsaError: the adapter does not fit the model or cannot be merged, PEFT is missing, or `out` cannot be written;
            nothing is left behind then.
    """
    model, adapter, out = check_folder(check_path(model)), check_folder(check_path(adapter)), check_path(out)
    check_output(out, overwrite, keep=(model, adapter))
    check_adapter(model, adapter)
    manifest, config = manifests.find(model), read_config(model)
    refuse_quantised(model, config)
    with transformers_progress(False):
        merged = merged_model(load_whole(model, auto_class(config), dtype="auto"), adapter)
    hashes = {name: hash_file(adapter / name) for name in (CONFIG, WEIGHTS)}
    run: dict[str, Any] = {"merged": str(adapter), "fingerprint": hashes}
    if manifest is not None and "training" in manifest:
        run["before"] = manifest["training"]
    with staged_folder(out, overwrite) as stage:
        try:
            companions = save_changed(merged, model, stage)
        except SafetensorError as error:
            raise NsaError(f"cannot write {out} ({error}): make room and merge again") from error
        manifests.write(stage, manifests.build_trained(stage, model, manifest, companions, run))
    return out


def check_adapter(model: Path, adapter: Path) -> None:
    """Whether a folder holds an adapter that can be read, and not one that the model has in its weights.

    Raises:
        NsaError: why not.
    """
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise NsaError(
                f"{adapter} has no {name}: expected a folder that PEFT's save_pretrained wrote (of an older one, with "
                "adapter_model.bin: load it with PeftModel.from_pretrained and save it again)"
            )
    if adapter.resolve().is_relative_to(model.resolve()):
        raise NsaError(
            f"{adapter} lies in {model}, which `nsa-hf train` has merged it into: give the model that training began "
            "with, or take this one as it is"
        )


def merged_model(model: Any, adapter: Path) -> Any:
    """A model with an adapter in its weights, in the dtypes that it had.

    Args:
        model: changed in place.
        adapter: its folder.

    Raises:
        NsaError: a tensor of the adapter has no place in the model, or the other way round, or it cannot be merged.
    """
    peft = import_peft("merging an adapter")
    with reading(adapter / CONFIG):
        config = peft.PeftConfig.from_pretrained(adapter)
        config.inference_mode, config.base_model_name_or_path = True, None
    if config.is_prompt_learning:
        raise NsaError(f"{adapter} is a {config.peft_type.value} adapter, which cannot be merged: use it by PEFT")
    tied, are_tied = dict(model.all_tied_weights_keys), model.config.tie_word_embeddings
    for name in tied:  # apart, so that what belongs to one of the two is not put into both
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(model.get_parameter(name).detach().clone()))
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(model)}
    model.float()
    try:
        adapted = peft.get_peft_model(model, config)
        if not hasattr(adapted, "merge_and_unload"):
            raise NsaError(f"PEFT cannot merge {adapter}, a {config.peft_type.value} adapter: use it beside the model")
        loaded = adapted.load_adapter(adapter, "default")
    except NsaError:
        raise
    except Exception as error:  # shapes: RuntimeError; names: ValueError; files: safetensors' own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NsaError(f"{adapter} is no adapter of this model: {reason[:500]}") from error
    for what, names in (("lacks", loaded.missing_keys), ("has besides", loaded.unexpected_keys)):
        if names:
            branches = ".nsa.compressed." in names[0] or ".nsa.window." in names[0]
            how = (
                "merge it into the dense model and convert that, so that keys and values of every branch have it"
                if branches
                else "merge it into the model that it was trained on"
            )
            raise NsaError(f"{adapter} {what} {len(names)} tensors beside this model, {names[0]} for one: {how}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            merged = adapted.merge_and_unload(safe_merge=True).eval()
    except ValueError as error:
        raise NsaError(f"cannot merge {adapter}: {error}") from error
    for name, tensor in tensors_of(merged):
        tensor.data = tensor.data.to(dtypes[name])
    for name, other in tied.items():
        if not torch.equal(merged.get_parameter(name), merged.get_parameter(other)):
            raise NsaError(
                f"{adapter} makes {name} another than {other}, which are one in this model (tie_word_embeddings): use "
                "it beside the model"
            )
    merged.config.tie_word_embeddings = are_tied  # PEFT has seen them apart
    merged.tie_weights()
    return merged


def tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    return itertools.chain(model.named_parameters(), model.named_buffers())
