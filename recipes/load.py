"""Models and tokenizers of converted folders, with errors that say what is wrong with the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from nsa_hf.conversion.compare import models as compare
from nsa_hf.conversion.files.loading import load_whole, read_config, transformers_progress
from nsa_hf.conversion.sources.folder import tokenizer_code
from nsa_hf.errors import NsaError, check_folder


class LoadError(NsaError):
    """A folder that holds no model of ours, or a damaged one."""


def load_nsa_model(folder: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32") -> Any:
    """The sparse causal LM in `folder`, in evaluation mode; LoadError when there is none."""
    folder = Path(folder)
    try:
        config = read_config(folder)
        with transformers_progress(False):
            return load_whole(folder, config=config, dtype=dtype).to(device)
    except NsaError:
        raise
    except Exception as error:  # the file formats each have their own
        raise LoadError(f"cannot load the model in {folder}: {error}") from error


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`; LoadError when there is none, or it needs code of its own that is not trusted."""
    if not compare.has_tokenizer(check_folder(folder)):
        raise LoadError(f"{folder} has no tokenizer: copy the source's tokenizer files there")
    code = tokenizer_code(Path(folder))
    if code and not trust_remote_code:
        raise LoadError(
            f"the tokenizer in {folder} is defined by code of its own ({code[0]}), which is not run unless trusted: "
            "read it, and give --trust-remote-code (of a training run, trust_remote_code=true)"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise LoadError(f"cannot load the tokenizer in {folder}: {error}") from error


def pick_device(device: str | None) -> str:
    """`device`, or the machine's GPU, or "cpu"; NsaError when the one asked for is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise NsaError(f"no device {device!r} here: {str(error).splitlines()[0]}") from error
    return device


def check_finite(values: torch.Tensor, folder: str | Path) -> None:
    """NsaError where a model's logits, or the hidden states they are made of, are NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise NsaError(
            f"{folder}: the model's logits are not finite (NaN or infinite): its weights are damaged, or were trained "
            "at rates that are too high, or its dtype is too narrow for them (try float32)"
        )


def check_token_ids(model: Any, ids: Sequence[int] | torch.Tensor) -> None:
    """Whether the model has an embedding for each of the `ids` of its tokenizer; NsaError where it has not."""
    compare.check_token_ids(torch.as_tensor(ids), model.get_input_embeddings().weight.shape[0])
