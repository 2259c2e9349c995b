"""Makes a dense checkpoint of a sparse one: the same weights without the new parameters, with the dense config.

    from nsa_hf.conversion import export_dense
    export_dense("path/to/nsa", "path/to/dense")

An untrained conversion gives every tensor back bit for bit, and each is checked against the hash that the manifest has
of it. After training the weights are those that were trained to run sparse: exported, they run dense without the
branches they learned to use, and the report says what was measured of that. A folder that something else saved
(Trainer, TRL, a merge) has no manifest: it goes back too, and the report says that nothing was checked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from nsa_hf.errors import NsaError, check_path
from nsa_hf.registration import PREFIX

from . import manifest as manifests
from .files.checkpoint import SafetensorsCheckpoint
from .files.hashes import HASH
from .files.loading import read_config, reading, refuse_quantised, transformers_progress
from .files.model_folder import copy_file, refuse_adapter
from .files.pieces import same_bits
from .files.plain_json import read_json
from .files.shards import ShardWriter, check_space
from .files.staging import check_output, staged_folder, write_json
from .sources import open_source
from .tensors import converted_tensors

RESULT = "export.json"


def export_dense(
    src: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str | int = "2GB",
    progress: bool = False,
) -> dict[str, Any]:
    """Writes the dense model that an NSA checkpoint holds.

        >>> from nsa_hf.conversion import export_dense
        >>> report = export_dense(nsa_hf.convert("path/to/llama", "llama-nsa"), "llama-again")
        >>> report["as_in_source"] == report["tensors"]
        True

    Args:
        src: a folder that `convert` wrote, or one trained from it, here or elsewhere.
        out: the folder to write; new or empty unless `overwrite`.
        overwrite: replace the model in `out`; it stays until the new one is complete.
        max_shard_size: largest safetensors file, in bytes or like "2GB".
        progress: show Transformers' own bars.

    Returns:
        The report, also in `out/export.json`: `model_type`, `trained`, `tensors` written, `as_in_source` (how many of
        them are bit for bit what the source held), `dropped` (new parameters left out), `companions` (the
        files copied along), and of a trained model
        `perplexity`, rows by position with `dense` (these weights as exported) and `sparse` (as trained), or None where
        training measured nothing. Without a manifest `trained` and `as_in_source` are None.

    Raises:
        NsaError: `src` is no NSA checkpoint or is damaged, or `out` cannot be written; nothing is left behind then.
    """
    src, out = check_path(src), check_path(out)
    with transformers_progress(progress):
        check_output(out, overwrite, keep=(src,))
        refuse_adapter(src)
        manifest = manifests.find(src)
        config = read_config(src)
        refuse_quantised(src, config)
        checkpoint = SafetensorsCheckpoint(src)
        expected = converted_tensors(config).as_stored(checkpoint.table)
        added = set(map(place_of, expected.added))
        dense = {name: info for name, info in checkpoint.table.items() if place_of(name) not in added}
        table = {name: dense[name] for name in expected.check(dense, str(src))}
        for copy, original in expected.tied.items():
            if copy in dense and not same_bits(checkpoint.read(copy), checkpoint.read(original)):
                raise NsaError(
                    f"{src}: its config ties {copy} to {original}, but it holds two different tensors: set "
                    "tie_word_embeddings to false in its config.json, or drop one"
                )
        kind = HASH if manifest is None else manifests.hash_kind(manifest)
        with (
            staged_folder(out, overwrite) as stage,
            ShardWriter(stage, table, max_shard_size, hash_kind=kind) as writer,
        ):
            check_space(stage, writer.bytes_to_come)
            for piece in checkpoint.pieces(table):
                piece.uses.append(writer.put(piece.name, piece.start, piece.values))
            writer.finish()
            report = _report(src, manifest, config.model_type, writer.hashes)
            report["dropped"] = sum(torch.Size(shape).numel() for shape in expected.added.values())
            config.to_dense_config().save_pretrained(stage)
            if manifest is None:
                report["companions"] = open_source(src).save_companions(stage)
            else:
                report["companions"] = manifest.get("companions", [])
                for name in report["companions"]:
                    if (stage / name).exists():
                        raise NsaError(f"{src}: its manifest calls {name} a companion: convert again")
                    copy_file(src, name, stage)
            write_json(stage / RESULT, report)
    return report


def place_of(name: str) -> tuple[str, ...]:
    """Where a tensor is, by its name: the same whether a layer's parts have the model's names or the checkpoints'.

    What Transformers saves of a trained model has a family's old names, where there are such, in front of `.nsa.` too.
    """
    family, nsa, own = name.partition(".nsa.")
    return (*re.findall(r"\d+", family), own) if nsa else (name,)


def _report(src: Path, manifest: dict[str, Any] | None, model_type: str, hashes: dict[str, str]) -> dict[str, Any]:
    """The report but for what was left out.

    Args:
        src: the sparse model's folder.
        manifest: its manifest; None where it has none.
        model_type: of the sparse model.
        hashes: of the tensors that were written, by name.

    Raises:
        NsaError: a tensor is not what the manifest says.
    """
    report = {"model_type": model_type.removeprefix(PREFIX), "trained": None, "tensors": len(hashes)}
    if manifest is None:
        return {**report, "as_in_source": None, "perplexity": None}
    records, kind = {name: manifest["tensors"].get(name, {}) for name in hashes}, manifests.hash_kind(manifest)
    changed = sorted(name for name in hashes if records[name].get(kind) != hashes[name])
    if changed:
        raise NsaError(
            f"{src}: {len(changed)} tensors are not what its manifest says, {changed[0]} for one: take a copy that is "
            "not damaged, or make it again (if they were changed deliberately, remove its manifest.json)"
        )
    report["trained"] = manifests.is_trained(manifest)
    # what the source held is the record itself, or where it was cast or trained the one inside it
    source_hashes = {
        name: record.get("source", {} if report["trained"] else record).get(kind) for name, record in records.items()
    }
    as_in_source = sum(source_hashes[name] == hashes[name] for name in hashes)
    report["as_in_source"] = as_in_source if all(source_hashes.values()) else None
    return {**report, "perplexity": _perplexity(src)} if report["trained"] else report


def _perplexity(src: Path) -> list[dict[str, Any]] | None:
    """The perplexities of these weights run dense and sparse, by position, that training measured on held-out texts."""
    path = src / "training.json"
    if not path.is_file():
        return None
    with reading(path):
        rows = read_json(path)["held_out"]["after_own_dense"]
        return [
            {"from": row["from"], "to": row["to"], "dense": row["ppl_reference"], "sparse": row["ppl"]} for row in rows
        ]


def render_export(report: dict[str, Any]) -> RenderableType:
    """The report as rich tables, for `rich.print`.

    >>> from nsa_hf.conversion import export_dense, render_export
    >>> tables = render_export(export_dense(nsa_hf.convert("path/to/llama", "llama-nsa"), "llama-again"))
    """
    facts = Table(title=f"Dense {escape(report['model_type'])}", show_header=False)
    tensors = f"{report['as_in_source']} of {report['tensors']} bit for bit the source's"
    if report["as_in_source"] is None:
        tensors = f"{report['tensors']}; what the source held is not known: no manifest.json says so"
    facts.add_row("Tensors", tensors)
    facts.add_row("Left out", f"{report['dropped']:,} parameters: compression and gates")
    if report["trained"] is False:
        return facts
    since = "these weights were trained to run sparse" if report["trained"] else "if these weights were trained since"
    facts.add_row(
        "Trained",
        f"{since}; dense, the compressed branch, the window and the gates that they learned to use are gone",
    )
    if report["perplexity"] is None:
        facts.add_row("Perplexity", "not measured: the folder has no training.json; compare with `nsa-hf eval`")
        return facts
    table = Table(title="Perplexity on held-out texts, measured by the training run")
    for column in ("positions", "sparse, as trained", "dense, as exported"):
        table.add_column(column, justify="right")
    for row in report["perplexity"]:
        table.add_row(f"{row['from']:,} - {row['to']:,}", f"{row['sparse']:.3f}", f"{row['dense']:.3f}")
    return Group(facts, table)
