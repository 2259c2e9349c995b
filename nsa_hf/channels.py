"""Which channels of a head RoPE turns slowest: what an index of blocks reads of queries and keys.

Tokens that are far apart are compared by what does not turn between them. Which channels those are is seen by looking:
the family's own attention is given the same hidden states at two positions, and the queries that come out are compared.
So it holds for every order of channels, partial rotation, scaling, and for layers that do not rotate at all.

It costs little: the model that is looked at is made of nothing at first, and gets numbers only where one is used before
the last look. A layer is left as soon as its queries were seen, and one without attention is not entered.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from .discovery import DenseFamily, find_family, source_of
from .errors import NotPlain, NsaError

PROBE = "nsa-rotation-probe"
# Two, so that the queries of one take every value although norms before them take a degree of freedom away.
HEADS = 2
# What a small model has, where the config has the field: it costs nothing, and turns its channels as the large one.
SMALL = {
    "vocab_size": 16,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "shared_intermediate_size": 8,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "multi_query": True,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    # of state-space layers, whose sizes must fit the model's
    "mamba_d_ssm": 8,
    "mamba_n_heads": 2,
    "mamba_n_groups": 1,
    "mamba_d_head": "auto",
    "mamba_d_state": 8,
    "mamba_chunk_size": 1,
}
# Positions from one look to the next: the near one tells the fast channels apart, the far one the slow ones.
NEAR, FAR = 1, 64
# Rounding: some families turn in float32 whatever they are given.
NOTHING = 1e-6
# The random state is the process's: two threads that looked at once would lose it.
ONE_AT_A_TIME = threading.Lock()


def slowest_channels(config: PreTrainedConfig, count: int | None) -> list[list[int]]:
    """The channels of each layer's heads that RoPE turns slowest, ascending.

    Channels that are not turned come first, then pairs of channels by their frequency, both of a pair, lower numbers
    first where they are equal.

    Args:
        config: of a dense model of a supported family.
        count: how many channels; None: half of a head's.

    Returns:
        `count` channels for each layer, none for a layer without attention.

    Raises:
        NotPlain: the family's rotation is not one of pairs of channels, or cannot be looked at.
    """
    try:
        rotations = rotations_of(config)
    except NsaError:
        raise
    except Exception as error:
        raise NotPlain(f"how {config.model_type} turns its channels could not be looked at: {error}") from error
    layers = range(config.num_hidden_layers)
    return [slowest_of(*rotations[layer], count) if layer in rotations else [] for layer in layers]


def slowest_of(near: Tensor, far: Tensor, count: int | None) -> list[int]:
    """The slowest channels of the rotations by NEAR and by FAR positions, `[D, D]` each."""
    count = len(near) // 2 if count is None else count
    if count > len(near):
        raise NotPlain(
            f"a head has {len(near)} channels, and {count} of them were asked for: give a smaller nsa_selector_dim"
        )
    turns = [torch.atan2(off_diagonal(one).amax(1), one.diagonal()) for one in (near, far)]
    slow = turns[0] < 1 / FAR
    turn = torch.where(slow, turns[1] / FAR, turns[0])
    size = torch.where(slow[:, None], off_diagonal(far), off_diagonal(near))
    partner = size.argmax(1)
    single = size.amax(1) < NOTHING
    channels = [[(0.0, channel, channel)] for channel in single.nonzero()[:, 0].tolist()]
    for channel in (~single).nonzero()[:, 0].tolist():
        other = int(partner[channel])
        if int(partner[other]) != channel or size[channel].sum() > size[channel].amax() + len(size) * NOTHING:
            raise NotPlain(f"channel {channel} is not turned together with one other channel")
        if channel < other:
            both = float((turn[channel] + turn[other]) / 2)
            channels.append([(both, channel, channel), (both, channel, other)])
    order = sorted(channels, key=lambda pair: (round(pair[0][0], 9), pair[0][1]))
    chosen = [channel for pair in order for _, _, channel in pair][:count]
    return sorted(chosen)


def off_diagonal(rotation: Tensor) -> Tensor:
    """How much of each other channel there is in each, `[D, D]`, without signs."""
    return rotation.abs().fill_diagonal_(0)


@torch.no_grad()
def rotations_of(config: PreTrainedConfig) -> dict[int, tuple[Tensor, Tensor]]:
    """How each layer's attention turns a query by NEAR and by FAR positions, float64 `[D, D]` each."""
    # whatever device or thread a model is being built on or in; a GPU's random state is not touched
    with ONE_AT_A_TIME, torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, dim = small_model(config)
        hidden = torch.randn(2 * dim, 1, HEADS * dim, dtype=torch.float64)
        start, near, far = (queries_at(model, hidden, position) for position in (0, NEAR, FAR))

    def rotations(layer: int) -> tuple[Tensor, Tensor]:
        turned = torch.cat((near[layer], far[layer]), dim=1).double()
        by_near, by_far = torch.linalg.lstsq(start[layer].double(), turned).solution.mT.chunk(2)
        return by_near.clone(), by_far.clone()

    return {layer: rotations(layer) for layer in start}


