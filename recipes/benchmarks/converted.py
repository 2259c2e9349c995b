"""What a converted model loses before any training: each position beside the dense model, over many documents.

    python -m nsa_hf.recipes.benchmarks.converted MODEL DOCUMENTS.json --csv OUT.csv --tokens 8192 --option topk=24

MODEL is a dense folder; DOCUMENTS.json a list of {"name", "text"}, of which the first is left out, as in selectors.py.
The model is converted in memory: as recommended, but for what `--option` says. For each range of positions: KL to the
dense model and the rise of perplexity over it, as there, with standard errors over documents, paired.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa_hf
from nsa_hf.conversion.compare.models import final_states

from .selectors import MEASURED, RAN, losses, measured_columns, read_documents

CONVERTED = ("model", "dtype", "selector", "channels", "bits", "compression", "block_size", "topk", "dense_layers")


def parse_option(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` of `--option`: the value as JSON, or as it stands.

    Raises:
        argparse.ArgumentTypeError: there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"NAME=VALUE, as in topk=24, got {text}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def converted_columns(model: str, dtype: str, config: Any) -> list[Any]:
    """The columns CONVERTED of a model's rows."""
    return [
        model,
        dtype,
        config.nsa_selector,
        config.nsa_selector_dim,
        config.nsa_selector_bits,
        config.nsa_compression,
        config.nsa_block_size,
        config.nsa_topk,
        " ".join(map(str, config.nsa_dense_layers)),
    ]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("documents", type=Path)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--most", type=int, default=30, help="documents at the most")
    parser.add_argument("--bos", action="store_true", help="begin every document with the tokenizer's first token")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--option", type=parse_option, action="append", default=[], help="NAME=VALUE of an nsa_* field")
    parser.add_argument("--commit", default="", help="noted in the rows")
    args = parser.parse_args(arguments)

    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = getattr(nsa_hf, f"Nsa{type(dense).__name__}").from_dense(dense, **dict(args.option))
    model = model.to(device, getattr(torch, args.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = read_documents(args.documents, tokenizer, args.tokens, 10**9, args.bos, device)
    if not (documents := documents[1:][: args.most]):
        parser.error(f"{args.documents} must hold a text of {args.tokens} tokens or more behind its first")
    results, begin = [], time.perf_counter()
    for done, ids in enumerate(documents, 1):
        (sparse,) = final_states(model, [("", ids)])
        with model.dense_attention():
            (states,) = final_states(model, [("", ids)])
        results.append(losses(model, ids, states[0], sparse[0]))
        print(f"{done} of {len(documents)} documents, {time.perf_counter() - begin:.0f} s", flush=True)

    ran = [args.tokens, torch.cuda.get_device_name() if device == "cuda" else "cpu", torch.__version__]
    columns = converted_columns(Path(args.model).name, args.dtype, model.config)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*CONVERTED, *MEASURED, *RAN])
        for row, text in measured_columns(results):
            writer.writerow([*columns, *row, *ran, transformers.__version__, args.commit])
            print(row[0], "-", row[1], text)


if __name__ == "__main__":
    main()
