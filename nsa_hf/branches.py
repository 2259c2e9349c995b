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

# The branches that have copies, in the order of these.
BRANCHES = ("compressed", "window")
# How the modules that make keys and values are called in an attention: k_proj, v_proj, k_norm, key_layernorm, ...
MAKES_KEYS_OR_VALUES = ("k_", "v_", "key_", "value_")
MAKES_QUERIES = "q_proj"


def branch_modules(attention: Any) -> nn.Module:
    """Copies of what makes keys and values in an attention, by the same names.

    Raises:
        NotPlain: they are made together with the queries.
    """
    originals = {name: part for name, part in attention.named_children() if name.startswith(MAKES_KEYS_OR_VALUES)}
    if not {"k_proj", "v_proj"} <= originals.keys():
        parts = ", ".join(name for name, part in attention.named_children() if isinstance(part, nn.Linear))
        raise NotPlain(
            f"nsa_branch_kv='independent' needs a k_proj and a v_proj, and this attention has {parts}: use 'shared'"
        )
    copies = nn.ModuleDict({name: copy.deepcopy(part) for name, part in originals.items()})
    for module in copies.modules():
        # so that Transformers draws them anew in a model that is not loaded
        module.__dict__.pop("_is_hf_initialized", None)
    return copies


def dense_twin(name: str) -> str | None:
    """The name of the dense parameter that a branch's parameter starts as a copy of; None for all others."""
    for branch in BRANCHES:
        if f".nsa.{branch}." in name:
            return name.replace(f".nsa.{branch}.", ".")
    return None


@torch.no_grad()
def copy_dense_keys(model: nn.Module) -> None:
    """Sets the parameters of every branch's copies to those of the dense model."""
    for name, parameter in model.named_parameters():
        twin = dense_twin(name)
        if twin is not None:
            parameter.copy_(model.get_parameter(twin))


class NoQueries(nn.Module):
    """In the place of the queries' projection where no query is needed: zeros `[..., size]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.size)


class KeysAndValues(Exception):
    """Leaves a family's forward with the key and value `[B, Hk, T, D]` that it made, as its `args`.

    An exception, because they are made halfway through a forward that is not ours. If the attention function returned,
    the family would go on with its output, which nobody needs: gates and norms of the output, a projection as large as
    that of the queries. No family catches it, and `torch.compile` traces it.
    """


def attention_of_branch(attention: Any, branch: str) -> Any:
    """The same attention with a branch's modules in the place of those that make keys and values.

    A shallow copy: it shares all parameters, and has none of its own. It is kept beside the attention's children (not
    among them: no parameter is found twice) and made anew when one of the modules was replaced, as adapters do.
    """
    # PyTorch 2.11 cannot compile `setdefault` of a module's dict
    copies: dict[str, Any] | None = getattr(attention, "_attention_of_branch", None)
    if copies is None:
        copies = attention.__dict__["_attention_of_branch"] = {}
    branch_parts = dict(getattr(attention.nsa, branch).named_children())
    branch_attention = copies.get(branch)
    if branch_attention is None or any(
        branch_attention._modules[name] is not part for name, part in branch_parts.items()
    ):
        branch_attention = copy.copy(attention)
        branch_attention.__dict__.pop("_attention_of_branch")
        queries = attention._modules.get(MAKES_QUERIES)
        unused = {MAKES_QUERIES: NoQueries(queries.out_features)} if isinstance(queries, nn.Linear) else {}
        branch_attention.__dict__["_modules"] = {**attention._modules, **unused, **branch_parts}
        copies[branch] = branch_attention
    return branch_attention
