"""Native Sparse Attention for Transformers. Importing this registers the model classes with the Auto classes.

Neither PyTorch nor Transformers is imported until an attribute that needs them is used.
"""

from typing import TYPE_CHECKING, Any

from .errors import NsaError
from .registration import register_now_or_when_imported
from .tested import warn_if_newer

if TYPE_CHECKING:
    from .families import nsa_config_from_dense
    from .fields import NSA_FIELDS

__version__ = "0.1.0.dev0"
__all__ = [
    "NSA_FIELDS",
    "NsaError",
    "__version__",
    "convert",
    "nsa_config_from_dense",
]

warn_if_newer()
register_now_or_when_imported()


def __getattr__(name: str) -> Any:
    from importlib import import_module
    from importlib.util import find_spec

    if name == "convert":
        # The one import against the arrows, for `nsa_hf.convert(...)`; it costs nothing until then.
        from nsa_hf.conversion import convert

        return convert
    if name == "NSA_FIELDS":
        return import_module(".fields", __name__).NSA_FIELDS
    if name.startswith("Nsa") or name == "nsa_config_from_dense":
        # a family's classes, NsaLlamaForCausalLM for one: made when they are asked for
        return getattr(import_module(".families", __name__), name)
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
