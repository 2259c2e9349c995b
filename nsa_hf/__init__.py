"""Native Sparse Attention for Transformers. Importing this registers the model classes with the Auto classes.

    >>> model = nsa_hf.from_dense("path/to/llama")  # or a Hub id, or a model in memory; any supported family
    >>> folder = nsa_hf.convert("path/to/llama", "llama-nsa")  # the same on the disk
    >>> model = AutoModelForCausalLM.from_pretrained("llama-nsa")
    >>> with model.dense_attention():  # the same weights, dense
    ...     logits = model(torch.arange(100)[None]).logits

The classes of a family are attributes by name, made when they are asked for: `nsa_hf.NsaQwen3ForCausalLM`. `help()` of
one says what is sparse about it. `nsa_hf.kernels` is the operation, `nsa_hf.conversion` what the commands do.

Neither PyTorch nor Transformers is imported until an attribute that needs them is used.
"""

import sys
from typing import TYPE_CHECKING, Any

from .errors import NsaError
from .registration import register_now_or_when_imported
from .tested import warn_if_newer

if TYPE_CHECKING:
    from nsa_hf.conversion.convert import convert

    from .families import from_dense, nsa_config_from_dense
    from .fields import NSA_FIELDS

__version__ = "0.2.0"
__all__ = [
    "NSA_FIELDS",
    "NsaError",
    "__version__",
    "convert",
    "from_dense",
    "nsa_config_from_dense",
]
# Packages in this one that are for users too, imported when they are asked for.
PACKAGES = ("conversion", "kernels", "model_cards", "recipes")

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
    if name.startswith("Nsa") or name in ("from_dense", "nsa_config_from_dense"):
        # a family's classes, NsaLlamaForCausalLM for one: made when they are asked for
        return getattr(import_module(".families", __name__), name)
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # of the families' classes those that are made: completion looks at each name, and would make all of them
    families = sys.modules.get(f"{__name__}.families")
    made = {name for name in vars(families or object) if name.startswith("Nsa") and not name.endswith("Mixin")}
    return sorted({*__all__, *PACKAGES, *made, *(name for name in globals() if name.startswith("__"))})
