"""A dense model in memory to a sparse one: `NsaLlamaForCausalLM.from_dense("path/to/llama", topk=32)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .branches import dense_twin
from .errors import NsaError
from .families import family_of, initial_nsa_state, nsa_config_from_dense
from .fields import NSA_FIELDS, full_name
from .registration import PREFIX


def from_dense(cls: type[PreTrainedModel], source: Any, seed: int, options: dict[str, Any]) -> PreTrainedModel:
    """See `NsaPreTrainedMixin.from_dense`. A model that is given keeps its own parameters: the new one has copies."""
    fields = {full: value for name, value in options.items() if (full := full_name(name)) in NSA_FIELDS}
    for name in fields:
        if name in options and name.removeprefix(PREFIX) in options:
            raise NsaError(f"{name} is given twice, with and without its prefix: give it once")
    loading = {name: value for name, value in options.items() if full_name(name) not in NSA_FIELDS}
    given = isinstance(source, PreTrainedModel)
    if given and loading:
        raise NsaError(f"unknown option {', '.join(sorted(loading))}: choose among {', '.join(NSA_FIELDS)}")
    dense = source if given else AutoModelForCausalLM.from_pretrained(source, **{"dtype": "auto", **loading})
    if getattr(dense, "hf_quantizer", None) is not None:
        raise NsaError(
            "from_dense takes plain weights, and this model is quantised: convert its plain checkpoint, save that "
            "and load it with quantization_config, which leaves gates and compressors as they are"
        )
    config = nsa_config_from_dense(dense.config, **fields)
    config.dtype = dense.dtype
    made = family_of(config).causal_lm_class
    if not issubclass(made, cls):
        raise NsaError(f"{cls.__name__}.from_dense was given a {dense.config.model_type} model: use {made.__name__}")
    with torch.device("meta"):
        model = made(config)
    new = {name: value.to(dense.device, dense.dtype) for name, value in initial_nsa_state(config, seed)}
    old = {name: value.clone() if given else value for name, value in dense.state_dict().items()}
    twins = {name: dense_twin(name) for name in model.state_dict() if name not in new}
    copies = {name: old[twin].clone() for name, twin in twins.items() if twin is not None}
    model.load_state_dict({**old, **new, **copies}, assign=True)
    model.tie_weights()
    take_buffers(model, dense)
    model.generation_config = dense.generation_config
    return model.train(dense.training)


def take_buffers(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Gives a model that was built without memory the buffers that no state dict holds, RoPE's frequencies for one."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, key = name.rpartition(".")
            value: Tensor = dense.get_buffer(name).clone()
            model.get_submodule(owner).register_buffer(key, value, persistent=key in dense.state_dict())
