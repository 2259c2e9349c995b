"""The settings of a training run: one YAML file, and `key=value` overrides behind it.

nsa-hf train recipes/runs/demo.yaml model=build/nsa out=build/trained steps=2
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nsa_hf.errors import NsaError, check_path


def setting(help: str, default: Any = MISSING) -> Any:
    """A field of RunConfig with its help text; required where it has no default."""
    return field(metadata={"help": help}) if default is MISSING else field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """One continued pretraining run. Lengths are in tokens, rates are AdamW's, `steps` are optimizer steps."""

    model: str = setting("folder of the converted model; it stays as it is")
    out: str = setting("folder for the trained model; must not hold another run")
    data: str = setting("training text: 'stdlib', a text file, a folder, a .jsonl or .parquet with 'text'", "stdlib")
    held_out: str = setting("evaluation text, same choices; of 'stdlib' the files training never sees", "stdlib")
    held_out_documents: int = setting("held-out documents evaluated before and after", 2)
    length: int = setting("tokens of every training and held-out window", 2048)
    steps: int = setting("optimizer steps", 100)
    batch_size: int = setting("windows per process and forward pass", 1)
    accumulate: int = setting("forward passes per optimizer step", 1)
    lr_nsa: float = setting("peak rate of the NSA parameters", 1e-3)
    lr_backbone: float = setting("peak rate of all other parameters; 0 freezes them", 1e-5)
    warmup_steps: int = setting("steps over which the rates rise from zero", 3)
    min_lr_ratio: float = setting("share of the peak rate at which the cosine ends", 0.1)
    beta1: float = setting("AdamW's first decay", 0.9)
    beta2: float = setting("AdamW's second decay", 0.95)
    adam_eps: float = setting("AdamW's epsilon: entries with smaller gradients move less than the rate", 1e-8)
    weight_decay: float = setting("decay of the backbone's matrices; norms, biases and NSA parameters have none", 0.0)
    max_grad_norm: float = setting("norm at which gradients are clipped", 1.0)
    ce_weight: float = setting("weight of the next-token loss", 1.0)
    kl_weight: float = setting("weight of KL(teacher || student); the teacher is the converted model run dense", 1.0)
    gate_blend_steps: int = setting("steps over which nsa_gate_blend rises to 1 (nsa_gate 'blend'); 0 leaves it", 0)
    gradient_checkpointing: int = setting("every how many layers activations are recomputed, to save memory; 0 none", 0)
    mixed_precision: str = setting("'no' (fp32), 'bf16' or 'fp16' autocast; weights and optimizer stay fp32", "no")
    loss_chunk: int = setting("positions whose logits exist at one time", 256)
    save_every: int = setting("steps between checkpoints; 0 saves none", 100)
    keep: int = setting("checkpoints kept while running, at least two: one to go back to when the last is damaged", 2)
    log_every: int = setting("steps between progress lines", 1)
    deterministic: bool = setting("the same weights from the same settings; on a GPU this may cost speed", True)
    trust_remote_code: bool = setting("run the code of its own that the model's tokenizer may have", False)
    seed: int = setting("order of the text and every random number", 0)

    def as_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)


RULES = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "held_out_documents", "loss_chunk", "log_every"), 1),
    **dict.fromkeys(
        ("warmup_steps", "gate_blend_steps", "gradient_checkpointing", "save_every", "seed", "lr_nsa", "lr_backbone"), 0
    ),
    **dict.fromkeys(("weight_decay", "ce_weight", "kl_weight", "min_lr_ratio", "beta1", "beta2", "adam_eps"), 0),
    "length": 2,
    "keep": 2,  # when the last one is damaged, a run goes on from the one before
}  # the least value of each number
MOST = 2**32 - 1  # of whole numbers: what NumPy takes as a seed, and far beyond any run
LARGEST = 1e30  # of other numbers: an optimizer's float32 has room for it and for what it is multiplied with
LONGEST = 1 << 16  # characters of a run file


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a run.

    Args:
        path: its YAML file.
        overrides: settings that differ, each as "steps=10".

    Raises:
        NsaError: what is wrong, and in which setting.
    """
    values = dict(read_run_file(Path(path)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise NsaError(f"an override is key=value, got {override!r}")
        values[key] = parse_override(key, text)
    return make_run_config(values)


def read_run_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, not yet checked; NsaError when it cannot be read."""
    # here: with its package come PyTorch and Transformers, for which --help does not wait
    from nsa_hf.conversion.files.plain_yaml import read_plain

    try:
        content = read_plain(path, LONGEST)
    except FileNotFoundError as error:
        raise NsaError(f"no run file at {path}; recipes/runs/demo.yaml is one to start from") from error
    except (OSError, ValueError) as error:
        raise NsaError(f"cannot read the run file {path}: {shortened(str(error))}") from error
    if not isinstance(content, dict):
        raise NsaError(f"{path} must hold settings as 'name: value' lines")
    return content


