"""A sharded bfloat16 Llama of any size on disk, written without ever being in memory; and what a process cost."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

# Llama 3.1 8B's sizes; each layer is 436 MB, embedding and head 1.05 GB each.
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def write_big_llama(folder: Path, layers: int, shard_bytes: int, **sizes) -> int:
    """Writes it with random weights (one random megabyte over and over); gives the bytes of all files."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**{**LLAMA_8B, **sizes}, num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    hidden, kv = config.hidden_size, config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (config.intermediate_size, hidden),
            f"{at}.mlp.up_proj.weight": (config.intermediate_size, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, config.intermediate_size),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and 2 * sum(torch.Size(s).numel() for s in [*shards[-1].values(), shape]) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 19, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_shard(folder / file, shard, block)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            end -= file.write(block[:end])


@dataclass
class Cost:
    """What a process took: seconds by the clock, CPU seconds, and its largest resident memory in bytes."""

    seconds: float
    cpu: float
    memory: int


def cost_of(command: list[str], **options) -> Cost:
    """Runs a command and asks the operating system what it cost.

    Raises:
        AssertionError: it did not exit with 0.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, **options)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command} exited with {process.returncode}"
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
