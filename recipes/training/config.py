"""The settings of a training run: one YAML file, and `key=value` overrides behind it.

nsa-hf train recipes/runs/adapt.yaml model=build/nsa out=build/trained

A run has one stage or several: each entry of `stages` has the settings that differ in that stage from those around it.
What is left to the machine or the model ("auto", 0 windows a batch, no rate) is settled in stages.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nsa_hf.errors import NsaError, check_path

from .values import Blocks, Lengths, Names, Sources, StageList, check_value, parse_value, shortened, shown


def setting(help: str, default: Any = MISSING) -> Any:
    """A field of RunConfig with its help text; required where it has no default."""
    metadata = {"help": help}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """One continued pretraining run. Lengths are in tokens, rates are AdamW's, `steps` are optimizer steps."""

    model: str = setting("folder of the converted model; it stays as it is")
    out: str = setting("folder for the trained model; must not hold another run")
    stages: StageList = setting("one entry a stage, with the settings that differ in it; none: one stage", [])

    data: Sources = setting(
        "training text: 'stdlib', a text file, a folder, a .jsonl, .json, .parquet or .csv with 'text', "
        "hub:owner/name; or a mixture, [{source: a, weight: 2}, {source: b, weight: 1, text_column: body}]",
        "stdlib",
    )
    length: Lengths = setting("tokens of a training window; or a mixture, [{length: 2048, weight: 1}, ...]", 2048)
    pack: bool = setting("short documents share a window, each attending to itself only; false drops them", True)
    held_out: str = setting(
        "evaluation text: one source, with its texts in 'text'; of 'stdlib' the files training never sees", "stdlib"
    )
    held_out_documents: int = setting("held-out documents evaluated before and after", 2)
    held_out_length: int = setting("tokens of each; 0: as the longest training window", 0)

    tokens: int = setting("tokens to train on, in the place of steps: as many steps as read them; 0: steps says", 0)
    steps: int = setting("optimizer steps", 100)
    batch_size: int = setting("windows per process and forward pass; 0: 32,768 tokens on a GPU, a window on a CPU", 0)
    accumulate: int = setting("forward passes per optimizer step", 1)

    trains: str = setting(
        "'all' weights; or of the backbone 'nsa' nothing, 'qkvo' or 'qk' those projections, 'lora' an adapter; the NSA "
        "parameters beside it, see lr_nsa",
        "all",
    )
    lora_rank: int = setting("rank of the adapter", 16)
    lora_alpha: float = setting("the adapter counts alpha / rank", 32.0)
    lora_targets: Names = setting("linear layers that have one; none: the attention's q, k, v and o", [])
    attention: str = setting("'sparse', or 'dense': a control, the dense model continued on the same tokens", "sparse")
    topk_start: Blocks = setting("nsa_topk falls from this, or 'all', to the model's; 0: it is the model's", 0)
    topk_steps: int = setting("steps over which it falls, in halvings", 0)
    gate_blend_steps: int = setting("steps over which nsa_gate_blend rises to 1 (nsa_gate 'blend'); 0 leaves it", 0)

    ce_weight: float = setting("weight of the next-token loss", 0.0)
    kl_weight: float = setting("weight of KL(teacher || student); the teacher is the converted model run dense", 1.0)
    layer_weight: float = setting("weight of each attention's error beside the teacher's, relative to its size", 0.0)
    selector_weight: float = setting("weight of the selector's loss, for compressors that score blocks", 0.0)
    selector_loss: str = setting("'kl' to the dense attention's mass a block; 'bce' on its top blocks", "kl")
    selector_queries: int = setting("queries a layer and text that the selector's loss looks at", 256)

    lr_nsa: float | None = setting(
        "peak rate of the NSA parameters, 0 freezes them; none: 1e-3 where they are in use, else 0", None
    )
    lr_backbone: float = setting("peak rate of all other parameters, or of the adapter; 0 freezes them", 2e-5)
    schedule: str = setting("'cosine', or 'wsd': the peak rates until the last decay_share of the steps", "cosine")
    decay_share: float = setting("share of the steps in which 'wsd' lets the rates fall, linearly", 0.2)
    warmup_steps: int = setting("steps over which the rates rise from zero", 3)
    min_lr_ratio: float = setting("share of the peak rates at which they end", 0.1)
    beta1: float = setting("AdamW's first decay", 0.9)
    beta2: float = setting("AdamW's second decay", 0.95)
    adam_eps: float = setting("AdamW's epsilon: entries with smaller gradients move less than the rate", 1e-8)
    weight_decay: float = setting("decay of the backbone's matrices; norms, biases and NSA parameters have none", 0.0)
    max_grad_norm: float = setting("norm at which gradients are clipped", 1.0)

    mixed_precision: str = setting(
        "autocast, weights and optimizer stay fp32: 'no' (fp32), 'bf16', 'fp16'; 'auto': bf16 on a GPU that has it",
        "auto",
    )
    teacher: str = setting(
        "'dense': the converted model run dense; 'none': of a model from scratch, whose held-out figures stand beside "
        "its own weights run dense",
        "dense",
    )
    teacher_dtype: str = setting("'float32', 'bfloat16'; 'auto': bfloat16 where mixed_precision is bf16", "auto")
    compile: str = setting("torch.compile of the layers: 'yes', 'no'; 'auto': on a GPU", "auto")
    gradient_checkpointing: int = setting("every how many layers activations are recomputed, to save memory; 0 none", 0)
    loss_chunk: int = setting("positions whose logits exist at one time; 0: as many as suit the device", 0)
    deterministic: bool = setting("the same weights from the same settings; on a GPU this may cost speed", True)

    save_every: int = setting("steps between checkpoints; 0: only where a stage begins", 100)
    keep: int = setting("checkpoints kept while running, at least two: one to go back to when the last is damaged", 2)
    log_every: int = setting("steps between progress lines", 1)
    trackers: Names = setting("where else the curve is written: tensorboard, wandb", [])
    trust_remote_code: bool = setting("run the code of its own that the model's tokenizer may have", False)
    seed: int = setting("order of the text and every random number", 0)

    def as_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)

    def of_stages(self) -> list[RunConfig]:
        """The settings of each stage, which are a run's with one stage."""
        return [replace(self, stages=[], **with_one_extent(stage)) for stage in self.stages or [{}]]

    def own_settings(self) -> dict[str, Any]:
        """Those settings of one stage that may differ from the others'; its length in steps."""
        return {name: value for name, value in self.as_dict().items() if name not in WHOLE_RUN and name != "tokens"}

    @property
    def longest(self) -> int:
        """Tokens of the longest training window of a run with one stage."""
        return self.length if isinstance(self.length, int) else max(entry["length"] for entry in self.length)


