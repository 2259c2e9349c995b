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

# What a checkpoint's generation_config may ask for that is not one text, made token after token: beams, several
# sequences, tokens guessed ahead.
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
    """Prints text as it comes and keeps when each token came.

    Attributes:
        times: `time.perf_counter()` before the prompt is read, then when each token was there.
    """

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, before it is read, and then each token."""
        self.times.append(time.perf_counter())
        super().put(value)


def generate_text(
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
    """Generates from a prompt, with the cache, and prints the text as it comes and the speed.

    Args:
        out: the converted model's folder.
        prompt: text.
        chat: put the prompt into the tokenizer's chat template, as a user's turn.
        prompt_tokens: take this many tokens of the prompt only.
        max_new_tokens: tokens to generate at most.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens of this total probability; 1 leaves none out.
        top_k: sample among this many of the likeliest tokens; 0 leaves none out.
        seed: of sampling.
        device: where to run.
        dtype: float32, bfloat16 or float16.
        save: a JSON file for the result.
        trust_remote_code: run the code of its own that the tokenizer may have.

    Returns:
        The result: text, number of tokens, speed, settings, machine.

    Raises:
        NsaError: the settings or the folder are wrong.
    """
    check_settings(max_new_tokens, temperature, top_p, top_k, seed, prompt_tokens, dtype)
    tokenizer = load_tokenizer(out, trust_remote_code)
    ids = prompt_ids(tokenizer, prompt, chat)[:, :prompt_tokens]
    if ids.shape[1] == 0:
        raise NsaError("the prompt is empty: give at least one token")
    model = load_nsa_model(out, device, dtype)
    check_room(model, ids.shape[1], max_new_tokens)
    check_token_ids(model, ids)
    replace_searches(model.generation_config, sampled=bool(temperature))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        # all of them: what is not given would be the checkpoint's, or Transformers' top_k of 50
        sampling = {"do_sample": True, "temperature": float(temperature), "top_p": top_p, "top_k": top_k}
    torch.manual_seed(seed)
    streamer = TimedStreamer(tokenizer)
    model.register_forward_hook(lambda model, inputs, output: check_finite(output.logits[:, -1], out))
    try:
        new = stream_tokens(model, tokenizer, ids.to(device), streamer, max_new_tokens=max_new_tokens, **sampling)
    except (ValueError, TypeError) as error:
        # Transformers refuses settings that contradict each other
        if isinstance(error, NsaError) or not model.generation_config.to_diff_dict().keys() - USUAL:
            raise
        raise NsaError(f"{out / 'generation_config.json'} cannot be followed: {error}") from error
    result = {
        "format": 1,
        "chat": chat,
        "prompt_tokens": ids.shape[1],
        "prompt_end": tokenizer.decode(ids[0, -48:], skip_special_tokens=True) if not chat else prompt,
        "new_tokens": len(new),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        **speed(streamer.times, len(new)),
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


def check_settings(
    new: int, temperature: float, top_p: float, top_k: int, seed: int, prompt_tokens: int | None, dtype: str
) -> None:
    """Whether each setting has a value that means something; NsaError says which has not."""
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


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """The prompt's tokens, int64 [1, T].

    Args:
        chat: put it into the tokenizer's chat template first.

    Raises:
        NsaError: it is no text, or the template goes wrong.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise NsaError(f"the prompt is no text in UTF-8: {error}") from error
    if not chat:
        return tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
    text = apply_chat_template(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids.long()


def check_room(model: Any, prompt_tokens: int, new: int) -> None:
    """Whether the model has positions for the prompt and `new` more tokens; NsaError where it has not."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and prompt_tokens + new > limit:
        raise NsaError(
            f"{prompt_tokens} prompt tokens and {new} new ones do not fit the model's {limit}: "
            "shorten one of them (--prompt-tokens, --max-new-tokens)"
        )


def replace_searches(config: Any, sampled: bool) -> None:
    """Takes out of a generation config what this command does otherwise, and prints a note where that is something.

    Args:
        sampled: tokens are sampled as the options say, so that other ways of sampling are taken out too.
    """
    replaced = as_one_text(config, SEARCHES + SAMPLES if sampled else SEARCHES)
    if replaced:
        how = "samples as its options say" if sampled else "takes the likeliest token each time"
        print(f"note: generation_config.json asks for {', '.join(replaced)}; this command {how}", file=sys.stderr)


def as_one_text(config: Any, names: Sequence[str] = SEARCHES) -> list[str]:
    """Makes a generation config one of a single text that comes token after token.

    Args:
        config: `names` and RETURNS are taken out of it.
        names: its fields that ask for something else.

    Returns:
        What of `names` was set, as name=value.
    """
    was_set = [f"{name}={value}" for name in names if (value := getattr(config, name, None)) not in (None, 1, False)]
    for name in (*names, *RETURNS):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return was_set


@torch.no_grad()
def stream_tokens(
    model: Any, tokenizer: Any, ids: torch.Tensor, streamer: TimedStreamer, **settings: Any
) -> torch.Tensor:
    """The tokens that follow `ids` [1, T], int64 [n], given to `streamer` one after the other.

    Args:
        settings: further arguments of `generate()`.
    """
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=streamer,
        tokenizer=tokenizer,  # for stop strings
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **settings,
    )
    return output[0, ids.shape[1] :]


def speed(times: Sequence[float], new: int) -> dict[str, float | None]:
    """Seconds to the first token, and tokens a second behind it; None where there is nothing to divide.

    Args:
        times: of `TimedStreamer`.
        new: tokens that were generated.
    """
    start, first, *_ = times
    decoding = times[-1] - first
    rate = (new - 1) / decoding if new > 1 and decoding > 0 else None
    return {"seconds_to_first_token": first - start, "tokens_per_second": rate}


def speed_line(result: dict[str, Any]) -> str:
    """A result's speed in one line."""
    rate = result["tokens_per_second"]
    decoding = f", then {rate:.1f} tokens/s" if rate else ""
    first = result["seconds_to_first_token"]
    return f"[{result['prompt_tokens']:,} prompt tokens read in {first:.2f} s{decoding}, {result['new_tokens']} new]"
