"""`nsa_hf.recipes.finetune` in processes that share a model by FSDP2, which Accelerate knows on GPUs only.

With `--lora`, which the script does not have, an adapter is trained and the gates beside it.
"""

from __future__ import annotations

import os
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from nsa_hf.recipes import finetune
from nsa_hf.recipes.training.sharding import shard_on_cpu

ordinary_init = Accelerator.__init__


def init_on_cpu(accelerator: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """Accelerate's own, and FSDP2 on the CPU where it is asked for."""
    ordinary_init(accelerator, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        shard_on_cpu(accelerator, fsdp_plugin)
        print("in parts:", accelerator.is_fsdp2)


def adapted(model: Any) -> Any:
    """The model with an adapter, the same in every process."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["nsa.gate"]))


def main(arguments: list[str]) -> int:
    """The script's own."""
    Accelerator.__init__ = init_on_cpu
    if "--lora" in arguments:
        arguments.remove("--lora")
        finetune.Trainer = lambda model, *args, **kwargs: Trainer(adapted(model), *args, **kwargs)
    datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]  # imported before that was set
    return finetune.main(arguments)
