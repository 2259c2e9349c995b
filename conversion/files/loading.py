"""Loading through Transformers, with errors that name the file, and with or without progress bars."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from nsa_hf.errors import NsaError, check_folder
from nsa_hf.registration import PREFIX
from nsa_hf.shape import check_shape

from .model_folder import refuse_adapter
from .plain_json import read_json

# The largest values of config fields that count layers, experts and labels, since Transformers makes these one by one
# (of a label its name): the deepest model so far has a thousand layers.
LARGEST_COUNTS = {
    re.compile(r"(^|_)layers?$"): 1024,
    re.compile(r"(^|_)experts$"): 16384,
    re.compile(r"^num_labels$"): 1 << 20,
}

# Old checkpoints stored RoPE's frequencies in each layer; Transformers computes them and ignores these.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a sparse model's folder.

    Raises:
        NsaError: there is no such folder or no config in it, or the config cannot be read, is of no sparse model, or of
            another one than the folder's manifest says.
    """
    if not (check_folder(folder) / "config.json").is_file():
        raise NsaError(f"{folder} holds no model: expected a folder that `nsa-hf convert` or `nsa-hf train` wrote")
    config = load_config(folder)
    check_shape(folder, config)
    if not config.model_type.startswith(PREFIX):
        raise NsaError(f"{folder} holds a dense model ({config.model_type}): convert it first with `nsa-hf convert`")
    return config


def refuse_quantised(name: str | Path, config: PreTrainedConfig) -> None:
    """Refuses a model in few bits, as `save_pretrained` writes one that was loaded so.

    Args:
        name: the model's, for the message.
        config: the model's.

    Raises:
        NsaError: names the quantisation.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise NsaError(
            f"{name} is quantised ({method}): expected plain weights: give the checkpoint that it was made from, or "
            "dequantise it first"
        )


def load_whole(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """Transformers' model of a folder, in evaluation mode.

    Args:
        folder: holds config and weights.
        auto: the Auto class that loads it.
        options: what `from_pretrained` takes.

    Raises:
        NsaError: the folder's config is not of the model that its manifest says (see `nsa_hf.shape`); weights were
            missing, which Transformers would only warn of and draw at random, or left over, as when the config asks
            for fewer layers; or there is an adapter, for which it would load other weights or none.
    """
    refuse_adapter(folder)
    check_shape(folder)
    model, loaded = auto.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise NsaError(
            f"{folder} lacks {len(missing)} tensors that its config asks for, {missing[0]} among them: "
            "bring its files there again, whole"
        )
    left_over = sorted(name for name in loaded["unexpected_keys"] if not IGNORED.search(name))
    if left_over:
        raise NsaError(
            f"{folder} holds {len(left_over)} tensors that its config does not ask for, {left_over[0]} among them: "
            "bring back the config.json that belongs to its weights"
        )
    return model.eval()


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Transformers' config of a folder.

    Args:
        folder: holds config.json.
        trust_remote_code: read it by the code that it names.

    Raises:
        NsaError: there is none, it cannot be read, asks for more parts than a model can have, or names another
            weight file than we read.
    """
    path = folder / "config.json"
    with reading(path):
        content = read_json(path)
        check_counts(content, str(path))
        if content.get("transformers_weights"):
            raise NsaError(
                f"{path} names a weight file of its own (transformers_weights), which is not followed: rename that "
                "file to model.safetensors, in a folder without others, and take the field out"
            )
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def check_counts(config: Any, name: str) -> None:
    """Refuses a config of more layers, experts or labels than a model can have.

    Args:
        config: what its JSON file holds.
        name: of the file, for the message.

    Raises:
        NsaError: naming the field.
    """
    parts = [config]
    while parts:
        part = parts.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, dict | list):
                parts.append(value)
            for field, most in LARGEST_COUNTS.items():
                if isinstance(value, int | float) and field.search(str(key)) and value > most:
                    raise NsaError(f"{name}: {key} is {_short(value)}, and no model has more than {most:,}")


def _short(value: float) -> str:
    try:
        return f"{value:,}"
    except ValueError:  # more digits than Python writes out
        return "a number of thousands of digits"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what Transformers and the file formats raise about a bad file into a NsaError that names it."""
    try:
        yield
    except NsaError:
        raise
    except Exception as error:  # tokenizers, for one, raises nothing more special
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NsaError(f"cannot read {path}: {reason[:500]}") from error


@contextmanager
def transformers_progress(shown: bool) -> Iterator[None]:
    """Switches Transformers' own progress bars on or off, and afterwards back to what they were."""
    before = logging.is_progress_bar_enabled()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switch[shown]()
    try:
        yield
    finally:
        switch[before]()
