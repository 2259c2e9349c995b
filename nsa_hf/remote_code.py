"""Sparse models in places that do not know nsa_hf: one line of Python in their folder imports it.

Every saved folder holds `modeling_nsa.py`, and its config's `auto_map` names it. With `import nsa_hf` nobody looks at
it; with `trust_remote_code=True` alone Transformers runs it, or says which package to install.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM

MODULE = "modeling_nsa"


class SavedByImport:
    """In front of a class that Transformers would save by copying the file that defines it out of its package."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: Transformers marks a class so that came by `trust_remote_code`, to copy its file."""


class SavedConfig(SavedByImport):
    """In front of a sparse config: saved, alone or with its model, it also writes the line that imports its classes."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As Transformers', and writes `modeling_nsa.py`."""
        names = {
            "AutoConfig": type(self).__name__,
            "AutoModel": AutoModel._model_mapping[type(self)].__name__,
            "AutoModelForCausalLM": AutoModelForCausalLM._model_mapping[type(self)].__name__,
        }
        self.auto_map = {auto: f"{MODULE}.{name}" for auto, name in names.items()}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        line = f"from nsa_hf import {', '.join(names.values())}  # noqa: F401 (pip install nsa-hf)\n"
        (folder / f"{MODULE}.py").write_text(line, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        before: dict[str, float] = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        # so that `push_to_hub=True` sends it along, like a file that the call wrote
        return {name: time for name, time in before.items() if name != f"{MODULE}.py"}
