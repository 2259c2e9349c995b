"""The model card of a converted or trained folder, from the JSON results in it and from nothing else.

    render_card("out")       # out/README.md and its pictures

A section whose result is absent is absent from the card, and a figure that was not measured is a dash.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from .escaping import FILTERS, Markdown, escaped
from .evaluation import suites_of

TEMPLATE = "template.md.j2"
# The results that a card shows: name in the template, file in the folder.
RESULTS = {
    "verify": "verify.json",
    "training": "training.json",
    "evaluation": "eval.json",
    "inspection": "inspect.json",
}
SAMPLES = ("generate-long.json", "generate-chat.json")
SETTINGS = (
    "nsa_kernel_size",
    "nsa_kernel_stride",
    "nsa_block_size",
    "nsa_topk",
    "nsa_init_blocks",
    "nsa_local_blocks",
    "nsa_window_size",
    "nsa_selector",
    "nsa_selector_dim",
    "nsa_selector_bits",
    "nsa_compression",
    "nsa_rope_order",
    "nsa_branch_kv",
    "nsa_gate",
)

# The Hub's name of a model's task, by how its class ends.
TASKS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}

MARK = "nsa-hf card"
# Trainer asks whoever edits its card to take this out.
TRAINER = (
    "<!-- This model card has been generated automatically according to the information the Trainer had access to."
)

# What is raised by a result that has something else in a place than our commands write there.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class CardError(ValueError):
    """A folder of which no card can be made."""


def render_card(out: str | Path, overwrite: bool = False) -> Path:
    """Writes a folder's model card: README.md, and the pictures in it.

    Args:
        out: a converted or trained model's folder.
        overwrite: replace a README.md that somebody wrote, too, and not only one of ours or of Trainer's.

    Returns:
        The path of README.md.

    Raises:
        CardError: `out` is no converted folder, one of its results cannot be read, a package is missing, or README.md
            is somebody's.
    """
    folder = Path(out)
    manifest, config = read_model(folder)
    results = {name: read_result(folder / file) for name, file in RESULTS.items()}
    if results["evaluation"] is not None:
        results["evaluation"] = suites_of(results["evaluation"])
    samples = [sample for file in SAMPLES if (sample := read_result(folder / file))]
    try:
        from jinja2 import TemplateError

        from .pictures import draw_pictures, pictures_of
    except ImportError as error:
        raise CardError(f"a card needs the package {error.name}: pip install 'nsa-hf[eval]'") from error
    measured = results["training"], results["verify"], results["inspection"], results["evaluation"]
    path = folder / "README.md"
    try:
        pictures = [name for name, draw in pictures_of(*measured).items() if draw is not None]
        text = render_text(folder, manifest, config, results, samples, pictures)
        if os.path.lexists(path) and not overwrite and not is_generated(path):
            raise CardError(
                f"{path} was written, or edited, by hand, and the card would replace it: move it away, or give "
                "--overwrite"
            )
        draw_pictures(folder, *measured)
    except CardError:
        raise
    except (TemplateError, *MALFORMED) as error:
        raise CardError(f"a result in {folder} lacks what the card shows ({error}): run its command again") from error
    return replace_readme(folder, marked(text))


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and the config of a converted model; CardError when there is none."""
    manifest, config = read_result(folder / "manifest.json"), read_result(folder / "config.json")
    if manifest is None and str((config or {}).get("model_type")).startswith("nsa_"):
        manifest = empty_manifest(folder)
    if manifest is None or config is None:
        raise CardError(
            f"{folder} is no converted model: expected manifest.json and config.json, as nsa-hf convert writes"
        )
    return manifest, config


def render_text(
    folder: Path,
    manifest: dict[str, Any],
    config: dict[str, Any],
    results: dict[str, dict[str, Any] | None],
    samples: list[dict[str, Any]],
    pictures: list[str],
) -> str:
    """The card's text.

    Args:
        folder: the model's, whose name the card tells.
        manifest, config: see `read_model`.
        results: by their names in RESULTS; None for one that was not measured.
        samples: of generation.
        pictures: the names of those that are drawn.

    Raises:
        One of MALFORMED, or jinja2's TemplateError: a result lacks what the card shows of it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=escaped,
    )
    environment.filters.update(FILTERS)
    text = environment.get_template(TEMPLATE).render(
        manifest=manifest,
        trained=is_trained(manifest),
        config=config,
        settings={name: config[name] for name in SETTINGS if name in config},
        counts=count_tensors(manifest),
        title=title(manifest, folder),
        source_name=source_name(manifest),
        folder=folder.name,
        front_matter=front_matter(manifest, config),
        auto_class=f"AutoModel{head_of(config)}",
        pictures=pictures,
        samples=samples,
        **{**results, "training": training_rows(results["training"])},
    )
    return tidy(text)


def replace_readme(folder: Path, text: str) -> Path:
    """Writes README.md, whole or not at all; one that is a link is replaced, and what it points to stays."""
    path = folder / "README.md"
    temporary = path.with_name(".README.md.unfinished")
    temporary.unlink(missing_ok=True)  # never written through, should it be a link
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def marked(text: str) -> str:
    """The card with a last line, not shown, by which it is known again as long as nobody edits it."""
    return f"{text}\n<!-- {MARK} {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_generated(path: Path) -> bool:
    """Whether a README.md is a program's: a card of ours that nobody edited, or one that Trainer wrote."""
    if path.is_symlink():
        return False
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return text == marked(text.partition(f"\n<!-- {MARK} ")[0]) or TRAINER in text


