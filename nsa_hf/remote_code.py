"""Loading where nsa_hf is installed and not imported: a line of Python in the model's folder imports it.

Every saved folder holds it as `modeling_nsa.py`, which the config's `auto_map` names. With `trust_remote_code=True`
Transformers runs it, or says which package to install. Where nsa_hf has been imported it is not looked at.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM

from .heads import HEADS

MODULE = "modeling_nsa"


class SavedByImport:
    """In front of a class whose source file Transformers would otherwise copy into the folder of a saved model."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing. Transformers calls it for a class loaded by `trust_remote_code`, to copy its file at saving."""


class SavedConfig(SavedByImport):
    """In front of a sparse config's class: saved, alone or with its model, it also writes `modeling_nsa.py`."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As Transformers', and writes `modeling_nsa.py`."""
        names = {
            "AutoConfig": type(self).__name__,
            "AutoModel": AutoModel._model_mapping[type(self)].__name__,
            "AutoModelForCausalLM": AutoModelForCausalLM._model_mapping[type(self)].__name__,
        }
        heads = {name: auto._model_mapping.get(type(self), None) for name, auto in HEADS.items()}
        names |= {auto: head.__name__ for auto, head in heads.items() if head is not None}
        self.auto_map = {auto: f"{MODULE}.{name}" for auto, name in names.items()}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        line = f"from nsa_hf import {', '.join(names.values())}  # noqa: F401 (pip install nsa-hf)\n"
        (folder / f"{MODULE}.py").write_text(line, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        before: dict[str, float] = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        # left out of what was there before the call, so that `push_to_hub=True` uploads it
        return {name: time for name, time in before.items() if name != f"{MODULE}.py"}
