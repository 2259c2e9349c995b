"""How the projections of a family's attention are called, and which of its layers adapters are put on by default."""

from __future__ import annotations

import ast

from torch import nn

from .adapters import Targets
from .discovery import DenseFamily, parts_of, source_of

QUERIES, KEYS, VALUES, OUTPUT = "q_proj", "k_proj", "v_proj", "o_proj"
# What makes queries, keys and values: the names of nearly all families, CTRL's, and layers that make several at once.
MADE_BY = (
    (QUERIES, KEYS, VALUES),
    ("Wq", "Wk", "Wv"),
    ("qkv_proj", "qkv_proj", "qkv_proj"),
    ("query_key_value", "query_key_value", "query_key_value"),
    ("kv_proj", "kv_proj", "kv_proj"),
)
# The last layer of a feed-forward network, which IA3 scales the input of.
FEEDFORWARD = "down_proj"


def default_targets(dense: DenseFamily) -> Targets:
    """What adapters are put on in a family for which PEFT names nothing: as in those for which it does.

    LoRA: what makes queries and values. IA3: what makes keys and values, and the feed-forward network's last layer
    (where that is a layer of its own: experts are not).
    """
    made_in = set().union(*map(linear_names, dense.layers.values()))
    query, key, value = next((names for names in MADE_BY if made_in.issuperset(names)), (None, None, None))
    lora = {name for name in (query, value) if name}
    attention = {name for name in (key, value) if name}
    inside = set().union(*(linear_names(part) for layer in dense.layers for part in parts_of(layer)))
    feedforward = {FEEDFORWARD} & inside
    return Targets(sorted(lora), sorted(attention | feedforward), sorted(feedforward))


def linear_names(module: type[nn.Module]) -> set[str]:
    """The attributes that a module's `__init__` sets to linear layers, read off its source."""
    return {
        target.attr
        for node in ast.walk(source_of(module.__init__))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Attribute) and ast.unparse(node.value.func).endswith("nn.Linear")
    }
