"""What a conversion costs: memory that does not grow with the model, and hardly more time than a copy."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from statistics import median

import pytest
from big_checkpoint import Cost, cost_of, write_big_llama

# Says how long the conversion itself took: what importing PyTorch takes does not grow with the model.
CONVERT = """
import json, sys, time
from pathlib import Path
from nsa_hf.conversion import convert
began = time.perf_counter()
convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
Path(sys.argv[2] + ".seconds").write_text(str(time.perf_counter() - began))
"""
SMALL = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}


def convert_alone(src: Path, out: Path, options: str = "{}") -> tuple[Cost, float]:
    """Converts in a process of its own; what that cost, and the seconds of the conversion. Removes the result."""
    cost = cost_of([sys.executable, "-c", CONVERT, str(src), str(out), options])
    shutil.rmtree(out)
    return cost, float(Path(f"{out}.seconds").read_text())


def test_memory_does_not_grow_with_the_model_nor_with_its_shards(tmp_path):
    """A model four times as large, in one file as large as itself, takes no more memory."""
    peaks = []
    for layers in (4, 16):
        size = write_big_llama(tmp_path / "src", layers, 10**12, **SMALL)
        peaks.append(convert_alone(tmp_path / "src", tmp_path / "out")[0].memory)
        shutil.rmtree(tmp_path / "src")
    # of 0.5 GB; allocators may keep a little more of the one than of the other
    assert size > 4.5e8
    assert peaks[1] - peaks[0] < 4e7, peaks
    assert peaks[1] < 1.5e9


@pytest.mark.slow
@pytest.mark.parametrize("options", ["{}", '{"dtype": "float16"}'])
def test_a_sharded_checkpoint_takes_little_memory_and_at_most_half_as_long_again_as_a_copy(tmp_path, options):
    """6 GB in 2.5 GB shards, an 8B model's tensors: under 3 GiB by the operating system's figure."""
    size = write_big_llama(tmp_path / "src", 9, 2_500_000_000)
    assert size > 6e9
    copies, conversions = [], []
    # in turn, since other work on the machine slows both down
    for _ in range(6):
        copies.append(cost_of(["cp", "-r", str(tmp_path / "src"), str(tmp_path / "copy")]).seconds)
        shutil.rmtree(tmp_path / "copy")
        cost, seconds = convert_alone(tmp_path / "src", tmp_path / "out", options)
        conversions.append(seconds)
        assert cost.memory < 3 * 2**30
    print(f"{size / 1e9:.2f} GB: copies {copies} s, conversions {conversions} s, {cost.memory / 2**30:.2f} GiB")
    assert median(conversions) <= 1.5 * median(copies), (conversions, copies)
