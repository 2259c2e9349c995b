"""Operators that PyTorch knows: what they are called, how they are defined, and whether they end in a kept graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

NAMESPACE = __name__.partition(".")[0]
# By operator what defines it, as long as the process lives: this module may be imported again, as in a notebook.
LIBRARIES: dict[str, Library] = torch.library.__dict__.setdefault("nsa_operators", {})


def operator_name(name: str) -> str:
    """An operator's name for PyTorch: `nsa_hf::NAME`.

    As a kernel of the Hub the package has a name of its own for each version, and so have its operators: a process
    that holds two of them, or one beside nsa_hf, has each call its own.
    """
    return f"{NAMESPACE}::{name}"


def define_operator(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator that changes none of its arguments and has no gradient of its own, ready to be called.

    `torch.library.custom_op` defines the same, but a call through it takes the host 40 us more, on a slow one.

    Args:
        run: what it does; its annotations are the operator's schema.
        fake: makes tensors as `run` would, of tensors without numbers.
    """
    schema = torch.library.infer_schema(run, mutates_args=())
    LIBRARIES.pop(operator_name(name), None)  # takes the earlier one back
    library = LIBRARIES[operator_name(name)] = Library(NAMESPACE, "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(operator_name(name), fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def is_exporting() -> bool:
    """Whether `torch.export` traces what runs now.

        >>> is_exporting()
        False

    `torch.compiler.is_exporting` says so under `torch.compile` as well, in PyTorch 2.11: here the flag itself is read.
    """
    return torch.compiler._is_exporting_flag
