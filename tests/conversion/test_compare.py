"""conversion/compare/models.py: texts to windows, and logits from what is left of a model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_dense_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.conversion.compare.metrics import NO_LABEL, Accumulator, compare_by_position
from nsa_hf.conversion.compare.models import compare_logits, final_hidden, next_tokens, token_windows
from nsa_hf.errors import NsaError


def test_windows_are_the_texts_first_tokens_and_short_texts_are_passed_over(tiny_dense_dir):
    windows = token_windows(
        tiny_dense_dir, [("short", "ab"), ("a", "abc" * 9), ("b", "x" * 30), ("c", "y" * 30)], 20, 2, 256
    )
    assert [name for name, _ in windows] == ["a", "b"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense_dir)
    assert [tokenizer.decode(ids[0]) for _, ids in windows] == [("abc" * 9)[:20], "x" * 20]
    with pytest.raises(NsaError, match=r"expected 2 texts of at least 31 tokens, found 0 among 2 .* has 30"):
        token_windows(tiny_dense_dir, [("a", "x" * 30), ("b", "x" * 29)], 31, 2, 256)


def test_a_folder_without_a_tokenizer_gets_the_same_random_tokens_every_time(tmp_path):
    first, second = (token_windows(tmp_path, [], 30, 2, 17) for _ in range(2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert [tuple(ids.shape) for _, ids in first] == [(1, 30), (1, 30)]
    assert not torch.equal(first[0][1], first[1][1])
    assert min(ids.min() for _, ids in first) >= 0
    assert max(ids.max() for _, ids in first) < 17


def test_next_tokens():
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [6, 7, NO_LABEL]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_from_hidden_states_and_heads_are_those_of_whole_models(tied):
    """Also with one model that is no Llama of ours: the head is Transformers' own code, whatever it does to logits."""
    models = [tiny_dense_model(tie_word_embeddings=tied, initializer_range=scale).eval() for scale in (0.1, 0.2)]
    windows = [
        (str(seed), torch.randint(256, (1, 70), generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)
    ]
    expected = Accumulator([0, 10, 70])
    for _, ids in windows:
        whole = [model(ids).logits[0] for model in models]
        expected.merge(compare_by_position(*whole, next_tokens(ids), [0, 10, 70]))

    hidden = [final_hidden(model, windows, "model", False) for model in models]
    assert all(sum(p.numel() for p in model.parameters()) == 256 * 48 for model in models), "more than the head is left"
    comparison = Accumulator([0, 10, 70], chunk=32)
    for (_, ids), first, second in zip(windows, *hidden, strict=True):
        compare_logits(comparison, next_tokens(ids), models[0], first, models[1], second)
    for row, other in zip(comparison.as_dict(), expected.as_dict(), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


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
        hidden = final_hidden(model, [("", ids)], "model", False)[0]
        assert torch.allclose(model(inputs_embeds=hidden[:, 5:9]).logits, whole[:, 5:9], atol=1e-6)
