"""Layers that call their attention without the further arguments (`**kwargs`) they were given, as Nemotron's do.

Sparse attention needs two of them, `nsa_segments` and `nsa_mode`. So the sparse class of such a layer leaves them with
its attention for the length of its own forward, and that of the attention adds them to the call.
"""

from __future__ import annotations

from typing import Any

from .config import NsaConfigMixin
from .modes import Mode, PerThread
from .segments import Segments


class PassedArguments(PerThread):
    """The arguments that a layer leaves with its attention, which it calls in the same thread."""

    def __init__(self) -> None:
        self.by_name: dict[str, Any] = {}


class PassesArguments:
    """In front of such a layer.

    Attributes:
        attention_name: the attribute that holds its attention.
    """

    attention_name: str

    def forward(self, *args: Any, nsa_segments: Segments, nsa_mode: Mode, **kwargs: Any) -> Any:
        passed = getattr(self, self.attention_name).passed_arguments
        passed.by_name = {"nsa_segments": nsa_segments, "nsa_mode": nsa_mode}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            passed.by_name = {}


class ReceivesArguments:
    """In front of the attention in such a layer."""

    def become_sparse(self, config: NsaConfigMixin) -> None:
        super().become_sparse(config)  # type: ignore[misc]
        self.passed_arguments = PassedArguments()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs, **self.passed_arguments.by_name)  # type: ignore[misc]
