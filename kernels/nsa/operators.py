"""What the operators are called that PyTorch knows, and whether it makes a graph of them to be kept."""

from __future__ import annotations

import torch


def operator_name(name: str) -> str:
    """An operator's name for PyTorch: `nsa_hf::NAME`.

    As a kernel of the Hub the package has a name of its own for each version, and so have its operators: a process
    that holds two of them, or one beside nsa_hf, has each call its own.
    """
    return f"{__name__.partition('.')[0]}::{name}"


def is_exporting() -> bool:
    """Whether `torch.export` traces what runs now.

        >>> is_exporting()
        False

    `torch.compiler.is_exporting` says so under `torch.compile` as well, in PyTorch 2.11: here the flag itself is read.
    """
    return torch.compiler._is_exporting_flag
