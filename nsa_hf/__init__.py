"""Native Sparse Attention for Transformers. Importing this registers the model classes with the Auto classes."""

from typing import Any

from . import families
from .config import NSA_FIELDS
from .errors import NsaError
from .families import nsa_config_from_dense
from .releases import warn_if_newer

__version__ = "0.1.0.dev0"
__all__ = [
    "NSA_FIELDS",
    "NsaError",
    "__version__",
    "convert",
    "nsa_config_from_dense",
]

warn_if_newer()


def __getattr__(name: str) -> Any:
    if name == "convert":
        # The one import against the arrows, for `nsa_hf.convert(...)`; it costs nothing until then.
        from nsa_hf.conversion import convert

        return convert
    if name.startswith("Nsa"):
        # a family's classes, NsaLlamaForCausalLM for one: made when they are asked for
        return getattr(families, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