def small_model(config: PreTrainedConfig) -> tuple[PreTrainedModel, int]:
    """A family's decoder with few and narrow heads, as many layers and the same rotation; and a head's size.

    In its layers nothing has numbers yet, and they are left early.
    """
    family, fields = find_family(config.model_type), config.to_dict()
    dim = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    fields |= {name: value for name, value in SMALL.items() if hasattr(config, name)}
    fields["hidden_size"] = HEADS * dim
    for name in ("model_type", "architectures", "transformers_version", "auto_map", "dtype"):
        fields.pop(name, None)
    small = family.config(**fields)
    small._attn_implementation = PROBE
    small._experts_implementation = "eager"
    with torch.device("meta"):
        model: Any = family.model(small).double().eval()
    (layers,) = (
        module
        for module in model.children()
        if isinstance(module, nn.ModuleList) and any(type(layer) in family.layers for layer in module)
    )
    give_numbers(model, model, recurse=False)
    for module in model.children():
        if module is not layers:
            give_numbers(module, model)
    for layer in layers:
        give_numbers(layer, model, recurse=False)
        for module in layer.children():
            module.register_forward_pre_hook(lambda module, given: give_numbers(module, model))
        leave_early(layer, family)
    return model, dim


def give_numbers(module: nn.Module, model: Any, recurse: bool = True) -> None:
    """Gives a module without numbers the model's initial ones, and its parameters random ones on top.

    On top of those of norms too: at their initial values a norm hides something.

    Args:
        module: of the model, or itself; nothing is done where it has numbers.
        model: knows how its modules are initialised.
        recurse: all that is inside the module, too.
    """
    if not any(tensor.is_meta for tensor in (*module.parameters(recurse), *module.buffers(recurse))):
        return
    module.to_empty(device="cpu", recurse=recurse)
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)  # what nobody initialises shows
    for part in module.modules() if recurse else [module]:
        model._init_weights(part)
    for parameter in module.parameters(recurse):
        parameter.nan_to_num_(0.0).add_(torch.randn_like(parameter), alpha=0.1)


class Seen(Exception):
    """A layer's queries have been seen."""


def leave_early(layer: Any, family: DenseFamily) -> None:
    """Makes a layer give its hidden states back as soon as its queries were seen, or at once where it has none."""
    forward: Callable[..., Any] = layer.forward
    attends = any(type(module) in family.layers.values() for module in layer.modules())
    returned = [node.value for node in ast.walk(source_of(type(layer).forward)) if isinstance(node, ast.Return)]
    further = max((len(value.elts) - 1 for value in returned if isinstance(value, ast.Tuple)), default=None)

    def look(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if attends:
            with suppress(Seen):
                forward(hidden_states, *args, **kwargs)
        return hidden_states if further is None else (hidden_states, *[None] * further)

    layer.forward = look


def queries_at(model: PreTrainedModel, hidden: Tensor, position: int) -> dict[int, Tensor]:
    """Each layer's queries `[B, D]` of its first head, after norms and RoPE, for hidden states at one position.

    Args:
        hidden: `[B, 1, hidden]`, texts of one token each.
    """
    model(
        inputs_embeds=hidden,
        position_ids=torch.full((len(hidden), 1), position),
        attention_mask=torch.ones(len(hidden), 1, dtype=torch.long),
        use_cache=False,
    )
    layers = (module for module in model.modules() if hasattr(module, "probed_queries"))
    return {module.layer_idx: module.probed_queries for module in layers}


def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """In the place of attention: the first head's queries, `[B, D]`, stay with the module, and its layer is left."""
    module.probed_queries = query[:, 0, 0]
    raise Seen


AttentionInterface.register(PROBE, record)
AttentionMaskInterface.register(PROBE, lambda *args, **kwargs: None)
