"""What `generate()` does differently with a sparse model: masks of fixed shape, caches adopted early or refused."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .cache.adopt import OFFLOADED_ON_CPU, adopt_layer, adopt_window_layer, static_length
from .cache.static import OFFLOADED_STATIC
from .errors import NsaError
from .releases import CACHE, cache_among
from .segments import refuse_right_padding, row_runs, static_mask

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

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        kind = generation_config.cache_implementation
        if kind in REFUSED:
            raise NsaError(f"cache_implementation={kind!r} cannot be used: {REFUSED[kind]}")
        if kind == "offloaded" and self.device.type == "cpu":
            raise NsaError(f"cache_implementation={kind!r} cannot be used: {OFFLOADED_ON_CPU}")
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # once, on the host: a compiled step cannot look at it
            refuse_right_padding(mask)
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
        starts, _ = row_runs(mask)
        left = (torch.arange(mask.shape[1], device=mask.device) >= starts[:, None]).to(mask.dtype)
        if not generation_config.is_assistant and not torch.equal(mask, left):
            pad = int(generation_config._pad_token_tensor)
            raise NsaError(
                f"no attention_mask was given, and pad_token_id {pad} stands behind other tokens, which Transformers "
                "takes for padding: give attention_mask=torch.ones_like(input_ids) "
                "where it is text, and pad prompts on the left (tokenizer.padding_side='left')"
            )
        return left

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
