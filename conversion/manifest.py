"""`manifest.json`: what a converted checkpoint was made from, with what, and the hash of every tensor and file in it.

It holds no times, and no paths but those that the user typed, so that the same conversion writes the same manifest.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from nsa_hf.errors import NsaError, check_folder
from nsa_hf.shape import MANIFEST, shape_of

from .files.checkpoint import SafetensorsCheckpoint
from .files.hashes import HASH, HASHES, describe_file, hash_tensor
from .files.loading import read_config
from .files.pieces import TensorInfo
from .files.plain_json import read_json
from .files.staging import write_json
from .options import dtype_name
from .rope import parse_rope_scaling

NAME = MANIFEST
FORMAT = 2
Types = Mapping[str, type | tuple[type, ...]]
PACKAGES = ("nsa-hf", "torch", "transformers", "safetensors", "huggingface_hub", "gguf")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of installed packages.

    Args:
        packages: their names; those that are not installed are left out.
    """
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def hash_kind(manifest: Mapping[str, Any]) -> str:
    """What a manifest's tensors are hashed with: one of HASHES, and the field of their records that holds the hash."""
    return manifest.get("hash", "sha256")


def describe_tensor(tensor: Tensor, origin: str, kind: str = HASH) -> dict[str, Any]:
    """One tensor's record in a manifest.

    Args:
        tensor: on the CPU.
        origin: `source` of a dense parameter, `nsa` of a new one.
        kind: of the hash, one of HASHES.

    Returns:
        `dtype`, `shape`, `from` (the origin), and the hash under its kind's name.
    """
    return tensor_record(TensorInfo(tuple(tensor.shape), tensor.dtype), origin, hash_tensor(tensor, kind), kind)


def tensor_record(info: TensorInfo, origin: str, digest: str, kind: str = HASH) -> dict[str, Any]:
    """As `describe_tensor`, for a tensor whose hash is known.

    Args:
        info: its shape and dtype.
        origin: `source` of a dense parameter, `nsa` of a new one.
        digest: the hash of its bytes.
        kind: of the hash, one of HASHES.
    """
    return {"dtype": dtype_name(info.dtype), "shape": list(info.shape), "from": origin, kind: digest}


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """`describe_file` of every file in a checkpoint's folder, by its name relative to the folder.

    The manifest itself is left out, and so are the weights, whose tensors have hashes (an adapter's have none).
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    beside = (path for path in paths if path.suffix != ".safetensors" or path.parent != folder)
    return {path.relative_to(folder).as_posix(): describe_file(path, whole=True) for path in beside}


def describe_trained(tensor: Tensor, name: str, converted: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a tensor after training.

    Args:
        tensor: on the CPU, as it is now.
        name: of the tensor.
        converted: the manifest of the conversion.

    Returns:
        Of a dense parameter, `source` in it is the record of what the conversion read.
    """
    before = converted["tensors"].get(name)
    if before is None:
        return describe_tensor(tensor, "nsa" if ".nsa." in name else "source", hash_kind(converted))
    after = describe_tensor(tensor, before["from"], hash_kind(converted))
    return after if before["from"] == "nsa" else {**after, "source": before.get("source", before)}


