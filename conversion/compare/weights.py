"""A converted model's tensors held against its source's and against its manifest."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from .. import manifest as manifests
from ..files.checkpoint import SafetensorsCheckpoint
from ..files.hashes import hash_tensor
from ..files.pieces import same_bits
from ..sources import Source


def compare_tensors(
    source: Source, checkpoint: SafetensorsCheckpoint, manifest: dict[str, Any] | None, expected: AbstractSet[str]
) -> dict[str, Any]:
    """How many of the source's tensors the checkpoint holds bit for bit, and whether its tensors are the manifest's.

    A tensor that was converted to another dtype is compared with the source's tensor in that dtype.

    Args:
        source: the dense model.
        checkpoint: the converted model's weights.
        manifest: of the converted model; None where it has none.
        expected: names of the dense tensors that the converted model's config asks for.

    Returns:
        JSON-able: `kept`, the number of tensors with the source's bits, `of` how many; `changed`, the names of the
        others; `written`, the number of the checkpoint's tensors; `unlike_manifest`, the names of those that are not
        what the manifest says, None without a manifest.
    """
    kept, compared, changed = 0, 0, []
    for name, tensor in source.stored():
        if name not in checkpoint.table:
            if name not in expected:  # a copy of a tied tensor, or one that the family ignores
                continue
            changed.append(name)
        else:
            same = same_bits(tensor.to(checkpoint.table[name].dtype), checkpoint.read(name))
            kept += same
            if not same:
                changed.append(name)
        compared += 1
    return {
        "kept": kept,
        "of": compared,
        "changed": changed,
        "written": len(checkpoint.table),
        "unlike_manifest": None if manifest is None else manifests.differences(manifest, checkpoint.tensors()),
    }


def matches_manifest(source: Source, manifest: dict[str, Any] | None) -> bool | None:
    """Whether the source is the one that the conversion read, by the hashes of its files and tensors.

    Args:
        source: the dense model.
        manifest: of the converted model; None where it has none.

    Returns:
        None where there is no manifest, or it names no files of its source.
    """
    if manifest is None or not manifest["source"].get("files"):
        return None
    if source.identity()["files"] != manifest["source"]["files"]:
        return False
    records = {**manifest["tensors"], **manifest["source"].get("left_out", {})}
    kind = manifests.hash_kind(manifest)
    # where a tensor was cast or trained, the record of what was read is inside its own
    hashes = {
        name: record.get("source", record)[kind] for name, record in records.items() if record["from"] == "source"
    }
    return all(hashes.get(name) == hash_tensor(tensor, kind) for name, tensor in source.tensors())
