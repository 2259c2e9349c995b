"""The cache of a layer with a state (Mamba, linear attention, convolutions): Transformers' own, that takes care."""

from __future__ import annotations

from transformers.cache_utils import Cache, LinearAttentionLayer

from ..errors import NsaError


class NsaStateLayer(LinearAttentionLayer):
    """A `LinearAttentionLayer` that knows how many tokens its state is of, and that such a state does not go back.

    Transformers' crops the convolution's inputs and leaves the recurrent state as it is after all tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    @classmethod
    def adopt(cls, layer: LinearAttentionLayer) -> NsaStateLayer:
        """Takes over what a plain layer holds."""
        adopted = cls()
        adopted.__dict__.update(layer.__dict__)
        return adopted

    def crop(self, tokens_to_remove: int) -> None:
        """As Transformers'.

        Raises:
            NsaError: tokens are to be removed from a recurrent state.
        """
        if tokens_to_remove and any(self.is_recurrent_states_initialized.values()):
            raise NsaError(
                f"crop({tokens_to_remove}): this model has layers with a recurrent state, which cannot go back, "
                "whatever was recorded. Copy the cache (copy.deepcopy) before the tokens that may be removed"
            )
        super().crop(tokens_to_remove)
        self.tokens -= abs(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.tokens = 0


def check_states(cache: Cache, tokens: int) -> None:
    """Before a forward: whether the states in this cache are of as many tokens as it holds.

    Raises:
        NsaError: they are not.
    """
    for layer in cache.layers:
        if isinstance(layer, NsaStateLayer) and layer.tokens != tokens:
            raise NsaError(
                f"this cache holds {tokens} tokens and a state after {layer.tokens}: a crop or a forward stopped "
                "halfway. Call cache.reset() and start anew"
            )


def note_states(cache: Cache, tokens: int) -> None:
    """After a forward: the layers with a state know that it is the one after so many tokens."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer:
            layer = cache.layers[index] = NsaStateLayer.adopt(layer)
        if isinstance(layer, NsaStateLayer):
            layer.tokens = tokens
