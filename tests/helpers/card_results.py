"""Results as the commands write them, with figures that are easy to find again; for the tests of the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MACHINE = {
    "hardware": {"cpu": "Test CPU", "threads": 2, "gpus": []},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}


def row(start: int, end: int, reference: float | None, ppl: float | None, kl: float | None = 0.0125) -> dict[str, Any]:
    """One row of a comparison by position."""
    figures = {
        "ppl_reference": reference,
        "ppl": ppl,
        "kl": kl,
        "same_top1": 0.9375,
        "max_abs_diff": 0.5,
        "top1_gap": 0,
    }
    return {"from": start, "to": end, "tokens": 2 * (end - start), **figures}


def manifest(trained: bool = False) -> dict[str, Any]:
    source = {
        "name": "somewhere/on/a/disk/dense-model",
        "kind": "gguf",
        "revision": None,
        "license": "apache-2.0",
        "model_name": "Tiny 1M",
        "files": {"tiny.gguf": {"bytes": 123456, "sha256": "ab" * 32}},
    }
    tensors = {"model.norm.weight": {"from": "source"}, "model.layers.0.self_attn.nsa.gate.up.weight": {"from": "nsa"}}
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    record = {"format": 1, "trained": trained, "source": source, "versions": versions, "tensors": tensors}
    return record | ({"training": {"steps": 8, "fingerprint": {"seed": 0}}} if trained else {})


def config() -> dict[str, Any]:
    return {"nsa_kernel_size": 32, "nsa_block_size": 64, "nsa_topk": 16, "nsa_window_size": 512, "nsa_gate": "residual"}


def verify(exact: bool | None = True) -> dict[str, Any]:
    why = {
        True: "all kept",
        False: "1 of 272 tensors are not the source's",
        None: "trained: differs from its source as recorded",
    }[exact]
    rows = [row(0, 512, 10.125, 10.125, 1e-12), row(512, 1024, 9.5, 9.5, 2e-12), row(1024, 2048, 7.25, 7.375, 0.03125)]
    return {
        "exact": exact,
        "why": why,
        "length": 2048,
        "documents": [{"name": "_pydecimal.py", "tokens": 2048}, {"name": "tarfile.py", "tokens": 2048}],
        "computed_in": "float32",
        "tensors": {"kept": 271, "of": 272},
        "exact_range": {"up_to": 1024, "max_abs_diff": 8.5e-5, "same_top1": 1.0},
        "by_position": rows,
    }


def training(steps: int = 8) -> dict[str, Any]:
    before = [row(0, 1024, 10.0, 10.0, 0.0), {**row(1024, 2048, 8.0, 8.5, 0.0625), "rise": 0.0625, "rise_error": 0.005}]
    after = [
        row(0, 1024, 10.0, 9.9, 0.001),
        {**row(1024, 2048, 8.0, 8.25, 0.03125), "rise": 0.03125, "rise_error": 0.0025},
    ]
    own = [row(0, 1024, 9.9, 9.9), row(1024, 2048, 8.125, 8.25)]
    curve = [{"step": i + 1, "ce": 2.5 - i / 50, "kl": 0.0625 / (1 + i / 4)} for i in range(steps)]
    settings = {"data": "stdlib", "length": 2048, "batch_size": 1, "accumulate": 2}
    weights = {"ce_weight": 0.1, "kl_weight": 1.0, "lr_nsa": 1e-3, "lr_backbone": 1e-5}
    held_out = {
        "names": ["_pydecimal.py", "tarfile.py"],
        "before": before,
        "after": after,
        "after_own_dense": own,
        "kl_before": 0.0315,
        "kl_after": 0.0161,
    }
    return {"config": {**settings, **weights}, "processes": 1, "curve": curve, "held_out": held_out, **MACHINE}


def inspection(layers: int = 8, heads: int = 3, blocks: int = 32) -> dict[str, Any]:
    """Selections that look like real ones: the first block, a diagonal, and a few columns that fade."""

    def share(layer: int, head: int, query: int, key: int) -> float:
        if key > query:
            return 0.0
        if key == 0 or query - key < 2 or query < 16:
            return 1.0
        return round(((key * (7 + layer) + 3 * head) % 11) / 11 * (1 - (query - key) / 64), 3)

    maps = [
        [[[share(i, h, q, k) for k in range(blocks)] for q in range(blocks)] for h in range(heads)]
        for i in range(layers)
    ]
    return {
        "text": "_pydecimal.py",
        "length": 64 * blocks,
        "block_size": 64,
        "layers": list(range(layers)),
        "branches": ["compressed", "selected", "window"],
        "gates": [[0.01 * i, 1 - 0.005 * i, -0.002 * i] for i in range(layers)],
        "map": maps,
    }


def needles() -> dict[str, Any]:
    """Of the suite `needle`: dense finds all, sparse not the deepest of the longest."""
    lengths, depths = [4096, 8192], [0.0, 0.5, 1.0]
    found = {("single", 8192, 1.0): 0.0}
    cells = [
        {
            "kind": kind,
            "length": length,
            "depth": depth,
            "dense": {"found": 1.0, "nll": 0.01},
            "sparse": {"found": found.get((kind, length, depth), 1.0), "nll": 0.02},
        }
        for kind in ("single", "multiple")
        for length in lengths
        for depth in depths
    ]
    mean = {"kind": "single", "length": 8192, "dense": {"found": 1.0}, "sparse": {"found": 2 / 3}}
    lost = [{"kind": "single", "length": 8192, "depth": 1.0}]
    return {"lengths": lengths, "depths": depths, "samples": 2, "cells": cells, "means": [mean], "lost": lost}


def evaluation() -> dict[str, Any]:
    """Of `nsa-hf eval` with every suite."""
    rows = [{**row(1024, 2048, 9.75, 9.875), "rise": 0.0128, "rise_error": 0.0011}]
    texts = {"origin": "given by the user", "sha256": {f"{name}.txt": "0" for name in "abcde"}}
    recall = [{"layer": layer, "recall": 0.75, "captured": 0.875, "oracle": 0.9} for layer in range(4)]
    ruler = [{"task": "vt", "length": 4096, "questions": 20, "dense": 0.85, "sparse": 0.8}]
    harness = [{"task": "arc_easy", "metric": "acc", "dense": 0.6125, "sparse": 0.6}]
    suites = {
        "ppl": {"rows": rows, "recall": recall, "rope_scaling": "yarn:2", "length": 2048, "texts": texts},
        "needle": needles(),
        "ruler": {"data": None, "rows": ruler},
        "lm-eval": {"version": "0.4.13", "limit": None, "rows": harness},
    }
    return {"format": 2, "suites": suites}


def sample(chat: bool = False, text: str = "Paris is the capital of France.") -> dict[str, Any]:
    return {
        "chat": chat,
        "prompt_tokens": 1500,
        "prompt_end": "What is the capital?" if chat else "def frombuf(",
        "text": text,
        "tokens_per_second": 12.25,
        "dtype": "float32",
        "device": "cpu",
        "do_sample": False,
        **MACHINE,
    }


def write(folder: Path, **results: Any) -> Path:
    """A folder with these results: `write(tmp_path, manifest=..., verify=...)`."""
    folder.mkdir(exist_ok=True)
    names = {"inspection": "inspect", "evaluation": "eval", "long": "generate-long", "chat": "generate-chat"}
    for name, content in {"manifest": manifest(), "config": config(), **results}.items():
        (folder / f"{names.get(name, name)}.json").write_text(json.dumps(content))
    return folder