def shortened(text: str, most: int = 200) -> str:
    """A text in one line, cut behind `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


def parse_override(key: str, text: str) -> Any:
    """The value of setting `key` that an override has as text; NsaError when it cannot be read."""
    from nsa_hf.conversion.files.plain_yaml import load_plain  # as in `read_run_file`

    if field_type(key) == "str":
        return text
    try:
        return load_plain(text)
    except ValueError as error:
        raise NsaError(f"cannot read the value of {key}={shortened(text)!r}: {shortened(str(error))}") from error


def make_run_config(values: dict[str, Any]) -> RunConfig:
    """A RunConfig of values that are checked one by one and together.

    Raises:
        NsaError: a setting is missing, unknown, of another type or out of range, or two contradict each other.
    """
    checked = {key: check_type(key, field_type(key), value) for key, value in values.items()}
    missing = [f.name for f in fields(RunConfig) if f.default is MISSING and not checked.get(f.name)]
    if missing:
        raise NsaError(f"no value for {' and '.join(missing)}: write it in the run file or add {missing[0]}=...")
    for name in ("model", "out", "data", "held_out"):
        if name in checked:
            checked[name] = str(check_path(checked[name]))  # "~", which no shell expands behind "model="
    config = RunConfig(**checked)
    for name, least in RULES.items():
        value = getattr(config, name)
        if not least <= value < math.inf:
            raise NsaError(f"{name} must be finite and at least {least}, got {shown(value)}")
        most = MOST if isinstance(value, int) else LARGEST
        if value > most:
            raise NsaError(f"{name} must be at most {most}, got {shown(value)}")
    for name in ("beta1", "beta2"):
        if getattr(config, name) >= 1:
            raise NsaError(f"{name} must be below 1, got {getattr(config, name)}")
    if config.adam_eps <= 0:
        raise NsaError(f"adam_eps must be above 0, got {config.adam_eps}")
    if not config.max_grad_norm > 0:  # nor is NaN
        raise NsaError(f"max_grad_norm must be above 0, got {config.max_grad_norm}; a large one clips nothing")
    if config.ce_weight == 0 and config.kl_weight == 0:
        raise NsaError("ce_weight and kl_weight are both 0: there is no loss; raise one of them")
    if config.lr_nsa == 0 and config.lr_backbone == 0:
        raise NsaError("lr_nsa and lr_backbone are both 0: nothing is trained; raise one of them")
    if config.mixed_precision not in ("no", "bf16", "fp16"):
        raise NsaError(f"mixed_precision must be 'no', 'bf16' or 'fp16', got {config.mixed_precision!r}")
    return config


def field_type(key: str) -> str:
    """The declared type of setting `key`: "int", "float", "bool" or "str"; NsaError for an unknown one."""
    types = {f.name: str(f.type) for f in fields(RunConfig)}
    if key not in types:
        near = difflib.get_close_matches(shown(key), types, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; settings are {', '.join(types)}"
        raise NsaError(f"unknown setting {shown(key)}{hint}")
    return types[key]


def check_type(key: str, expected: str, value: Any) -> Any:
    """A setting's value as its type; NsaError when it is of another type.

    Args:
        expected: see `field_type`.
    """
    # YAML 1.1 reads 1e-5 as text and no as false
    if key == "mixed_precision" and value is False:
        return "no"
    if expected == "float" and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
        except OverflowError:
            return math.inf
    if {"int": int, "bool": bool, "str": str, "float": float}[expected] is type(value):
        return value
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    raise NsaError(f"{key} must be {names[expected]}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as a message shows it; of a very long number its size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return shortened(repr(value))


def settings_help() -> str:
    """A line for each setting, for `nsa-hf train --help`."""
    lines = []
    for f in fields(RunConfig):
        default = "required" if f.default is MISSING else repr(f.default)
        lines.append(f"{f.name}: {f.metadata['help']} [{default}]")
    return "\n".join(lines)
