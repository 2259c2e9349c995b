"""The Hugging Face Hub: downloads of what a conversion reads, uploads of what it wrote."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from nsa_hf.errors import NsaError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".tflite")

# What huggingface_hub raises about ids, tokens and permissions, and its HTTP library (a base of its error) and its
# transfer library about networks.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


def download(name: str, revision: str | None, weights: bool, allow_pickle: bool = False) -> tuple[Path, str]:
    """Downloads a model into the Hub's cache, or finds it there when there is no network.

    Subfolders of a repository (original weights, ONNX, images) are not downloaded.

    Args:
        name: Hub id, `owner/name`.
        revision: branch, tag or commit; None is the main branch.
        weights: download the safetensors too.
        allow_pickle: download pickles where there are no safetensors.

    Returns:
        The folder, and the commit.

    Raises:
        NsaError: not a Hub id, not on the Hub, or not reachable and not in the cache.
    """
    if not HUB_ID.fullmatch(name):
        raise NsaError(f"there is no folder {name}: expected a local folder, a .gguf file or a Hub id (owner/name)")
    endings = [".safetensors"] if weights else []
    try:
        folder = _snapshot(name, revision, endings)
        if weights and allow_pickle and not any(Path(folder).glob("*.safetensors")):
            folder = _snapshot(name, revision, [*endings, ".bin"])
    except HUB_ERRORS as error:
        raise NsaError(f"there is no folder {name}, and the Hub's answer is: {_reason(error)}") from error
    return Path(folder), Path(folder).name


def _snapshot(name: str, revision: str | None, endings: list[str]) -> str:
    """The folder of a download without subfolders, and without weights but those of some endings."""
    other_weights = [f"*{ending}" for ending in WEIGHTS if ending not in endings]
    return snapshot_download(name, revision=revision, ignore_patterns=["*/*", *other_weights])


def check_upload(repo: str) -> None:
    """Makes sure that an upload can be begun, before any work is done for it.

    Args:
        repo: Hub id, `owner/name`.

    Raises:
        NsaError: not a Hub id, no token, or one that the Hub does not know.
    """
    if not HUB_ID.fullmatch(repo):
        raise NsaError(f"--push-to-hub takes a Hub id (owner/name), got {repo!r}")
    try:
        HfApi().whoami()
    except HUB_ERRORS as error:
        raise NsaError(f"cannot upload to {repo}: {_reason(error)}; `hf auth login` stores a token") from error


def upload(folder: Path, repo: str) -> str:
    """Uploads a model's folder in one commit; makes the repository if it is not there.

    Args:
        folder: of the model.
        repo: Hub id, `owner/name`.

    Returns:
        The repository's address.

    Raises:
        NsaError: the Hub refused it, or could not be reached.
    """
    api = HfApi()
    try:
        created = api.create_repo(repo, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder, repo_id=created.repo_id, commit_message="Native Sparse Attention, by nsa-hf"
        )
    except HUB_ERRORS as error:
        raise NsaError(
            f"the upload to {repo} failed: {_reason(error)}; the model is complete in {folder}, and "
            f"`hf upload {repo} {folder}` tries again"
        ) from error
    return str(commit.repo_url)


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:500]
