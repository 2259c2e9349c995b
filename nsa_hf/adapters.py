"""Adapters by PEFT (LoRA, IA3, ...) on sparse models, whichever package is imported first; PEFT need not be installed.

PEFT looks up by model type, in tables of its module `constants`, which layers an adapter is put on where its config
does not say so (`target_modules`). A sparse family's rows are added as soon as both the family's classes and that
module are there: the dense family's own, where it has some. And `target_modules="all-linear"` is narrowed to the
layers of the dense model: the new parameters (`NEW_MODULES`) are the user's to name.

PEFT offers no hook for the latter, so its function that finds the layers is replaced; one for the rows is not needed.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import NsaError

# What a sparse layer adds to its family's: given as `modules_to_save`, they are trained whole beside an adapter.
NEW_MODULES = ("nsa.gate", "nsa.compress_k", "nsa.compress_v")
IS_NEW = re.compile(rf"(^|\.)({'|'.join(map(re.escape, NEW_MODULES))})(\.|$)")

CONSTANTS, TUNERS = "peft.utils.constants", "peft.tuners.tuners_utils"
LORA, IA3, IA3_FEEDFORWARD = (
    f"TRANSFORMERS_MODELS_TO_{kind}_MODULES_MAPPING" for kind in ("LORA_TARGET", "IA3_TARGET", "IA3_FEEDFORWARD")
)
FIND_LINEAR = "_maybe_include_all_linear_layers"


class Targets(NamedTuple):
    """The names of the layers that an adapter is put on: by LoRA, by IA3, and which of the latter are feed-forward."""

    lora: list[str]
    ia3: list[str]
    feedforward: list[str]


class Family(NamedTuple):
    """A sparse family: its model type, its dense family's, and what gives its targets where PEFT has none for that."""

    sparse_type: str
    dense_type: str
    targets: Callable[[], Targets]


# Those whose classes have been made, by model type.
FAMILIES: dict[str, Family] = {}


def add_family(sparse_type: str, dense_type: str, targets: Callable[[], Targets]) -> None:
    """Notes a sparse family whose classes have been made, and adds its rows if PEFT is there; see `Family`."""
    FAMILIES[sparse_type] = family = Family(sparse_type, dense_type, targets)
    if (constants := sys.modules.get(CONSTANTS)) is not None:
        add_rows(constants, family)


def enter(module: Any) -> None:
    """Called with each of the two modules of PEFT as soon as it has been imported."""
    if module.__name__ == TUNERS:
        narrow_all_linear(module)
    else:
        for family in list(FAMILIES.values()):
            add_rows(module, family)


def add_rows(constants: Any, family: Family) -> None:
    """Adds a family's rows to PEFT's tables; rows that are there already stay.

    Args:
        constants: PEFT's module; while it is being imported, tables may be missing, and `enter` follows.
    """
    tables = {name: table for name, table in list(vars(constants).items()) if name.endswith("_MODULES_MAPPING")}
    for table in tables.values():
        if family.dense_type in table:
            table.setdefault(family.sparse_type, table[family.dense_type])
    missing = [name for name in (LORA, IA3, IA3_FEEDFORWARD) if family.sparse_type not in tables.get(name, {})]
    if missing:
        targets = dict(zip((LORA, IA3, IA3_FEEDFORWARD), family.targets(), strict=True))
        for name in missing:
            if name in tables and targets[LORA]:
                tables[name][family.sparse_type] = targets[name]


def narrow_all_linear(tuners: Any) -> None:
    """Has PEFT leave gates and compressors out where `all-linear` is asked for.

    Args:
        tuners: PEFT's module with the function that finds the layers.
    """
    find = getattr(tuners, FIND_LINEAR, None)
    if find is None:
        warnings.warn(
            "this release of peft finds the layers of target_modules='all-linear' in a way that nsa_hf does not know: "
            f"give exclude_modules={list(NEW_MODULES)} beside it, or gates and compressors get adapters too",
            stacklevel=2,
        )
        return

    @functools.wraps(find)
    def find_dense_layers(peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = find(peft_config, *args, **kwargs)
        if isinstance(asked, str) and isinstance(found.target_modules, set):
            found.target_modules = {name for name in found.target_modules if not IS_NEW.search(name)}
        return found

    # some of PEFT's modules have imported it by its name
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"]:
        if vars(module).get(FIND_LINEAR) is find:
            setattr(module, FIND_LINEAR, find_dense_layers)


def import_peft(needed_by: str) -> Any:
    """The package `peft`.

    Args:
        needed_by: what needs it, for the message.

    Raises:
        NsaError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise NsaError(f"{needed_by} needs the package `peft`: pip install 'nsa-hf[train]'") from error
    return peft
