"""Training on texts shorter than one compressed block: every parameter has a gradient, zero where it had no part.

Where one has none, DDP raises in the next step, and processes that wait for each other's gradients wait for ever.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_SIZES, randomize_nsa, tiny_dense_model
from torch import Tensor

import nsa_hf

KINDS = ["mean", "linear", "mlp"]
BRANCHES = ["shared", "independent"]
SHORT = TINY_SIZES["nsa_kernel_size"] - 1


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(3))


def mask(length: int, *real: int) -> Tensor:
    return (torch.arange(length) >= length - torch.tensor(real)[:, None]).long()


LAYOUTS = {
    "one token": {"input_ids": tokens(1, 1)},
    "short": {"input_ids": tokens(2, SHORT)},
    "short and padded": {"input_ids": tokens(2, SHORT), "attention_mask": mask(SHORT, SHORT, 2)},
    "short in long padding": {"input_ids": tokens(2, 40), "attention_mask": mask(40, SHORT, 2)},
    "packed": {
        "input_ids": tokens(1, 3 * SHORT),
        "position_ids": torch.arange(SHORT).repeat(3)[None],
    },
}


def training(model: torch.nn.Module, **inputs) -> dict[str, Tensor | None]:
    """One step's gradients by parameter."""
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(gradients: dict[str, Tensor | None]) -> None:
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    parts = {name: gradient for name, gradient in gradients.items() if ".compress_" in name}
    assert not any(gradient.any() for gradient in parts.values())


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(tiny_nsa_model, kind: str, branches: str) -> None:
    model = tiny_nsa_model(nsa_compression=kind, nsa_branch_kv=branches)
    for inputs in LAYOUTS.values():
        for use_cache in (False, True):
            model.zero_grad()
            if not (use_cache and "position_ids" in inputs):
                check(training(model, **inputs, use_cache=use_cache))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("branches", BRANCHES)
def test_with_gradient_checkpointing(tiny_nsa_model, branches: str, reentrant: bool) -> None:
    model = tiny_nsa_model(nsa_compression="mlp", nsa_branch_kv=branches)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for inputs in LAYOUTS.values():
        model.zero_grad()
        check(training(model, **inputs))


@pytest.mark.parametrize("implementation", ["nsa", "eager"])
def test_also_where_only_the_new_parameters_are_trained(tiny_nsa_model, implementation: str) -> None:
    model = tiny_nsa_model(nsa_compression="mlp")
    model.set_attn_implementation(implementation)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".nsa." in name)
    for inputs in LAYOUTS.values():
        model.zero_grad()
        gradients = training(model, **inputs)
        check({name: gradient for name, gradient in gradients.items() if ".nsa." in name})


WAYS = [("shared", False), ("shared", True), ("independent", True)]


def steps_of(rank: int, meeting: Path) -> list[dict[str, Tensor]]:
    """One of two processes: rank 0 reads short texts and rank 1 long ones; the gradients of two steps, each way."""
    torch.set_num_threads(1)
    minute = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=minute)
    gradients = []
    for branches, checkpointing in WAYS:
        torch.manual_seed(0)
        dense = tiny_dense_model(num_hidden_layers=1).config
        fields = {**TINY_SIZES, "nsa_compression": "mlp", "nsa_branch_kv": branches}
        model = nsa_hf.NsaLlamaForCausalLM(nsa_hf.nsa_config_from_dense(dense, **fields)).train()
        randomize_nsa(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        x = tokens(1, 40 if rank else SHORT)
        for _ in range(2):
            model.zero_grad()
            parallel(input_ids=x, labels=x).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return gradients


def test_two_processes_one_of_which_reads_short_texts(tmp_path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        both = [pool.submit(steps_of, rank, tmp_path / "meeting") for rank in (0, 1)]
        for first, second in zip(*(one.result() for one in both), strict=True):
            assert all(torch.equal(first[name], second[name]) for name in first)
            assert all(gradient.any() for name, gradient in first.items() if ".compress_" in name)