def build(
    source: Mapping[str, Any],
    config: PreTrainedConfig,
    options: Mapping[str, Any],
    choices: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
    companions: list[str],
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The manifest of an untrained conversion.

    Args:
        source: `Source.identity()`, and as `left_out` the records of its tensors that are not carried.
        config: the NSA config that was written.
        options: what the user asked for.
        choices: what was chosen, and why (see choices.py).
        tensors: the record of every tensor written, by name; where it was cast, `source` in it is the record of what
            was read.
        companions: names of the tokenizer's and other files written beside.
        files: `describe_files` of everything that was written.
    """
    return {
        "format": FORMAT,
        "hash": HASH,
        "trained": False,
        "exact_up_to": config.nsa_topk * config.nsa_block_size,
        "source": dict(source),
        "model_type": config.model_type,
        "shape": shape_of(config),
        "options": dict(options),
        "choices": dict(choices),
        "versions": versions(),
        "companions": companions,
        "files": dict(files),
        "tensors": dict(tensors),
    }


def build_trained(
    folder: Path, start: Path, converted: Mapping[str, Any] | None, companions: list[str], run: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a trained model.

    Args:
        folder: all of it but the manifest, the run's own record among it: each tensor and each file gets its hash.
        start: the folder that training started from.
        converted: that folder's manifest; None where it had none.
        companions: names of the tokenizer's and other files written beside.
        run: the record of what changed the weights, by which `is_trained` knows the folder: `fingerprint`, and
            `steps` of a training run or `merged` (the adapter) of a merge.
    """
    config = read_config(folder)
    if converted is None:
        kind = f"a folder without {NAME}"
        source: dict[str, Any] = {"name": str(start), "kind": kind, "revision": None, "files": {}}
        converted = {
            "format": FORMAT,
            "hash": HASH,
            "source": source,
            "options": {},
            "versions": versions(),
            "tensors": {},
        }
    tensors = SafetensorsCheckpoint(folder).tensors()
    return {
        **converted,
        "trained": True,
        "exact_up_to": None,
        "model_type": config.model_type,
        "shape": shape_of(config),
        "companions": companions,
        "files": describe_files(folder),
        "tensors": {name: describe_trained(tensor, name, converted) for name, tensor in tensors},
        "training": dict(run),
    }


def is_trained(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is a trained model's, by the record of its run: the field `trained` alone is no proof."""
    run = manifest.get("training")
    return (
        manifest["trained"] is True
        and isinstance(run, dict)
        and bool((run.get("steps") or run.get("merged")) and run.get("fingerprint"))
    )


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a manifest into a checkpoint's folder."""
    write_json(folder / NAME, manifest)


def read(folder: Path) -> dict[str, Any]:
    """The manifest in the folder of a converted or trained model.

    Raises:
        NsaError: there is none, or it is damaged, or a newer version wrote it.
    """
    path = folder / NAME
    if not path.is_file():
        raise NsaError(f"{folder} has no {NAME}: expected a folder that `nsa-hf convert` or `nsa-hf train` wrote")
    try:
        manifest = read_json(path)
        check_fields(manifest, {"format": int}, {"hash": str})
    except (OSError, ValueError) as error:
        raise NsaError(f"{path} is damaged ({error}): convert again") from error
    if manifest["format"] > FORMAT:
        raise NsaError(f"{path} has format {manifest['format']} and this version reads up to {FORMAT}: update nsa-hf")
    if hash_kind(manifest) not in HASHES:
        raise NsaError(
            f"{path} has tensors hashed with {hash_kind(manifest)!r}, and this version knows {', '.join(HASHES)}: "
            "update nsa-hf"
        )
    try:
        check(manifest)
    except ValueError as error:
        raise NsaError(f"{path} is damaged ({error}): convert again") from error
    return manifest


def find(folder: Path) -> dict[str, Any] | None:
    """The manifest in a sparse model's folder, or None where something else saved the model.

    That may be Trainer, TRL, or `save_pretrained` after a merge.

    Raises:
        NsaError: there is no such folder, it holds no sparse model, or its manifest is damaged or of another model.
    """
    if (check_folder(folder) / NAME).is_file() or not (folder / "config.json").is_file():
        return read(folder)
    read_config(folder)
    return None


def check(manifest: Any) -> None:
    """Makes sure that everything in a manifest of a known format is of the type that its readers expect.

    Raises:
        ValueError: naming what is not.
    """
    needed: Types = {"trained": bool, "exact_up_to": (int, NoneType), "source": dict, "tensors": dict}
    further: Types = {"model_type": str, "options": dict, "versions": dict, "companions": list, "files": dict}
    check_fields(manifest, needed, {**further, "choices": dict})
    source = manifest["source"]
    about: Types = {
        "kind": str,
        "revision": (str, NoneType),
        "license": str,
        "model_name": str,
        "files": dict,
        "left_out": dict,
    }
    check_fields(source, {"name": str}, about, "source.")
    for where, files in (("files", manifest.get("files", {})), ("source.files", source.get("files", {}))):
        for name, record in files.items():
            check_fields(record, {"bytes": int}, {"sha256": str, "header_sha256": str}, f"{where} {name}: ")
    tensor: Types = {"dtype": str, "shape": list, "from": str, hash_kind(manifest): str}
    for where, tensors in (("tensors", manifest["tensors"]), ("source.left_out", source.get("left_out", {}))):
        for name, record in tensors.items():
            check_fields(record, tensor, {"source": dict}, f"{where} {name}: ")
            if "source" in record:
                check_fields(record["source"], tensor, {}, f"{where} {name}: source: ")
    check_fields(manifest.get("options", {}), {}, {"rope_scaling": dict}, "options.")
    if scaling := manifest.get("options", {}).get("rope_scaling"):
        parse_rope_scaling(scaling)
    for name, choice in manifest.get("choices", {}).items():
        fields: Types = {"what": str, "which": str, "why": str, "options": dict, "given": bool}
        check_fields(choice, fields, {"hint": str, "cost": dict}, f"choices {name}: ")
    for name in manifest.get("companions", []):
        if not isinstance(name, str):
            raise ValueError(f"companions must hold names, got {name!r:.40}")


def check_fields(part: Any, needed: Types, further: Types, where: str = "") -> None:
    """Makes sure that the fields of a part of a manifest are there and of the types that are expected.

    Args:
        part: of the manifest.
        needed: types of the fields that it must have, by name.
        further: types of fields that it may have.
        where: names the part in the message.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(part, dict):
        raise ValueError(f"{where or 'it '}must be an object, got {type(part).__name__}")
    if lacking := [name for name in needed if name not in part]:
        raise ValueError(f"{where or 'it '}lacks {', '.join(lacking)}")
    for name, kinds in {**further, **needed}.items():
        # a bool is an int in Python, and not here
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if name in part and type(part[name]) not in allowed:
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
            raise ValueError(f"{where}{name} must be {names}, got {type(part[name]).__name__}")


def differences(manifest: Mapping[str, Any], tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors that are not what the manifest says: changed in a single bit, lost, or new.

    Args:
        manifest: of the model.
        tensors: all that the model's checkpoint holds, by name.
    """
    expected, kind = dict(manifest["tensors"]), hash_kind(manifest)
    wrong = []
    for name, tensor in tensors:
        record = {key: value for key, value in expected.pop(name, {}).items() if key != "source"}
        if not record or describe_tensor(tensor, record["from"], kind) != record:
            wrong.append(name)
    return sorted([*wrong, *expected])


def changed_files(manifest: Mapping[str, Any], folder: Path) -> list[str]:
    """Names of files that are not what the manifest says, or not there; files that were added since do not count."""
    return [
        name
        for name, record in manifest.get("files", {}).items()
        if not (folder / name).is_file() or describe_file(folder / name, whole=True) != record
    ]
