"""Models and tokenizers of converted folders, with errors that say what is wrong with the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from nsa_hf.conversion.compare import tokens
from nsa_hf.conversion.files.loading import load_whole, read_config, transformers_progress
from nsa_hf.conversion.sources.folder import tokenizer_code
from nsa_hf.errors import NsaError, check_folder
from nsa_hf.heads import check_next_token


def load_nsa_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    config: Any = None,
) -> Any:
    """The sparse causal LM in a folder, in evaluation mode.

    Args:
        folder: holds it.
        device: where it goes.
        dtype: of its weights.
        config: its config with something changed, such as RoPE; None takes the folder's.

    Raises:
        NsaError: there is none, it is damaged, or it has another head.
    """
    folder = Path(folder)
    try:
        config = config or read_config(folder)
        check_next_token(config, folder)
        with transformers_progress(False):
            return load_whole(folder, config=config, dtype=dtype).to(device)
    except NsaError:
        raise
    except Exception as error:  # the file formats each have their own
        raise NsaError(f"cannot load the model in {folder}: {error}") from error


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder.

    Args:
        trust_remote_code: run code of its own that it may have.

    Raises:
        NsaError: there is none, or it has code of its own that is not trusted.
    """
    if not tokens.has_tokenizer(check_folder(folder)):
        raise NsaError(f"{folder} has no tokenizer: copy the source's tokenizer files there")
    code = tokenizer_code(Path(folder))
    if code and not trust_remote_code:
        raise NsaError(
            f"the tokenizer in {folder} is defined by code of its own ({code[0]}), which is not run unless trusted: "
            "read it, and give --trust-remote-code (of a training run, trust_remote_code=true)"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise NsaError(f"cannot load the tokenizer in {folder}: {error}") from error


def pick_device(device: str | None) -> str:
    """The device to run on.

    Args:
        device: PyTorch's name of it; None takes a GPU if there is one.

    Raises:
        NsaError: the machine does not have it.
    """
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
    """Whether the model has an embedding for each token of `ids`; NsaError where it has not."""
    tokens.check_token_ids(torch.as_tensor(ids), model.get_input_embeddings().weight.shape[0])
