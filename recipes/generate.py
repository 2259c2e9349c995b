"""Text from a converted model, printed as it comes: `nsa-hf generate OUT --prompt "..."`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from nsa_hf.conversion.staging import write_json
from nsa_hf.errors import NsaError

from .load import load_nsa_model, load_tokenizer
from .run_folder import machine


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
) -> dict[str, Any]:
    """Generates with the cache from `prompt` and prints it; the result, also written to `save`.

    `chat` puts the prompt into the tokenizer's chat template as a user's turn. `prompt_tokens` takes that many tokens
    of the prompt only. Temperature 0 is greedy; `top_p` 1 and `top_k` 0 leave no token out. NsaError when the settings
    or the folder are wrong.
    """
    check_settings(max_new_tokens, temperature, top_p, top_k, prompt_tokens, dtype)
    tokenizer = load_tokenizer(out)
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
    torch.manual_seed(seed)
    streamer = TimedStreamer(tokenizer)
    ids = ids.to(device)
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
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
    if not chat:
        return tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
    if not tokenizer.chat_template:
        raise NsaError("the tokenizer has no chat template: leave --chat out")
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def check_settings(
    new: int, temperature: float, top_p: float, top_k: int, prompt_tokens: int | None, dtype: str
) -> None:
    if new < 1 or (prompt_tokens is not None and prompt_tokens < 1):
        raise NsaError(f"--max-new-tokens and --prompt-tokens must be at least 1, got {new} and {prompt_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise NsaError(f"temperature must be at least 0 and top_p in (0, 1], got {temperature} and {top_p}")
    if top_k < 0:
        raise NsaError(f"top_k must be at least 0 (all tokens), got {top_k}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise NsaError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")


def speed_line(result: dict[str, Any]) -> str:
    rate = result["tokens_per_second"]
    decoding = f", then {rate:.1f} tokens/s" if rate else ""
    first = result["seconds_to_first_token"]
    return f"[{result['prompt_tokens']:,} prompt tokens read in {first:.2f} s{decoding}, {result['new_tokens']} new]"
