"""The proof: what an NSA checkpoint kept of its dense source, measured on real long texts and written to `verify.json`.

    from nsa_hf.conversion import verify
    verify("path/to/llama", "path/to/nsa")["exact"]

Three things: every dense tensor is bit for bit the source's, and every tensor and file is what the manifest says; up
to topk * block_size tokens the logits equal the dense model's (in float32, Transformers' own dense class against ours);
and beyond, how far the two are apart by position. See compare.py for how this fits into little memory.

Of a trained model every tensor and file is held against what training recorded. A folder that something else saved
(Trainer, TRL, a merge) has no manifest: what then cannot be proved is said.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from nsa_hf.errors import NsaError, check_path

from . import manifest as manifests
from .compare.metrics import NO_LABEL, Accumulator, position_edges
from .compare.models import compare_logits, final_hidden, has_tokenizer, next_tokens, token_windows
from .compare.texts import held_out_texts, provenance
from .files.checkpoint import SafetensorsCheckpoint, hash_tensor, same_bits
from .files.loading import load_whole, read_config, reading, transformers_progress
from .files.staging import write_json
from .layout import dtype_name, layout_of
from .rope import added_scaling, scale_model
from .sources import Source, open_source

RESULT = "verify.json"

# Both models compute the same sums in float32 in another order; on SmolLM2 logits then differ by 1e-4 at most.
LOGIT_TOLERANCE = 1e-3
# Where the top token differs although the dense model's own lead is smaller than this, rounding has turned a tie.
TIE = 1e-4

AS_RECORDED = "trained: differs from its source as recorded"
NO_RECORD = "its manifest says that it was trained, and has no record of a run"
NOTHING_VOUCHES = "no manifest.json, so nothing vouches for the new parameters and the other files"


def verify(
    src: str | Path,
    out: str | Path,
    *,
    length: int = 2048,
    documents: int = 2,
    texts: Sequence[tuple[str, str]] | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Compares an NSA checkpoint with its dense source and writes `out/verify.json`.

    Args:
        src: the dense source, as `convert` takes it.
        out: a folder that `convert` wrote, or one trained from it, here or elsewhere.
        length: tokens of each text; not more than the model's max_position_embeddings are taken.
        documents: how many of the texts.
        texts: (name, text) pairs; None takes files of Python's standard library that training leaves out.
        device: where both models run.
        revision, allow_pickle: as for `convert`.
        trust_remote_code: run the code that the source brings, as its dense model, and that of the tokenizer.
        progress: show bars on standard error.

    Returns:
        The result, JSON-able. `exact` is True or False, or None where it does not apply: a trained model that is as
        recorded, or one without a manifest that is not its source. `why` says what it rests on or what failed;
        `tensors`, `exact_range`, `by_position` hold the figures (see metrics.py for the rows). Without a manifest
        `trained`, `source_matches_manifest` and `tensors["unlike_manifest"]` are None.

    Raises:
        NsaError: the source or the checkpoint is not as it must be, or the texts are too short.
    """
    began = time.perf_counter()
    for name, value, least, most in (("length", length, 2, 1 << 24), ("documents", documents, 1, 10_000)):
        if not isinstance(value, int) or not least <= value <= most:
            raise NsaError(f"{name} must be an int of at least {least} and at most {most:,}, got {value!r}")
    out = check_path(out)
    with transformers_progress(progress):
        manifest = manifests.find(out)
        source = open_source(src, revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        checkpoint = SafetensorsCheckpoint(out)
        config = read_config(out)
        length = min(length, getattr(config, "max_position_embeddings", None) or length)
        chosen = list(held_out_texts() if texts is None else texts)
        windows = token_windows(out, chosen, length, documents, config.vocab_size, trust_remote_code)
        layout = layout_of(config)
        tensors = compare_tensors(source, checkpoint, manifest, layout.dense.keys() | layout.fused.keys())
        source_matches = matches_manifest(source, manifest)
        changed_files = [] if manifest is None else manifests.changed_files(manifest, out)
        dtype = config.dtype or torch.float32
        dense = source.load_model(dtype)
        options = (manifest or {}).get("options")
        scaling = options.get("rope_scaling") if options else added_scaling(source.config, config)
        if scaling:
            dense = scale_model(dense, scaling)
        dense = dense.float().to(device)
        dense_hidden = final_hidden(dense, windows, "Dense model", progress)
        with reading(out):
            sparse = load_whole(out, dtype=dtype).float().to(device)
        sparse_hidden = final_hidden(sparse, windows, "NSA model", progress)
    exact_tokens = config.nsa_sizes.exact_tokens
    comparison = Accumulator(position_edges(length, [exact_tokens]))
    for (_, ids), reference, hidden in zip(windows, dense_hidden, sparse_hidden, strict=True):
        labels = next_tokens(ids) if has_tokenizer(out) else torch.full_like(ids[0], NO_LABEL)
        compare_logits(comparison, labels.to(device), dense, reference, sparse, hidden)
    exact_range = comparison.between(0, min(exact_tokens, length))
    exact, why = judge(manifest, tensors, exact_range.max_abs_diff, exact_range.top1_gap, changed_files)
    if exact and manifest is None and scaling:
        exact, why = None, f"not proved: its config scales RoPE, and the source's does not; scaled alike, {why}"
    read = {name for name, _ in windows}
    used = [text for text in chosen if text[0] in read]
    result = {
        "format": 1,
        "exact": exact,
        "why": why,
        "source": str(src),
        "source_matches_manifest": source_matches,
        "trained": None if manifest is None else manifests.is_trained(manifest),
        "model_type": config.model_type,
        # the source was given the same, see rope.py
        "rope_scaling": scaling,
        "checkpoint_dtype": dtype_name(dtype),
        "computed_in": "float32",
        "device": str(device),
        "length": length,
        "documents": [{"name": name, "tokens": ids.shape[1]} for name, ids in windows],
        "texts": provenance(used) if used else None,
        "tensors": tensors,
        "changed_files": changed_files,
        "exact_range": {**exact_range.as_dict(), "up_to": exact_tokens, "tolerance": LOGIT_TOLERANCE, "tie": TIE},
        "by_position": comparison.as_dict(),
        "versions": manifests.versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / RESULT, result)
    return result


def compare_tensors(
    source: Source, checkpoint: SafetensorsCheckpoint, manifest: dict[str, Any] | None, dense: AbstractSet[str]
) -> dict[str, Any]:
    """How many of the source's tensors the checkpoint holds bit for bit, and whether its tensors are the manifest's.

    A tensor that was converted to another dtype is compared with the source's tensor in that dtype.

    Args:
        dense: names of the tensors that the config asks for.
    """
    kept, of, changed = 0, 0, []
    for name, tensor in source.stored():
        if name not in checkpoint.table:
            if name not in dense:  # a tied copy, or one that the family ignores
                continue
            changed.append(name)
        else:
            target = tensor.to(checkpoint.table[name].dtype)
            kept += (same := same_bits(target, checkpoint.read(name)))
            if not same:
                changed.append(name)
        of += 1
    wrong = None if manifest is None else manifests.differences(manifest, checkpoint.tensors())
    return {
        "kept": kept,
        "of": of,
        "changed": changed,
        "written": len(checkpoint.table),
        "unlike_manifest": wrong,
    }


def matches_manifest(source: Source, manifest: dict[str, Any] | None) -> bool | None:
    """Whether the source's files and tensors are those that the manifest was written of; None if it names none."""
    if manifest is None or not manifest["source"].get("files"):
        return None
    if source.identity()["files"] != manifest["source"]["files"]:
        return False
    tensors, kind = {**manifest["tensors"], **manifest["source"].get("left_out", {})}, manifests.hash_kind(manifest)
    hashes = {name: said.get("source", said)[kind] for name, said in tensors.items() if said["from"] == "source"}
    return all(hashes.get(name) == hash_tensor(tensor, kind) for name, tensor in source.tensors())


def judge(
    manifest: dict[str, Any] | None,
    tensors: dict[str, Any],
    difference: float,
    gap: float,
    changed_files: Sequence[str] = (),
) -> tuple[bool | None, str]:
    """Whether the conversion is exact, and why.

    Args:
        difference: largest absolute difference of a logit within the exact range; NaN is a failure.
        gap: largest lead of the dense model's top token where the other's differs, within the exact range.
        changed_files: config, tokenizer and other files beside the weights that are not what the manifest says.
    """
    trained = manifest is not None and manifests.is_trained(manifest)
    unlike = []
    if tensors["unlike_manifest"]:
        unlike.append(f"{len(tensors['unlike_manifest'])} tensors are not the manifest's")
    if changed_files:
        unlike.append(f"{', '.join(changed_files)} changed since the {'training' if trained else 'conversion'}")
    if trained:
        return (False, f"not as trained: {'; '.join(unlike)}") if unlike else (None, AS_RECORDED)
    faults = [NO_RECORD] if manifest is not None and manifest["trained"] else []
    if tensors["kept"] != tensors["of"]:
        faults.append(f"{tensors['of'] - tensors['kept']} of {tensors['of']} tensors are not the source's")
    faults += unlike
    if not difference < LOGIT_TOLERANCE:
        faults.append(f"a logit within the exact range differs by {difference:.3g}, more than {LOGIT_TOLERANCE:g}")
    if not gap <= TIE:
        faults.append(f"the top token within the exact range differs where the dense model leads by {gap:.3g}")
    if manifest is None and faults:
        return None, f"not proved: {'; '.join(faults)}; by training or by damage: there is no manifest.json to tell"
    if faults:
        return False, "; ".join(faults)
    kept = "all tensors kept, and logits equal within the exact range"
    return True, f"{kept}; {NOTHING_VOUCHES}" if manifest is None else kept


def render_verify(result: dict[str, Any]) -> RenderableType:
    """The result as rich tables, for `rich.print`."""
    tensors, exact = result["tensors"], result["exact_range"]
    verdict = {True: "[green]exact[/]: ", False: "[red]NOT exact[/]: ", None: ""}[result["exact"]]
    facts = Table(title=f"{escape(result['source'])} and its {result['model_type']}", show_header=False)
    facts.add_row(f"Up to {exact['up_to']:,} tokens", f"{verdict}{escape(result['why'])}")
    if scaling := result.get("rope_scaling"):
        facts.add_row(
            "Source's RoPE", f"scaled as the converted one: {scaling['rope_type']}, factor {scaling['factor']:g}"
        )
    facts.add_row("Tensors kept bit for bit", f"{tensors['kept']} of {tensors['of']}")
    if tensors["unlike_manifest"] is not None:
        facts.add_row(
            "Tensors as in the manifest",
            f"{tensors['written'] - len(tensors['unlike_manifest'])} of {tensors['written']}",
        )
    facts.add_row(
        "Texts", ", ".join(f"{escape(text['name'])} ({text['tokens']:,} tokens)" for text in result["documents"])
    )
    table = Table(title=f"By position, computed in {result['computed_in']}")
    for column in ("positions", "tokens", "dense\nppl", "NSA\nppl", "KL", "same\ntop-1", "logits\ndiffer"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["by_position"]:
        cells = (
            _number(row["ppl_reference"], ".3f"),
            _number(row["ppl"], ".3f"),
            _number(row["kl"], "z.5f"),
            _number(row["same_top1"], ".2%"),
            _number(row["max_abs_diff"], ".1e"),
        )
        table.add_row(f"{row['from']:,} - {row['to']:,}", f"{row['tokens']:,}", *cells)
    return Group(facts, table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