# What all stages have in common; every other setting may differ between them.
WHOLE_RUN = {
    *("model", "out", "stages", "held_out", "held_out_documents", "held_out_length", "mixed_precision"),
    *("teacher", "teacher_dtype", "compile", "deterministic", "save_every", "keep", "log_every", "trackers"),
    *("trust_remote_code", "seed"),
}
RULES = {
    **dict.fromkeys(("accumulate", "held_out_documents", "log_every", "lora_rank", "selector_queries"), 1),
    **dict.fromkeys(("steps", "tokens", "batch_size", "held_out_length", "topk_start", "topk_steps", "loss_chunk"), 0),
    **dict.fromkeys(
        ("warmup_steps", "gate_blend_steps", "gradient_checkpointing", "save_every", "seed", "lr_nsa", "lr_backbone"), 0
    ),
    **dict.fromkeys(("weight_decay", "ce_weight", "kl_weight", "layer_weight", "selector_weight"), 0),
    **dict.fromkeys(("min_lr_ratio", "beta1", "beta2", "adam_eps", "decay_share", "lora_alpha"), 0),
    "longest": 2,
    "keep": 2,  # when the last one is damaged, a run goes on from the one before
}  # the least value of each number
CHOICES = {
    "trains": ("all", "nsa", "qkvo", "qk", "lora"),
    "attention": ("sparse", "dense"),
    "schedule": ("cosine", "wsd"),
    "selector_loss": ("kl", "bce"),
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
    "teacher": ("dense", "none"),
    "teacher_dtype": ("auto", "float32", "bfloat16"),
    "compile": ("auto", "yes", "no"),
}
MOST = 2**32 - 1  # of whole numbers: what NumPy takes as a seed, and far beyond any run
MOST_TOKENS = 2**53  # of tokens: what JSON's numbers hold exactly
LARGEST = 1e30  # of other numbers: an optimizer's float32 has room for it and for what it is multiplied with
LONGEST = 1 << 16  # characters of a run file


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a run.

    Args:
        path: its YAML file.
        overrides: settings that differ, each as "steps=10". Of steps and tokens, one takes the other's place.

    Raises:
        NsaError: what is wrong, and in which setting.
    """
    values, changed = dict(read_run_file(Path(path))), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise NsaError(f"an override is key=value, got {override!r}")
        changed[key] = parse_value(key, field_type(key), text)
    config = make_run_config({**values, **with_one_extent(changed)})
    for key in () if "stages" in changed else changed:
        names = {"steps", "tokens"} if key in ("steps", "tokens") else {key}
        if config.stages and all(names & stage.keys() for stage in config.stages):
            raise NsaError(f"{key}=... changes nothing: every stage in {path} has its own; change it there")
    return config


def with_one_extent(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that go over others: how long they train, in steps or in tokens, goes over both."""
    given = [name for name in ("steps", "tokens") if values.get(name)]
    return {**dict.fromkeys(("steps", "tokens"), 0), **values} if len(given) == 1 else values


