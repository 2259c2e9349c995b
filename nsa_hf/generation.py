"""What `generate()` does differently with a sparse model: padding moved left, caches adopted early or refused."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .cache.adopt import OFFLOADED_ON_CPU, adopt_layer, adopt_window_layer, static_length
from .cache.static import OFFLOADED_STATIC
from .errors import NsaError
from .releases import CACHE, cache_among
from .segments import is_left_padded, padding_first, refuse_unfinished, static_mask

REFUSED = {
    "quantized": (
        "sparse attention reads single blocks of the keys and values, which a quantized cache does not hold as they "
        "are: use the default dynamic cache, or cache_implementation='offloaded' to save GPU memory"
    ),
    "offloaded_static": OFFLOADED_STATIC,
}
PAGED = (
    "sparse attention does not support continuous batching and its paged cache (generate_batch, "
    "cache_implementation='paged', transformers serve --continuous-batching): use generate() with left-padded rows and "
    "the dynamic or the static cache"
)
FILLED = (
    "assisted and prompt-lookup decoding cannot go on with a cache that holds {} tokens already: Transformers would "
    "read the whole text again behind them. Give no cache, or generate without assistant_model, "
    "prompt_lookup_num_tokens and assistant_early_exit"
)


class NsaGenerationMixin:
    """In front of a model's class: overrides of Transformers' `GenerationMixin`."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'. Rows that are not padded on the left are generated as if they were.

        So each row goes on from its last real token, as it would alone. The sequences that come back begin with the
        prompt as it was given; what else `return_dict_in_generate` gives of the prompt has its padding on the left.
        """
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if not isinstance(mask, Tensor) or mask.dim() != 2 or is_left_padded(mask):
            return super().generate(inputs, *args, **kwargs)
        order = padding_first(mask)
        for prompt in (ids, embeds):
            if isinstance(prompt, Tensor) and prompt.shape[1] and prompt.shape[:2] != mask.shape:
                raise NsaError(
                    f"attention_mask must have the prompt's shape {list(prompt.shape[:2])}, got {list(mask.shape)}"
                )
        # a negative prompt has padding of its own
        moved = {n: value if n.startswith("negative_") else reordered(value, order) for n, value in kwargs.items()}
        out = super().generate(reordered(inputs, order), *args, **moved)
        sequences = out if isinstance(out, Tensor) else out.sequences
        if isinstance(ids, Tensor) and ids.shape[1]:
            rows = torch.arange(len(ids), device=ids.device).repeat_interleave(len(sequences) // len(ids))
            sequences[:, : ids.shape[1]] = ids[rows].to(sequences.device)
        return out

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        kind = generation_config.cache_implementation
        if kind in REFUSED:
            raise NsaError(f"cache_implementation={kind!r} cannot be used: {REFUSED[kind]}")
        if kind == "offloaded" and self.device.type == "cpu":
            raise NsaError(f"cache_implementation={kind!r} cannot be used: {OFFLOADED_ON_CPU}")
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # once, on the host: a compiled step cannot look at it
            refuse_unfinished(mask)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            # before anything is compiled: a chunked prefill is
            for attention in self.attention_layers():
                adopt_window_layer(cache, attention.layer_idx)
                if (extras := attention.extras()) is not None:
                    adopt_layer(cache, attention.layer_idx, extras, self.device)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """The mask where none was given: as Transformers infers it from padding tokens, but only those on the left.

        Padding tokens elsewhere are refused. An assistant takes them for text: it is given no mask even where the text
        itself holds such tokens, and what it proposes is verified anyway.

        Raises:
            NsaError: `pad_token_id` stands behind other tokens.
        """
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        if is_left_padded(mask):
            return mask
        if generation_config.is_assistant:
            starts = (mask == 0).long().cumprod(-1).sum(-1, keepdim=True)
            return (torch.arange(mask.shape[1], device=mask.device) >= starts).to(mask.dtype)
        pad = int(generation_config._pad_token_tensor)
        raise NsaError(
            f"no attention_mask was given, and pad_token_id {pad} stands behind other tokens, which Transformers "
            "takes for padding: give the tokenizer's attention_mask, or torch.ones_like(input_ids) where it is text"
        )

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """The 2D mask (Transformers would make one of T*S numbers), with a static cache padded to its size."""
        static = static_length(cache_among([*args, *kwargs.values()]))
        return attention_mask if static is None else static_mask(attention_mask, static[1])

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        cache = cache_among(kwargs.values())
        if cache is not None and cache.get_seq_length():
            raise NsaError(FILLED.format(int(cache.get_seq_length())))
        return super()._assisted_decoding(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NsaError(PAGED)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NsaError(PAGED)


def reordered(value: Any, order: Tensor) -> Any:
    """A prompt's tensor `[B, P, ...]` with its positions in another order `[B, P]`; anything else as it is."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[:2] != order.shape:
        return value
    return value[torch.arange(len(order), device=value.device)[:, None], order.to(value.device)]
