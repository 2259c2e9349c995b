"""Two models on the same texts, compared by position.

    reference_states = final_states(reference, windows)
    drop_decoder(reference)                              # where two whole models do not fit into memory
    states = final_states(model, windows)
    compare_models(reference, reference_states, model, states, windows, edges).as_dict()

Each model runs once over every text. Only its final hidden states [1, T, hidden] are kept, which are small beside
logits (4.7 MB for 2,048 tokens of SmolLM2). Logits are made from them for a few positions at a time, so that no
[T, vocabulary] tensor ever exists.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from nsa_hf.heads import auto_class

from .metrics import NO_LABEL, Accumulator, positions_at_once
from .tokens import Window, next_tokens

# Final hidden states [1, n, hidden] to logits [n, vocabulary].
Head = Callable[[Tensor], Tensor]


@torch.no_grad()
def final_states(
    model: PreTrainedModel,
    windows: Sequence[Window],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: str | None = None,
) -> list[Tensor]:
    """Runs a model over texts, in evaluation mode, and gives its decoder's output.

    Args:
        model: a causal language model; whether it was in training mode is restored.
        windows: the texts, ids int64 [1, T].
        autocast: makes the context that each forward pass runs in, such as Accelerate's mixed precision.
        progress: words before a bar on standard error; None shows no bar.

    Returns:
        [1, T, hidden] of each text, on the device of its ids.
    """
    console = Console(stderr=True)
    with evaluation_mode(model):
        states = []
        for _, ids in track(windows, progress or "", disable=progress is None, console=console):
            with autocast():
                output = model.base_model(input_ids=ids.to(model.device), use_cache=False)
            states.append(output.last_hidden_state.to(ids.device))
    return states


@torch.no_grad()
def compare_models(
    reference: PreTrainedModel,
    reference_states: Sequence[Tensor],
    model: PreTrainedModel,
    states: Sequence[Tensor],
    windows: Sequence[Window],
    edges: Sequence[int],
    *,
    is_text: bool = True,
    chunk: int | None = None,
) -> Accumulator:
    """Compares two models' logits on the same texts, on the device of the texts' ids.

    Args:
        reference: the model compared with; may be `model` itself, run otherwise.
        reference_states: what `final_states` gave of it, [1, T, hidden] of each text.
        model: the model that is compared.
        states: what `final_states` gave of it.
        windows: the texts, ids int64 [1, T].
        edges: borders of the ranges of positions, see `Accumulator`.
        is_text: False for random tokens, of which no next one can be predicted.
        chunk: positions whose logits exist at a time; None takes what suits the device and the vocabulary.

    Returns:
        The comparison, summed over the texts.
    """
    comparison = Accumulator(edges, chunk)
    vocabulary = model.config.get_text_config().vocab_size
    with head_of(reference) as reference_head, head_of(model) as head:
        for (_, ids), reference_hidden, hidden in zip(windows, reference_states, states, strict=True):
            labels = next_tokens(ids) if is_text else torch.full_like(ids[0], NO_LABEL)
            step = chunk or positions_at_once(ids.device, vocabulary)
            for start in range(0, len(labels), step):
                positions = slice(start, start + step)
                comparison.update(
                    reference_head(reference_hidden[:, positions]).to(ids.device),
                    head(hidden[:, positions]).to(ids.device),
                    labels[positions],
                    start,
                )
    return comparison


@contextmanager
def head_of(model: PreTrainedModel) -> Iterator[Head]:
    """A model's head as a function, which runs on the model's device and in its dtype.

    It is the model's own forward with the decoder taken out for as long as the context lasts: families scale or cap
    their logits in it. What a classifier of texts gives at a position is its logits of the text up to there; an
    answer's start and end have a logit each.
    """
    device, dtype = model.device, model.dtype
    decoder = model.base_model
    with evaluation_mode(model):
        setattr(model, model.base_model_prefix, NoDecoder())
        try:
            yield lambda states: logits_at(model, states.to(device, dtype))
        finally:
            setattr(model, model.base_model_prefix, decoder)


def logits_at(model: PreTrainedModel, states: Tensor) -> Tensor:
    """What the head of a model without a decoder gives at each position.

    Args:
        model: its decoder is a `NoDecoder`.
        states: final hidden states [1, n, hidden].

    Returns:
        [n, vocabulary], [n, labels], or of question answering [n, 2].
    """
    auto = auto_class(model.config)
    if auto is AutoModelForSequenceClassification:
        # one token at a time, whichever: without one Transformers warns of padding
        token = torch.zeros(1, 1, dtype=torch.long, device=states.device)
        return torch.cat([model(token, inputs_embeds=state).logits for state in states.split(1, dim=1)])
    output = model(inputs_embeds=states)
    if auto is AutoModelForQuestionAnswering:
        return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
    return output.logits[0]


def drop_decoder(model: PreTrainedModel) -> None:
    """Frees the memory of all of a model but its head."""
    setattr(model, model.base_model_prefix, NoDecoder())
    gc.collect()


class NoDecoder(nn.Module):
    """Stands in a decoder's place and hands the embeddings on unchanged, as if they were final hidden states."""

    def forward(self, *absent: None, inputs_embeds: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        """Called by the model as it calls its decoder.

        Args:
            absent: `input_ids`, which some families pass without its name and which is None here.
            inputs_embeds: the final hidden states, [1, n, hidden].
            kwargs: whatever else the decoder takes.
        """
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that the model was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
