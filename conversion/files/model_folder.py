"""The files of a model's folder by name: which are copied along, which lie elsewhere, and whether there are others.

A folder may be replaced only where it holds nothing but a model; a file is copied only where it is in the folder
itself, and not behind a link that leads out of it.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from nsa_hf.errors import NsaError
from nsa_hf.shape import MANIFEST

from .plain_json import read_json

# Licenses must travel with a model.
TERMS = ("LICENSE*", "NOTICE*", "*TERMS*")
# These travel with it too, copied as they are; config and weights are written anew.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    *TERMS,
)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
INDICES = ("*.safetensors.index.json", "pytorch_model*.bin.index.json")
ADAPTER = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin")
# Files that Transformers, the Hub and `export-dense` put beside them.
BESIDE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "export.json",
    "README.md",
    ".gitattributes",
    ".cache/huggingface/*",
    # left by whoever looked into the folder, or imported from it
    ".DS_Store",
    "__pycache__/*.pyc",
    *TERMS,
)
# Files that our commands put into a converted model's folder; its manifest names the rest.
RESULTS = ("*.json", "*.png")


def foreign_files(folder: Path) -> list[str]:
    """The files in a folder that belong to no model, for whose sake it must not be replaced.

    A folder without weights, or without a config that names a model type, holds no model: all its files are foreign.

    Returns:
        Their names relative to the folder.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(folder).as_posix() for path in paths]
    config, manifest = _json_object(folder / "config.json"), _json_object(folder / MANIFEST)
    if "model_type" not in config or not any(_fits(name, WEIGHTS) for name in names):
        return names
    patterns = (*WEIGHTS, *INDICES, *BESIDE)
    if {"format", "trained", "source", "tensors"} <= manifest.keys():
        written = manifest.get("files")
        patterns = (*patterns, *RESULTS, *(written if isinstance(written, dict) else ()))
    return [name for name in names if name not in patterns and not _fits(name, patterns)]


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    # a pattern without a folder is for files of the folder itself
    return any(fnmatchcase(name, pattern) for pattern in patterns if "/" in pattern or "/" not in name)


def _json_object(path: Path) -> dict:
    """What a JSON file holds, empty where that is no object."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a path in a model's folder leads out of it, through a link or "..".

    A snapshot in the Hub's cache consists of links to the blobs of its repository: these do not lead out.
    """
    home, real = folder.resolve(), path.resolve()
    repositories = [
        above.parent for above in home.parents if above.name == "snapshots" and above.parent.name.startswith("models--")
    ]
    return not (real.is_relative_to(home) or any(real.parent == repository / "blobs" for repository in repositories))


def refuse_links_out(folder: Path, patterns: tuple[str, ...]) -> None:
    """Refuses a folder with files that are links out of it.

    Args:
        folder: of a model.
        patterns: names of the files that are looked at.

    Raises:
        NsaError: naming the first.
    """
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        if leads_out(folder, path):
            raise NsaError(
                f"{path} is a link out of its folder, to {path.resolve()}, which is not read: put the file itself there"
            )


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder with a PEFT adapter.

    Weights beside an adapter are not the model that was trained, and Transformers would load others in their place.

    Raises:
        NsaError: naming the adapter's files, and how to merge it.
    """
    adapter = sorted(path.name for pattern in ADAPTER for path in folder.glob(pattern))
    if not adapter:
        return
    how = (
        "PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(MERGED), and the tokenizer's "
        "save_pretrained(MERGED)"
    )
    weights = {path.name for pattern in WEIGHTS for path in folder.glob(pattern)} - set(adapter)
    if not weights or not (folder / "config.json").is_file():
        raise NsaError(f"{folder} is a PEFT adapter: merge it into its base model with {how}; then take MERGED")
    raise NsaError(
        f"{folder} holds a PEFT adapter ({', '.join(adapter)}) beside whole weights, which lack it: merge it with "
        f"{how}, and take MERGED; or move the adapter's files away to take the weights without it"
    )


def copy_file(folder: Path, name: str, out: Path) -> None:
    """Copies one file of a model's folder to the same place in `out`.

    Args:
        folder: of a model.
        name: relative to `folder`, like "additional_chat_templates/tool.jinja".
        out: the other folder.

    Raises:
        NsaError: there is no such file in the folder itself.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not (folder / name).is_file() or leads_out(folder, folder / name):
        raise NsaError(f"{folder} has no file {name} of its own, which belongs to the model: put it there")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / name, out / name)
