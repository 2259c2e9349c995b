"""The files of a model's folder by name: which are copied along, which lie elsewhere, and whether there are others.

A folder may be replaced only where it holds nothing but a model; a file is copied only where it is in the folder
itself, and not behind a link that leads out of it.
"""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from nsa_hf.errors import NsaError
from nsa_hf.model_cards.card import is_generated
from nsa_hf.shape import MANIFEST

from .checkpoint import INDEX
from .plain_json import read_json

# What tokenizers are made of.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "qwen.tiktoken",
    "tekken.json",
    "emoji.json",
)
# Licenses must travel with a model.
TERMS = ("LICENSE*", "NOTICE*", "*TERMS*")
# These travel with it too, copied as they are; config and weights are written anew.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    *VOCABULARIES,
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

# What a folder may hold and still be replaced as a model's: names that Transformers, the Hub and our commands give, and
# no pattern that a file of the user's could fit. The weights, for one, and not what else is in safetensors.
SHARD_INDICES = (INDEX, "pytorch_model.bin.index.json")
MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin")
BESIDE = {
    "config.json",
    "generation_config.json",
    *SHARD_INDICES,
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_nsa.py",
    "export.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "NOTICE.md",
    ".gitattributes",
    # left by whoever looked into the folder
    ".DS_Store",
}
BELOW = ("additional_chat_templates/*.jinja", ".cache/huggingface/*", "__pycache__/*.pyc")
# What our commands put into a folder of ours; its manifest names the rest.
RESULTS = {
    "manifest.json",
    "verify.json",
    "eval.json",
    "inspect.json",
    "training.json",
    "generate-long.json",
    "generate-chat.json",
    "training.png",
    "perplexity.png",
    "selection.png",
    "gates.png",
    "recall.png",
    "needle.png",
}


def foreign_files(folder: Path) -> list[str]:
    """The files in a folder that belong to no model, for whose sake it must not be replaced.

    A folder without weights, or without a config that names a model type, holds no model: all its files are foreign.

    Returns:
        Their names relative to the folder.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(folder).as_posix() for path in paths]
    config, manifest, export = (_json_object(folder / name) for name in ("config.json", MANIFEST, "export.json"))
    shards = [_json_object(folder / name).get("weight_map") for name in SHARD_INDICES]
    weights = {str(name) for shard_of in shards if isinstance(shard_of, dict) for name in shard_of.values()}
    weights |= {name for name in names if MODEL_WEIGHTS.fullmatch(name)}
    if "model_type" not in config or not weights & {*names}:
        return names
    known = BESIDE | weights
    if {"model_type", "as_in_source", "dropped"} <= export.keys() and isinstance(export.get("companions"), list):
        known = known.union(map(str, export["companions"]))
    if {"format", "trained", "source", "tensors"} <= manifest.keys():
        written = manifest.get("files")
        known = known | RESULTS | {*(written if isinstance(written, dict) else ())}
    if "README.md" in names and is_generated(folder / "README.md"):
        known = known | {"README.md"}
    return [name for name in names if name not in known and not any(fnmatchcase(name, below) for below in BELOW)]


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
        raise NsaError(
            f"{folder} is a PEFT adapter: merge it into its base model with {how}; then take MERGED (into a converted "
            "model: nsa-hf merge MODEL ADAPTER MERGED)"
        )
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
