"""Loading through Transformers, with errors that name the file and progress bars as wished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from nsa_hf.errors import NsaError

from .checkpoint import CheckpointError
from .model_folder import refuse_adapter


def load_whole(folder: Path, **options: Any) -> PreTrainedModel:
    """Transformers' model of a folder, in evaluation mode.

    Raises:
        CheckpointError: weights were missing, which Transformers would only warn of and make up; or there is an
            adapter, for which it would load other weights or none.
    """
    refuse_adapter(folder)
    model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors that its config asks for, {missing[0]} among them"
        )
    return model.eval()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what Transformers and the file formats raise about a bad file into a CheckpointError that names it."""
    try:
        yield
    except NsaError:
        raise
    except Exception as error:  # tokenizers, for one, raises nothing more special
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot read {path}: {reason[:500]}") from error


@contextmanager
def transformers_progress(shown: bool) -> Iterator[None]:
    """Transformers' own progress bars as wished, and afterwards as they were."""
    before = logging.is_progress_bar_enabled()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switch[shown]()
    try:
        yield
    finally:
        switch[before]()
