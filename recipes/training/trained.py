"""What a stage trains: all weights, the NSA parameters, the attention's projections, or an adapter (LoRA, by PEFT).

adapter = choose_trained(student, stage)
...                                          # steps
files = merge(adapter)              # the student is a plain model again, with the adapter in its weights
files.save(folder)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from nsa_hf.adapters import import_peft
from nsa_hf.errors import NsaError
from nsa_hf.projections import KEYS, OUTPUT, QUERIES, VALUES
from nsa_hf.releases import checkpoint_activations

from .config import RunConfig
from .sharding import whole_tensor

PROJECTIONS = {"qk": (QUERIES, KEYS), "qkvo": (QUERIES, KEYS, VALUES, OUTPUT)}
LORA_NEEDS = "trains 'lora'"
ADAPTER = "adapter"  # the folder in a trained model's


class AdapterFiles(NamedTuple):
    """An adapter as it is saved: PEFT's config, and its tensors by name."""

    config: Any
    tensors: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes it into a model's folder, as `PeftModel.from_pretrained(converted, folder / "adapter")` reads it."""
        folder = folder / ADAPTER
        folder.mkdir()
        self.config.save_pretrained(folder)
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def choose_trained(student: Any, stage: RunConfig) -> Any:
    """Freezes what a stage does not train, puts its adapter on, and sets which activations it computes again.

    Returns:
        PEFT's model around the student where the stage trains an adapter, else None.

    Raises:
        NsaError: the model does not have what is to be trained.
    """
    names = trained_modules(student, stage)
    chosen = {id(parameter) for name in names for parameter in student.get_submodule(name).parameters()}
    adapter = put_adapter(student, stage, names) if stage.trains == "lora" else None
    for name, parameter in student.named_parameters():
        if ".nsa." in name:
            parameter.requires_grad_(bool(stage.lr_nsa))
        elif adapter is not None:
            parameter.requires_grad_("lora_" in name and stage.lr_backbone > 0)
        else:
            parameter.requires_grad_(stage.lr_backbone > 0 and (stage.trains == "all" or id(parameter) in chosen))
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise NsaError(f"trains {stage.trains!r}: this model has no such parameters, or their rate is 0")
    checkpoint_activations(student, stage.gradient_checkpointing)
    return adapter


def check_stage(student: Any, stage: RunConfig, sharded: bool, number: int = 1) -> None:
    """Whether a stage can train what it says.

    Args:
        student: the model, before its first stage.
        stage: the stage's settings.
        sharded: whether the model is trained in parts (FSDP2).
        number: the stage's, counted from 1.

    Raises:
        NsaError: why not.
    """
    if sharded and stage.trains == "lora" and number > 1:
        raise NsaError(
            "trains 'lora' works with FSDP2 in the first stage only, since a model that is in parts takes no new "
            "parameters: put that stage first, or use DDP"
        )
    if sharded and stage.selector_weight:
        raise NsaError("selector_weight does not work with FSDP2 yet, which takes the compressors apart: use DDP")
    trained_modules(student, stage)
    checkpoint_activations(student, stage.gradient_checkpointing)  # refused now, not when the stage begins
    checkpoint_activations(student, 0)


def trained_modules(student: Any, stage: RunConfig) -> list[str]:
    """The names of the modules that a stage trains, or that get an adapter; none where it trains 'all' or 'nsa'.

    Raises:
        NsaError: the model does not have them, or PEFT is missing.
    """
    if stage.trains in PROJECTIONS:
        return projections(student, PROJECTIONS[stage.trains])
    if stage.trains != "lora":
        return []
    import_peft(LORA_NEEDS)
    if not stage.lora_targets:
        return projections(student, PROJECTIONS["qkvo"])
    linear = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and ".nsa." not in name and module is not student.get_output_embeddings()
    ]
    named = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in stage.lora_targets}
    if missing := [target for target, names in named.items() if not names]:
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        raise NsaError(f"lora_targets: no linear layer {missing[0]!r} in this model; it has {', '.join(kinds)}")
    wanted = {name for names in named.values() for name in names}
    return [name for name in linear if name in wanted]


def projections(student: Any, parts: tuple[str, ...]) -> list[str]:
    """The names of projections in the attentions of a model.

    Args:
        parts: what they are called there.

    Raises:
        NsaError: an attention has them by other names, as one that makes queries, keys and values together.
    """
    attentions, found = {id(module) for module in student.attention_layers()}, []
    for name, module in student.named_modules():
        if id(module) not in attentions:
            continue
        children = dict(module.named_children())
        if missing := [part for part in parts if part not in children]:
            linear = [part for part, child in children.items() if isinstance(child, nn.Linear)]
            raise NsaError(
                f"{name} has no {missing[0]}, but {', '.join(linear) or 'no linear layers'}: give their names in "
                "lora_targets with trains 'lora', or train 'all'"
            )
        found += [f"{name}.{part}" for part in parts]
    return found


def put_adapter(student: Any, stage: RunConfig, names: list[str]) -> Any:
    """PEFT's model around the student, whose named linear layers have a new adapter; it changes nothing yet."""
    peft = import_peft(LORA_NEEDS)
    config = peft.LoraConfig(
        r=stage.lora_rank, lora_alpha=stage.lora_alpha, target_modules=names, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(student, config)


def merge(adapter: Any) -> AdapterFiles:
    """Adds an adapter to the weights of the student that it is on, and takes it off.

    Args:
        adapter: of `choose_trained`; in all processes, where the student is in parts.

    Returns:
        The adapter, whole.
    """
    peft = import_peft(LORA_NEEDS)
    config = adapter.peft_config["default"]
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)
    tensors = {
        name: whole_tensor(tensor.detach()).cpu().contiguous()
        for name, tensor in peft.get_peft_model_state_dict(adapter).items()
    }
    adapter.merge_and_unload()
    return AdapterFiles(config, tensors)


def is_all_that_is_trained(stage: RunConfig) -> bool:
    """Whether a stage changes nothing but what its adapter holds."""
    return stage.trains == "lora" and not stage.lr_nsa and not stage.gate_blend_steps
