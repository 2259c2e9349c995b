"""Keys and values of their own for the compressed and the window branch: `nsa_branch_kv="independent"`.

The selected branch has the dense model's. The other two have copies of everything that makes keys and values in the
family's attention, under `nsa.compressed.` and `nsa.window.`, and the family's own code runs with those in their place,
so that norms, biases and rotations of every kind come along.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NotPlain

# The branches in the order of their copies.
BRANCHES = ("compressed", "window")
# What makes keys and values in an attention starts so: k_proj, v_proj, k_norm, key_layernorm, ...
MAKES_KEYS_OR_VALUES = ("k_", "v_", "key_", "value_")
MAKES_QUERIES = "q_proj"


def branch_modules(attention: Any) -> nn.Module:
    """Copies of what makes keys and values in an attention, by the same names.

    Raises:
        NotPlain: they are made together with the queries.
    """
    made = {name: part for name, part in attention.named_children() if name.startswith(MAKES_KEYS_OR_VALUES)}
    if not {"k_proj", "v_proj"} <= made.keys():
        parts = ", ".join(name for name, part in attention.named_children() if isinstance(part, nn.Linear))
        raise NotPlain(
            f"nsa_branch_kv='independent' needs a k_proj and a v_proj, and this attention has {parts}: use 'shared'"
        )
    copies = nn.ModuleDict({name: copy.deepcopy(part) for name, part in made.items()})
    for module in copies.modules():
        # so that Transformers draws them anew in a model that is not loaded
        module.__dict__.pop("_is_hf_initialized", None)
    return copies


def dense_twin(name: str) -> str | None:
    """The dense parameter that a branch's parameter starts as; None for all others."""
    for branch in BRANCHES:
        if f".nsa.{branch}." in name:
            return name.replace(f".nsa.{branch}.", ".")
    return None


@torch.no_grad()
def copy_dense_keys(model: nn.Module) -> None:
    """Makes every branch's keys and values those of the dense model again."""
    for name, parameter in model.named_parameters():
        twin = dense_twin(name)
        if twin is not None:
            parameter.copy_(model.get_parameter(twin))


class NoQueries(nn.Module):
    """In the place of the queries' projection where they are not used: zeros of the same size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.size)


class KeysAndValues(Exception):
    """Leaves a family's attention with the key and value `[B, Hk, T, D]` that it made, as its `args`."""


def stand_in(attention: Any, branch: str) -> Any:
    """The attention with a branch's modules in the place of its own; it shares everything, and owns nothing.

    It is kept (outside of the module's children, so that nothing sees it), and made anew when one of the modules has
    been replaced, as adapters do.
    """
    # PyTorch 2.11 cannot compile `setdefault` of a module's dict
    kept: dict[str, Any] | None = getattr(attention, "_stand_ins", None)
    if kept is None:
        kept = attention.__dict__["_stand_ins"] = {}
    own = dict(getattr(attention.nsa, branch).named_children())
    found = kept.get(branch)
    if found is None or any(found._modules[name] is not part for name, part in own.items()):
        found = copy.copy(attention)
        found.__dict__.pop("_stand_ins")
        queries = attention._modules.get(MAKES_QUERIES)
        unused = {MAKES_QUERIES: NoQueries(queries.out_features)} if isinstance(queries, nn.Linear) else {}
        found.__dict__["_modules"] = {**attention._modules, **unused, **own}
        kept[branch] = found
    return found