def read_result(path: Path) -> dict[str, Any] | None:
    """A JSON result, None when it was not measured; CardError when it is damaged."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CardError(f"{path} is damaged ({error}): run the command that wrote it again") from error
    if not isinstance(content, dict):
        raise CardError(f"{path} is damaged: expected an object, got {type(content).__name__}")
    return content


def empty_manifest(folder: Path) -> dict[str, Any]:
    """In place of the manifest, which is missing where another program saved the model: Trainer, TRL, PEFT."""
    source: dict[str, Any] = {"name": folder.resolve().name, "kind": None, "revision": None, "files": {}}
    return {"trained": None, "source": source, "versions": {}, "tensors": {}}


def is_trained(manifest: dict[str, Any]) -> bool | None:
    """Whether the model was trained, by the run's record in the manifest; None where nothing is recorded."""
    trained, run = manifest["trained"], manifest.get("training")
    if trained is None:
        return None
    return (
        trained is True
        and isinstance(run, dict)
        and bool((run.get("steps") or run.get("merged")) and run.get("fingerprint"))
    )


def head_of(config: dict[str, Any]) -> str:
    """How the name of a model's class ends: one of TASKS."""
    names = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    return next((head for head in TASKS for name in names if name.endswith(head)), "ForCausalLM")


def front_matter(manifest: dict[str, Any], config: dict[str, Any]) -> str:
    """The card's YAML header, with what is known only."""
    source = manifest["source"]
    facts: dict[str, Any] = {}
    if source.get("license"):
        facts["license"] = source["license"]
    if source.get("revision"):  # only a Hub id has one
        facts["base_model"] = source["name"]
    facts |= {"library_name": "transformers", "pipeline_tag": TASKS[head_of(config)]}
    facts["tags"] = ["nsa", "native-sparse-attention", "sparse-attention", "long-context"]
    return Markdown(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).strip())


def source_name(manifest: dict[str, Any]) -> str:
    """The source as a reader elsewhere knows it: what it calls itself, its Hub id, or its folder's name."""
    source = manifest["source"]
    if source.get("revision"):
        return str(source["name"])
    return str(source.get("model_name") or Path(source["name"]).name)


def title(manifest: dict[str, Any], folder: Path) -> str:
    """The card's heading."""
    name = source_name(manifest).split("/")[-1] or folder.name
    return f"{name} with Native Sparse Attention"


def count_tensors(manifest: dict[str, Any]) -> dict[str, int]:
    """How many tensors are the source's and how many are new."""
    origins = [tensor["from"] for tensor in manifest["tensors"].values()]
    return {"source": origins.count("source"), "nsa": origins.count("nsa")}


# How the card names what a stage of training has in its loss, and what it trains.
LOSSES = {
    "ce_weight": "next token",
    "kl_weight": "KL to the dense teacher",
    "layer_weight": "error of each attention's output",
    "selector_weight": "the selector's loss",
}
TRAINED = {
    "nsa": "the NSA parameters alone",
    "qkvo": "the attention's projections",
    "qk": "the projections of queries and keys",
    "lora": "an adapter (LoRA), merged",
}


def training_rows(training: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result of training with what the card shows: "rows" by position, and "told", each stage to be told."""
    if training is None:
        return None
    held_out = training["held_out"]
    rows = list(zip(held_out["before"], held_out["after"], held_out["after_own_dense"], strict=True))
    stages = training.get("stages")
    if stages is None:  # of a run before there were stages
        config = training["config"]
        tokens = config["length"] * config["batch_size"] * config["accumulate"] * training["processes"]
        stages = [{**config, "steps": len(training["curve"]), "tokens_per_step": tokens}]
    return {**training, "rows": rows, "told": [told_stage(stage) for stage in stages]}


def told_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings with what the card tells of them: "lengths", "losses" (weight and name), "trained"."""
    length = stage["length"]
    return {
        **stage,
        "lengths": [entry["length"] for entry in length] if isinstance(length, list) else [length],
        "losses": [(stage[name], text) for name, text in LOSSES.items() if stage.get(name)],
        "trained": TRAINED.get(stage.get("trains", "all"), "all weights"),
    }


def tidy(text: str) -> str:
    """A text without repeated empty lines, and none at its end."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"