def read_run_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, not yet checked; NsaError when it cannot be read."""
    # here: with its package come PyTorch and Transformers, for which --help does not wait
    from nsa_hf.conversion.files.plain_yaml import read_plain

    try:
        content = read_plain(path, LONGEST)
    except FileNotFoundError as error:
        raise NsaError(f"no run file at {path}; recipes/runs/adapt.yaml is one to start from") from error
    except (OSError, ValueError) as error:
        raise NsaError(f"cannot read the run file {path}: {shortened(str(error))}") from error
    if not isinstance(content, dict):
        raise NsaError(f"{path} must hold settings as 'name: value' lines")
    return content


def make_run_config(values: dict[str, Any]) -> RunConfig:
    """A RunConfig of values that are checked one by one and together.

    Raises:
        NsaError: a setting is missing, unknown, of another type or out of range, or two contradict each other.
    """
    checked = checked_values(values)
    missing = [name for name in ("model", "out") if not values.get(name)]
    if missing:
        raise NsaError(f"no value for {' and '.join(missing)}: write it in the run file or add {missing[0]}=...")
    config = RunConfig(**with_one_extent(checked))
    config = replace(config, stages=[stage_values(number, stage) for number, stage in enumerate(config.stages, 1)])
    check_ranges(config)
    for number, stage in enumerate(config.of_stages(), 1):
        try:
            check_ranges(stage)
            check_together(stage)
        except NsaError as error:
            raise NsaError(f"stage {number}: {error}" if config.stages else str(error)) from None
    return config


def checked_values(values: dict[str, Any]) -> dict[str, Any]:
    """Values of their settings' types, paths with the user's folder in them; NsaError names the one that is not."""
    checked = {key: check_value(key, field_type(key), value) for key, value in values.items()}
    for name in ("model", "out", "data", "held_out"):
        if isinstance(checked.get(name), str):
            checked[name] = str(check_path(checked[name]))  # "~", which no shell expands behind "model="
    if isinstance(checked.get("data"), list):
        checked["data"] = [{**entry, "source": str(check_path(entry["source"]))} for entry in checked["data"]]
    return checked


def stage_values(number: int, stage: dict[str, Any]) -> dict[str, Any]:
    """The values of one entry of `stages`, checked one by one; NsaError names stage and setting.

    Args:
        number: of the stage, from 1.
        stage: as YAML gives it.
    """
    try:
        checked = checked_values(stage)
    except NsaError as error:
        raise NsaError(f"stage {number}: {error}") from None
    if whole := [name for name in checked if name in WHOLE_RUN]:
        raise NsaError(f"stage {number}: {whole[0]} is the whole run's: write it beside stages, not in one")
    return checked


def check_ranges(config: RunConfig) -> None:
    """NsaError where a value is out of its range, or none of its choices."""
    for name, least in RULES.items():
        value = getattr(config, name)
        if value is None or isinstance(value, str):
            continue
        name = "length" if name == "longest" else name
        if not least <= value < math.inf:
            raise NsaError(f"{name} must be finite and at least {least}, got {shown(value)}")
        most = MOST_TOKENS if name == "tokens" else MOST if isinstance(value, int) else LARGEST
        if value > most:
            raise NsaError(f"{name} must be at most {most}, got {shown(value)}")
    for name in ("beta1", "beta2"):
        if getattr(config, name) >= 1:
            raise NsaError(f"{name} must be below 1, got {getattr(config, name)}")
    for name in ("adam_eps", "lora_alpha"):
        if getattr(config, name) <= 0:
            raise NsaError(f"{name} must be above 0, got {getattr(config, name)}")
    if not config.max_grad_norm > 0:  # nor is NaN
        raise NsaError(f"max_grad_norm must be above 0, got {config.max_grad_norm}; a large one clips nothing")
    if config.decay_share > 1:
        raise NsaError(f"decay_share is a share of the steps, at most 1, got {config.decay_share}")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            listed = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
            raise NsaError(f"{name} must be {listed}, got {getattr(config, name)!r}")


def check_together(stage: RunConfig) -> None:
    """NsaError where the settings of a stage contradict each other."""
    if stage.tokens and stage.steps:
        raise NsaError(f"steps={stage.steps} and tokens={stage.tokens} both say how long to train: take one out")
    if not stage.tokens and not stage.steps:
        raise NsaError("steps and tokens are both 0: write one of them")
    if not any((stage.ce_weight, stage.kl_weight, stage.layer_weight, stage.selector_weight)):
        raise NsaError("ce_weight, kl_weight, layer_weight and selector_weight are 0: there is no loss; raise one")
    if stage.lr_nsa == 0 and (stage.lr_backbone == 0 or stage.trains == "nsa"):
        rates = "lr_nsa is 0" if stage.trains == "nsa" else "lr_nsa and lr_backbone are both 0"
        raise NsaError(f"{rates}: nothing is trained; raise one of them")
    if bool(stage.topk_start) != bool(stage.topk_steps):
        raise NsaError("topk_start and topk_steps go together: from how many blocks, and over how many steps")
    for length in [] if isinstance(stage.length, int) else [entry["length"] for entry in stage.length]:
        if length < 2 or stage.longest % length:
            raise NsaError(
                f"length: each of a mixture is at least 2 and divides the longest, {stage.longest}, so that all "
                f"batches have as many tokens; got {length}"
            )
    taught = [name for name in ("kl_weight", "layer_weight") if getattr(stage, name)]
    if stage.teacher == "none" and taught:
        raise NsaError(
            f"teacher 'none' with {taught[0]} {getattr(stage, taught[0])}: there is nobody to learn from, set 0"
        )
    if stage.attention == "dense" and not stage.ce_weight and stage.teacher_dtype != "bfloat16":
        raise NsaError(
            "attention 'dense' with ce_weight 0: the dense model is its own teacher, from which there is nothing to "
            "learn; a control has the next-token loss (set ce_weight), or measures how far weights drift after a "
            "rounded teacher (set teacher_dtype to 'bfloat16')"
        )
    if stage.attention == "dense" and (used := [n for n in ("layer_weight", "selector_weight") if getattr(stage, n)]):
        raise NsaError(f"attention 'dense' with {used[0]}: there is no sparse attention to train; set it to 0")


def field_type(key: str) -> str:
    """The declared type of setting `key`; NsaError for an unknown one."""
    types = {f.name: str(f.type) for f in fields(RunConfig)}
    if key not in types:
        near = difflib.get_close_matches(shown(key), types, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; settings: nsa-hf train --help"
        raise NsaError(f"unknown setting {shown(key)}{hint}")
    return types[key]


def settings_help() -> str:
    """A line for each setting, for `nsa-hf train --help`."""
    lines = []
    for f in fields(RunConfig):
        default = [] if f.default_factory is not MISSING else f.default
        shown_default = "required" if default is MISSING else "none" if default in (None, []) else repr(default)
        lines.append(f"{f.name}: {f.metadata['help']} [{shown_default}]")
    return "\n".join(lines)
