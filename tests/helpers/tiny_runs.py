"""Converted folders, texts and settings of tiny runs, for the tests of the recipes."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_models import randomize_nsa
from torch import Tensor

from nsa_hf.conversion import convert
from nsa_hf.recipes.training.config import RunConfig, make_run_config

WORDS = ("the", "of", "and", "to", "in", "that", "is", "was", "for", "it", "with", "as", "his", "on", "they", "which")


def converted(dense: Path, out: Path, sizes: dict[str, Any], **options: Any) -> Path:
    """A tiny converted model with its tokenizer, exact up to 64 tokens."""
    return convert(dense, out, **{**sizes, **options})


def converted_and_opened(dense: Path, out: Path, sizes: dict[str, Any], **options: Any) -> Path:
    """The same with random NSA parameters: gates and compressors are in use, as after training."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted(dense, out, sizes, **options))
    randomize_nsa(model)
    model.save_pretrained(out)
    return out


def write_texts(folder: Path, count: int = 6, words: int = 200, seed: int = 0) -> Path:
    """A folder of texts in which words come back, a few hundred bytes each."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for index in range(count):
        text = " ".join(generator.choice(WORDS) for _ in range(words))
        (folder / f"{index}.txt").write_text(text)
    return folder


def tiny_run(model: Path, texts: Path, out: Path, **settings: Any) -> RunConfig:
    """A run of a few seconds."""
    values: dict[str, Any] = {
        "model": str(model),
        "out": str(out),
        "data": str(texts),
        "held_out": str(texts),
        "length": 128,
        "steps": 4,
        "warmup_steps": 1,
        "ce_weight": 1.0,
        "lr_nsa": 1e-2,
        "lr_backbone": 1e-3,
        "mixed_precision": "no",
        "batch_size": 1,
        "save_every": 2,
        "loss_chunk": 50,
    }
    return make_run_config({**values, **settings})


def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def result_of(folder: Path) -> dict[str, Any]:
    """What a finished run wrote into its training.json."""
    return json.loads((folder / "training.json").read_text())


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model in one file."""
    return load_file(folder / "model.safetensors")


def stop_at(config: RunConfig, step: int) -> Path:
    """Runs a run until it has saved the checkpoint of a step, and stops it there; gives the unfinished run's folder."""
    # imported here, since not every test that makes folders needs them
    from nsa_hf.recipes.training.checkpoints import Checkpoints
    from nsa_hf.recipes.training.loop import train

    save = Checkpoints.save

    def save_and_stop(self: Any, accelerator: Any, done: int, state: dict[str, Any]) -> None:
        save(self, accelerator, done, state)
        if done == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", save_and_stop)
        train(config)
    return Path(f"{config.out}.unfinished")
