"""What the operators are called that PyTorch knows."""

from __future__ import annotations


def operator_name(name: str) -> str:
    """An operator's name for PyTorch: `nsa_hf::NAME`.

    As a kernel of the Hub the package has a name of its own for each version, and so have its operators: a process
    that holds two of them, or one beside nsa_hf, has each call its own.
    """
    return f"{__name__.partition('.')[0]}::{name}"
