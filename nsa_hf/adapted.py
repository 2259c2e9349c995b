"""Adapters that PEFT has put into a dense model: merged ones are part of its weights, others are refused by name.

PEFT is not imported: where it is not, no module is one of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .errors import NsaError

UNMERGED = (
    "the PEFT adapter {!r} is not merged into the model's weights: give what peft_model.merge_and_unload() returns, or "
    "convert the model without it (peft_model.unload()) and load the adapter onto the sparse one with "
    "PeftModel.from_pretrained"
)


def without_peft(model: Any) -> Any:
    """The model inside a `PeftModel`, whose merged layers stay as they are; any other model itself.

    Raises:
        NsaError: its adapter is a prompt, which no weights hold.
    """
    if not is_peft(model):
        return model
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise NsaError(
                f"the PEFT adapter {name!r} is a learned prompt, which cannot be merged into weights: convert the "
                "model without it (peft_model.get_base_model())"
            )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a dense model by its family's names, merged adapters as part of the weights.

    Raises:
        NsaError: an adapter is not merged.
    """
    wrappers = [(name, module) for name, module in model.named_modules() if is_peft(module)]
    outer = [f"{name}." for name, _ in wrappers if not any(name.startswith(f"{other}.") for other, _ in wrappers)]
    for name, module in wrappers:
        active, merged = (set(getattr(module, which, ())) for which in ("active_adapters", "merged_adapters"))
        is_layer = hasattr(module, "merged_adapters")
        if (is_layer and not active <= merged) or (not is_layer and f"{name}." in outer):
            missing = ", ".join(sorted(active - merged)) or type(module).__name__
            raise NsaError(UNMERGED.format(missing))
    weights = {}
    for name, value in model.state_dict().items():
        wrapper = next((wrapper for wrapper in outer if name.startswith(wrapper)), None)
        if wrapper is None or name.startswith(f"{wrapper}base_layer."):
            weights[name.replace(".base_layer.", ".")] = value
    return weights


def is_peft(module: object) -> bool:
    """Whether an object's class is PEFT's, or made of one of PEFT's."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)
