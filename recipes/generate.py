"""Text from a converted model, printed as it comes: `nsa-hf generate OUT --prompt "..."`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from nsa_hf.conversion.files.staging import write_json
from nsa_hf.errors import NsaError

from .chat_template import apply_chat_template
from .load import check_finite, check_token_ids, load_nsa_model, load_tokenizer
from .training.folder import machine

# What a checkpoint's generation_config may ask for in place of one text, token after token: beams, several sequences,
# tokens guessed ahead.
SEARCHES = ["num_beams", "num_beam_groups", "num_return_sequences", "constraints", "force_words_ids"]
SEARCHES += ["penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"]
# Ways of sampling that have no option here.
SAMPLES = ["min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"]
# What `generate()` returns beside the tokens.
RETURNS = ["return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"]
# What every checkpoint's has, or the options replace.
USUAL = {"transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"}
USUAL |= {"do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache"}

TEMPERATURES = (1e-6, 1e6)  # the least and the largest beside 0, which takes the likeliest token
SEEDS = (-(2**63), 2**63 - 1)


class TimedStreamer(TextStreamer):
    """Prints text as it comes and keeps when each token came."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the prompt is put first, before it is read
        super().put(value)


def generate(
    out: Path,
    prompt: str,
    *,
    chat: bool = False,
    prompt_tokens: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    save: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Generates with the cache from `prompt` and prints it; the result, also written to `save`.

    `chat` puts the prompt into the tokenizer's chat template as a user's turn. `prompt_tokens` takes that many tokens
    of the prompt only. Temperature 0 is greedy; `top_p` 1 and `top_k` 0 leave no token out. NsaError when the settings
    or the folder are wrong.
    """
    check_settings(max_new_tokens, temperature, top_p, top_k, seed, prompt_tokens, dtype)
    tokenizer = load_tokenizer(out, trust_remote_code)
    ids = prompt_ids(tokenizer, prompt, chat)[:, :prompt_tokens]
    if ids.shape[1] == 0:
        raise NsaError("the prompt is empty: give at least one token")
    model = load_nsa_model(out, device, dtype)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and ids.shape[1] + max_new_tokens > limit:
        raise NsaError(
            f"{ids.shape[1]} prompt tokens and {max_new_tokens} new ones do not fit the model's {limit}: "
            "shorten one of them (--prompt-tokens, --max-new-tokens)"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        # all of them: what is not given would be the checkpoint's, or Transformers' top_k of 50
        sampling = {"do_sample": True, "temperature": float(temperature), "top_p": top_p, "top_k": top_k}
    check_token_ids(model, ids)
    asked = as_one_text(model.generation_config, SEARCHES + SAMPLES if temperature else SEARCHES)
    if asked:
        how = "samples as its options say" if temperature else "takes the likeliest token each time"
        print(f"note: generation_config.json asks for {', '.join(asked)}; this command {how}", file=sys.stderr)
    torch.manual_seed(seed)
    streamer = TimedStreamer(tokenizer)
    model.register_forward_hook(lambda model, inputs, output: check_finite(output.logits[:, -1], out))
    ids = ids.to(device)
    try:
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                tokenizer=tokenizer,  # for stop strings
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **sampling,
            )
    except (ValueError, TypeError) as error:
        # Transformers refuses settings that contradict each other
        if isinstance(error, NsaError) or not model.generation_config.to_diff_dict().keys() - USUAL:
            raise
        raise NsaError(f"{out / 'generation_config.json'} cannot be followed: {error}") from error
    new = output[0, ids.shape[1] :]
    start, first, *_ = streamer.times
    decoding = streamer.times[-1] - first
    result = {
        "format": 1,
        "chat": chat,
        "prompt_tokens": ids.shape[1],
        "prompt_end": tokenizer.decode(ids[0, -48:], skip_special_tokens=True) if not chat else prompt,
        "new_tokens": len(new),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "seconds_to_first_token": first - start,
        "tokens_per_second": (len(new) - 1) / decoding if len(new) > 1 and decoding > 0 else None,
        "dtype": dtype,
        "device": device,
        **sampling,
        "seed": seed,
        **machine(),
    }
    print(speed_line(result))
    if save is not None:
        write_json(save, result)
    return result


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """The prompt's tokens, int64 [1, T]."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise NsaError(f"the prompt is no text in UTF-8: {error}") from error
    if not chat:
        return tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
    text = apply_chat_template(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids.long()


def as_one_text(config: Any, names: Sequence[str] = SEARCHES) -> list[str]:
    """Takes `names` and RETURNS out of a generation config; gives those of `names` that were set, as name=value."""
    asked = [f"{name}={value}" for name in names if (value := getattr(config, name, None)) not in (None, 1, False)]
    for name in (*names, *RETURNS):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return asked


def check_settings(
    new: int, temperature: float, top_p: float, top_k: int, seed: int, prompt_tokens: int | None, dtype: str
) -> None:
    if new < 1 or (prompt_tokens is not None and prompt_tokens < 1):
        raise NsaError(f"--max-new-tokens and --prompt-tokens must be at least 1, got {new} and {prompt_tokens}")
    if temperature != 0 and not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
        raise NsaError(f"temperature must be 0 (the likeliest token) or from 1e-6 to 1e6, got {temperature}")
    if not 0 < top_p <= 1:
        raise NsaError(f"top_p must be in (0, 1], got {top_p}")
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise NsaError(f"seed must have at most 63 bits, got {seed}")
    if top_k < 0:
        raise NsaError(f"top_k must be at least 0 (all tokens), got {top_k}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise NsaError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")


def speed_line(result: dict[str, Any]) -> str:
    rate = result["tokens_per_second"]
    decoding = f", then {rate:.1f} tokens/s" if rate else ""
    first = result["seconds_to_first_token"]
    return f"[{result['prompt_tokens']:,} prompt tokens read in {first:.2f} s{decoding}, {result['new_tokens']} new]"
