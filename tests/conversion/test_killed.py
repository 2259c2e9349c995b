"""Conversions that are killed, anywhere, and started again."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
from big_checkpoint import write_big_llama

from nsa_hf.conversion import convert

SIZES = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_key_value_heads": 4}
OPTIONS = {"max_shard_size": "2MB", "compression_dim": 16}


def convert_alone(src: Path, out: Path, overwrite: bool) -> None:
    import torch

    torch.set_num_threads(1)
    convert(src, out, overwrite=overwrite, **OPTIONS)


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything already, so that a random moment is one of the work's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nsa_hf.conversion", "test_killed"])
    return context


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("big") / "src"
    write_big_llama(folder, 6, 9_000_000, num_attention_heads=8, **SIZES)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def noted(place: Path) -> list[str]:
    """The files that a conversion noted as complete."""
    try:
        return list(json.loads((place / "progress.json").read_text())["progress"]["files"])
    except OSError:
        return []


def complete_files(place: Path) -> dict[str, int]:
    """Those that are still in the making, of a killed conversion, and their inodes."""
    return {name: (place / "model" / name).stat().st_ino for name in noted(place) if (place / "model").exists()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_twenty_random_moments(src, tmp_path, processes, overwrite):
    """Also the kills while an older model is being replaced, which stays whole until the new one is."""
    expected = bytes_of(convert(src, tmp_path / "whole", **OPTIONS))
    assert len([name for name in expected if name.endswith(".safetensors")]) > 8
    old = bytes_of(convert(src, tmp_path / "old", topk=5)) if overwrite else None
    chance = random.Random(0)
    kills = continued = number = 0
    while kills < 20:
        number += 1
        out = tmp_path / f"out{number}"
        place = out.with_name(f".{out.name}.unfinished")
        if overwrite:
            convert(src, out, topk=5)
        while bytes_of(out) != expected:
            before = complete_files(place)
            process = processes.Process(target=convert_alone, args=(src, out, overwrite))
            process.start()
            if kills < 20:
                # somewhere in the next files, however fast this machine is just now; or after the last one
                until = len(before) + chance.randint(0, 6)
                while process.is_alive() and len(noted(place)) < until:
                    time.sleep(0.001)
                process.join(chance.uniform(0, 0.05))
            else:
                process.join()
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += process.exitcode == -9
            else:
                assert process.exitcode in (0, -9)
            if process.exitcode == 0:
                break
            # whole, or what it was
            assert bytes_of(out) in ([expected, old] if overwrite else [expected, {}]) or _between(place, old)
            after = complete_files(place)
            if place.exists() and bytes_of(out) != expected:
                assert before.items() <= after.items(), "what was complete was done again"
            continued += bool(before)
        assert bytes_of(out) == expected
    assert continued > 3


def _between(place: Path, old: dict[str, bytes] | None) -> bool:
    """Killed between the two renames: the old model waits in the hidden folder, and the next start puts it back."""
    return old is not None and bytes_of(place / "replaced") == old
