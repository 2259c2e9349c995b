"""A Hub id to a local folder, through huggingface_hub: only the files that a conversion reads."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from .checkpoint import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".tflite")


def download(name: str, revision: str | None, weights: bool) -> tuple[Path, str]:
    """Downloads a model into the Hub's cache, or finds it there when there is no network.

    Folders of a repository (original weights, ONNX, images) stay where they are.

    Args:
        name: Hub id, `owner/name`.
        revision: branch, tag or commit; None is the main branch.
        weights: whether the safetensors come too.

    Returns:
        The folder, and the commit.

    Raises:
        CheckpointError: not a Hub id, not on the Hub, or not reachable and not in the cache.
    """
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"there is no folder {name}: expected a local folder, a .gguf file or a Hub id (owner/name)"
        )
    left = [f"*{ending}" for ending in WEIGHTS if not (weights and ending == ".safetensors")]
    try:
        folder = snapshot_download(name, revision=revision, ignore_patterns=["*/*", *left])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"there is no folder {name}, and the Hub's answer is: {reason[:500]}") from error
    return Path(folder), Path(folder).name
