"""conversion/compare/models.py: hidden states and heads give what whole models give."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_dense_model
from transformers import AutoModelForCausalLM

from nsa_hf.conversion.compare.metrics import Accumulator, compare_by_position
from nsa_hf.conversion.compare.models import compare_models, drop_decoder, final_states, head_of
from nsa_hf.conversion.compare.tokens import next_tokens


def random_windows(count: int = 2, length: int = 70) -> list[tuple[str, torch.Tensor]]:
    return [
        (str(seed), torch.randint(256, (1, length), generator=torch.Generator().manual_seed(seed)))
        for seed in range(count)
    ]


@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_from_hidden_states_and_heads_are_those_of_whole_models(tied, dropped):
    models = [tiny_dense_model(tie_word_embeddings=tied, initializer_range=scale).eval() for scale in (0.1, 0.2)]
    windows, edges = random_windows(), [0, 10, 70]
    expected = Accumulator(edges)
    for _, ids in windows:
        whole = [model(ids).logits[0] for model in models]
        expected.merge(compare_by_position(*whole, next_tokens(ids), edges))

    states = [final_states(model, windows) for model in models]
    if dropped:
        for model in models:
            drop_decoder(model)
            assert sum(parameter.numel() for parameter in model.parameters()) == 256 * 48, "more than the head is left"
    comparison = compare_models(models[0], states[0], models[1], states[1], windows, edges, chunk=32)
    for row, other in zip(comparison.as_dict(), expected.as_dict(), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_a_model_is_afterwards_as_it_was_before(monkeypatch):
    """Also one that is compared with itself, and one whose comparison is interrupted."""
    model, windows = tiny_dense_model().train(), random_windows(1)
    before = model(windows[0][1]).logits
    names = [name for name, _ in model.named_modules()]
    states = final_states(model, windows)
    assert model.training and not states[0].requires_grad
    compare_models(model, states, model, states, windows, [0, 70])
    assert model.training and [name for name, _ in model.named_modules()] == names

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare_models(model, states, model, states, windows, [0, 70])
    assert model.training
    assert torch.equal(model(windows[0][1]).logits, before)


def test_random_tokens_have_no_next_one_to_predict():
    model, windows = tiny_dense_model(), random_windows(1)
    states = final_states(model, windows)
    (row,) = compare_models(model, states, model, states, windows, [0, 70], is_text=False).as_dict()
    assert (row["tokens"], row["ppl"], row["kl"]) == (70, None, 0.0)


def test_a_family_that_scales_its_logits_keeps_its_scale():
    """Granite divides its logits; the head that is left must do so too."""
    from transformers import GraniteConfig

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=7.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        whole = model(ids).logits
        (hidden,) = final_states(model, [("", ids)])
        with head_of(model) as head:
            assert torch.allclose(head(hidden[:, 5:9]), whole[0, 5:9], atol=1e-6)
