"""Proves what a converted model kept of its dense source, on real long texts, and writes the figures to `verify.json`.

    from nsa_hf.conversion import verify
    verify("path/to/llama", "path/to/nsa")["exact"]

It shows three things:
- every dense tensor is the source's bit for bit, and every tensor and file is what the manifest says;
- in the exact range the logits equal those of Transformers' own dense class, both computed in float32;
- beyond it, how far the two models are apart, by position. (How both fit into little memory: compare/models.py.)

A trained model's tensors and files are held against what training recorded. A folder that something else saved
(Trainer, TRL, a merge) has no manifest; the result then says what is not proved.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedConfig

from nsa_hf.errors import NotPlain, NsaError, check_path
from nsa_hf.heads import auto_class
from nsa_hf.in_memory import on_same_weights

from . import manifest as manifests
from .compare.metrics import Accumulator, Bucket, position_edges
from .compare.models import compare_models, drop_decoder, final_states
from .compare.selectors import other_selector, selector_name
from .compare.texts import held_out_texts, provenance
from .compare.tokens import Window, has_tokenizer, token_windows
from .compare.weights import compare_tensors, matches_manifest
from .files.checkpoint import SafetensorsCheckpoint
from .files.loading import load_whole, read_config, reading, refuse_quantised, transformers_progress
from .files.staging import write_json
from .options import dtype_name
from .rope import added_scaling, scale_model
from .sources import Source, open_source
from .tensors import converted_tensors

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
    compare_selectors: bool = False,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Compares a converted model with its dense source and writes `out/verify.json`.

        >>> from nsa_hf.conversion import verify
        >>> folder = nsa_hf.convert("path/to/llama", "llama-nsa", topk=4)
        >>> verify("path/to/llama", folder, length=300, documents=1)["exact"]
        True

    Args:
        src: the dense source, as `convert` takes it.
        out: a folder that `convert` wrote, or one trained from it, here or elsewhere.
        length: tokens of each text; not more than the model's max_position_embeddings are taken.
        documents: how many of the texts.
        texts: (name, text) pairs; None takes files of Python's standard library that training leaves out.
        compare_selectors: also measure the same weights with the other way to choose blocks, see
            `compare.selectors.other_selector`.
        device: where both models run.
        revision, allow_pickle: as for `convert`.
        trust_remote_code: run the code that the source brings, as its dense model, and that of the tokenizer.
        progress: show bars on standard error.

    Returns:
        The result, JSON-able. `exact` is True or False, or None where it does not apply: a trained model that is as
        recorded, or one without a manifest that is not its source. `why` says what it rests on or what failed;
        `tensors`, `exact_range`, `by_position` hold the figures (see metrics.py for the rows). Without a manifest
        `trained`, `source_matches_manifest` and `tensors["unlike_manifest"]` are None. `other_selector` is None unless
        `compare_selectors`: its `name`, the model's own in `instead_of`, and rows `by_position` as the model's.

    Raises:
        NsaError: the source or the checkpoint is not as it must be, the texts are too short, or a comparison of
            selectors was asked for where the family has no channels to choose by.
    """
    began = time.perf_counter()
    check_whole_number("length", length, 2, 1 << 24)
    check_whole_number("documents", documents, 1, 10_000)
    out = check_path(out)
    with transformers_progress(progress):
        manifest = manifests.find(out)
        source = open_source(src, revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        checkpoint = SafetensorsCheckpoint(out)
        config = read_config(out)
        refuse_quantised(out, config)
        try:
            configs = [config, *([other_selector(config)] if compare_selectors else [])]
        except NotPlain as reason:
            raise NsaError(f"selectors cannot be compared: {reason}") from reason
        length = min(length, getattr(config, "max_position_embeddings", None) or length)
        texts = list(held_out_texts() if texts is None else texts)
        windows = token_windows(out, texts, length, documents, config.vocab_size, trust_remote_code)
        expected = converted_tensors(config)
        tensors = compare_tensors(source, checkpoint, manifest, expected.dense.keys() | expected.fused.keys())
        source_matches = matches_manifest(source, manifest)
        changed_files = [] if manifest is None else manifests.changed_files(manifest, out)
        scaling = scaling_of(manifest, source.config, config)
        comparison, *others = compare_with_source(source, out, configs, scaling, windows, device, progress)
    exact_range = comparison.between(0, min(config.nsa_sizes.exact_tokens, length))
    exact, why = judge(manifest, tensors, exact_range, changed_files)
    if exact and manifest is None and scaling:
        exact, why = None, f"not proved: its config scales RoPE, and the source's does not; scaled alike, {why}"
    texts_read = [(name, text) for name, text in texts if name in {window for window, _ in windows}]
    result = {
        "format": 1,
        "exact": exact,
        "why": why,
        "source": str(src),
        "source_matches_manifest": source_matches,
        "trained": None if manifest is None else manifests.is_trained(manifest),
        "model_type": config.model_type,
        "rope_scaling": scaling,
        "checkpoint_dtype": dtype_name(weights_dtype(config)),
        "computed_in": "float32",
        "device": str(device),
        "length": length,
        "documents": [{"name": name, "tokens": ids.shape[1]} for name, ids in windows],
        "texts": provenance(texts_read) if texts_read else None,
        "tensors": tensors,
        "changed_files": changed_files,
        "exact_range": {
            **exact_range.as_dict(),
            "up_to": config.nsa_sizes.exact_tokens,
            "tolerance": LOGIT_TOLERANCE,
            "tie": TIE,
        },
        "by_position": comparison.as_dict(),
        "other_selector": {
            "name": selector_name(configs[1]),
            "instead_of": selector_name(config),
            "by_position": others[0].as_dict(),
        }
        if others
        else None,
        "versions": manifests.versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / RESULT, result)
    return result


def check_whole_number(name: str, value: Any, least: int, most: int) -> None:
    """Makes sure that an option is a whole number within bounds.

    Args:
        name: of the option.
        value: that was given for it.
        least: the smallest that is allowed.
        most: the largest that is allowed.

    Raises:
        NsaError: it is not; names the option.
    """
    if not isinstance(value, int) or not least <= value <= most:
        raise NsaError(f"{name} must be an int of at least {least} and at most {most:,}, got {value!r}")


def scaling_of(
    manifest: dict[str, Any] | None, dense: PreTrainedConfig, sparse: PreTrainedConfig
) -> dict[str, Any] | None:
    """The RoPE scaling that the conversion added, which the source needs too to compute the same; see rope.py.

    Args:
        manifest: of the converted model. Without it, or where it has no options, the configs are compared.
        dense: the source's config.
        sparse: the converted model's config.
    """
    options = (manifest or {}).get("options")
    return options.get("rope_scaling") if options else added_scaling(dense, sparse)


def weights_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype of a checkpoint's weights."""
    return config.dtype or torch.float32


def compare_with_source(
    source: Source,
    out: Path,
    configs: Sequence[PreTrainedConfig],
    scaling: dict[str, Any] | None,
    windows: Sequence[Window],
    device: str | torch.device,
    progress: bool,
) -> list[Accumulator]:
    """Compares the converted model's logits with the dense model's, in float32, one model in memory at a time.

    Args:
        source: the dense model.
        out: the converted model's folder.
        configs: the converted model's config, and others that its weights are run with as well.
        scaling: RoPE scaling that the dense model gets, as the converted one has it.
        windows: the texts, all of one length.
        device: where both models run.
        progress: show bars on standard error.

    Returns:
        The comparison with each config.
    """
    config, *others = configs
    windows = [(name, ids.to(device)) for name, ids in windows]
    dense = source.load_model(weights_dtype(config))
    if scaling:
        dense = scale_model(dense, scaling)
    dense = dense.float().to(device)
    dense_states = final_states(dense, windows, progress="Dense model" if progress else None)
    drop_decoder(dense)
    with reading(out):
        sparse = load_whole(out, auto_class(config), dtype=weights_dtype(config)).float().to(device)
    models = [sparse, *(on_same_weights(type(sparse), other, sparse) for other in others)]
    states = [final_states(model, windows, progress="NSA model" if progress else None) for model in models]
    for model in models:
        drop_decoder(model)
    edges = position_edges(windows[0][1].shape[1], [config.nsa_sizes.exact_tokens])
    predicts = has_tokenizer(out) and auto_class(config) is AutoModelForCausalLM
    return [
        compare_models(dense, dense_states, model, of_model, windows, edges, is_text=predicts)
        for model, of_model in zip(models, states, strict=True)
    ]


def judge(
    manifest: dict[str, Any] | None, tensors: dict[str, Any], exact_range: Bucket, changed_files: Sequence[str] = ()
) -> tuple[bool | None, str]:
    """Whether the conversion is exact.

    Args:
        manifest: of the converted model; None where it has none.
        tensors: what `compare_tensors` gave.
        exact_range: the comparison of logits in the first tokens; a difference that is NaN is a failure.
        changed_files: config, tokenizer and other files beside the weights that are not what the manifest says.

    Returns:
        True, False, or None where it does not apply (see `verify`), and the reason.
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
    difference, lead = exact_range.max_abs_diff, exact_range.top1_gap
    if not difference < LOGIT_TOLERANCE:
        faults.append(f"a logit within the exact range differs by {difference:.3g}, more than {LOGIT_TOLERANCE:g}")
    if not lead <= TIE:
        faults.append(f"the top token within the exact range differs where the dense model leads by {lead:.3g}")
    if manifest is None and faults:
        return None, f"not proved: {'; '.join(faults)}; by training or by damage: there is no manifest.json to tell"
    if faults:
        return False, "; ".join(faults)
    kept = "all tensors kept, and logits equal within the exact range"
    return True, f"{kept}; {NOTHING_VOUCHES}" if manifest is None else kept


def render_verify(result: dict[str, Any]) -> RenderableType:
    """The result as rich tables, for `rich.print`.

    >>> from nsa_hf.conversion import render_verify, verify
    >>> folder = nsa_hf.convert("path/to/llama", "llama-nsa", topk=4)
    >>> tables = render_verify(verify("path/to/llama", folder, length=300, documents=1))
    """
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
    return Group(facts, table, *([compared_selectors(result)] if result.get("other_selector") else []))


def compared_selectors(result: dict[str, Any]) -> Table:
    """The model beside the same weights with the other selector, as a table."""
    other = result["other_selector"]
    table = Table(title="The same weights, blocks chosen otherwise")
    table.add_column("positions", justify="right", no_wrap=True)
    names = (other["instead_of"], other["name"])
    for column in (*(f"{name}\nppl" for name in names), *(f"{name}\nKL" for name in names)):
        table.add_column(column, justify="right")
    for own, row in zip(result["by_position"], other["by_position"], strict=True):
        ppl = (_number(one["ppl"], ".3f") for one in (own, row))
        kl = (_number(one["kl"], "z.5f") for one in (own, row))
        table.add_row(f"{row['from']:,} - {row['to']:,}", *ppl, *kl)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
