"""A small random Llama and its conversions, to be trained from scratch side by side.

    python -m nsa_hf.recipes.benchmarks.scratch build/scratch --tokenizer path/to/smollm2
    (a toy size: --layers 2 --hidden 128)

OUT/dense is the dense model, OUT/index is converted as recommended, OUT/paper as in the paper: all three branches,
blocks scored by compressed keys, sigmoid gates. What they have in common has the same random weights. The dense one is
trained as OUT/index with attention=dense: see recipes/runs/scratch.yaml.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nsa_hf.conversion import convert
from nsa_hf.errors import NsaError

from ..load import load_tokenizer

HEAD = 64  # channels of a head
CONVERSIONS: dict[str, dict[str, Any]] = {
    "index": {},
    "paper": {"selector": "compressed", "gate": "sigmoid"},
}


def dense_config(tokenizer: Any, layers: int, hidden: int, tokens: int) -> LlamaConfig:
    """The config of a small Llama: two query heads for each key/value head, tied embeddings.

    Args:
        tokenizer: Transformers', whose vocabulary it has.
        layers: how many.
        hidden: its width, a multiple of 128.
        tokens: of the longest text.

    Raises:
        NsaError: no such width.
    """
    if hidden < 2 * HEAD or hidden % (2 * HEAD):
        raise NsaError(f"--hidden must be a multiple of {2 * HEAD}, got {hidden}")
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD // 2,
        head_dim=HEAD,
        max_position_embeddings=tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_models(out: Path, tokenizer: Any, config: LlamaConfig, seed: int = 0, **sizes: Any) -> int:
    """Writes OUT/dense and its conversions.

    Args:
        out: the folder.
        tokenizer: goes along with each.
        config: of the dense model.
        seed: of its weights, and of what the conversions add.
        sizes: options of both conversions.

    Returns:
        The dense model's parameters.

    Raises:
        NsaError: something is there already, or the sizes do not fit.
    """
    if (out / "dense").exists():
        raise NsaError(f"{out / 'dense'} is there already: remove it, or name another folder")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(out / "dense")
    tokenizer.save_pretrained(out / "dense")
    for name, options in CONVERSIONS.items():
        convert(out / "dense", out / name, seed=seed, **options, **sizes)
    return model.num_parameters()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the three models")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model or tokenizer")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 128")
    parser.add_argument("--tokens", type=int, default=8192, help="of the longest text")
    parser.add_argument("--seed", type=int, default=0, help="of all random weights")
    args = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(args.tokenizer)
        config = dense_config(tokenizer, args.layers, args.hidden, args.tokens)
        parameters = write_models(args.out, tokenizer, config, args.seed)
    except NsaError as error:
        parser.error(str(error))
    print(f"{args.out}: dense, {' and '.join(CONVERSIONS)}; {parameters:,} parameters of the dense model")


if __name__ == "__main__":
    main()
