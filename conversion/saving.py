"""A sparse model whose weights have changed since its folder was loaded (trained, merged), into a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .files.loading import transformers_progress
from .sources import open_source


def save_changed(model: Any, start: Path, folder: Path) -> list[str]:
    """Writes config and weights, and the files that belong to the model besides.

    Args:
        model: as it is now.
        start: the folder that it was loaded from, which has its tokenizer, license and the like.
        folder: to write into.

    Returns:
        The names of those other files.
    """
    with transformers_progress(False):
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # which safetensors lets only their owner read
        shutil.copymode(folder / "config.json", weights)
    return open_source(start).save_companions(folder)
