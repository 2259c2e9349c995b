"""`nsa_hf.recipes.finetune` in processes that share a model by FSDP2, which Accelerate knows on GPUs only."""

from __future__ import annotations

import os
from typing import Any

import datasets
from accelerate import Accelerator

from nsa_hf.recipes import finetune
from nsa_hf.recipes.training.sharding import shard_on_cpu

ordinary_init = Accelerator.__init__


def init_on_cpu(accelerator: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """Accelerate's own, and FSDP2 on the CPU where it is asked for."""
    ordinary_init(accelerator, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        shard_on_cpu(accelerator, fsdp_plugin)
        print("in parts:", accelerator.is_fsdp2)


def main(arguments: list[str]) -> int:
    """The script's own."""
    Accelerator.__init__ = init_on_cpu
    datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]  # imported before that was set
    return finetune.main(arguments)
