"""nsa_hf/heads.py: a sparse decoder under a family's other heads."""

from __future__ import annotations

import pytest
import torch
from tiny_families import EXACT, LENGTH, SIZES, tiny_dense, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from nsa_hf import NsaError
from nsa_hf.conversion import convert, export_dense
from nsa_hf.families import define_family
from nsa_hf.heads import HEADS
from nsa_hf.modeling import NsaModelMixin

# Rounding, as in tiny_families.py.
CLOSE = {"atol": 5e-5, "rtol": 0}
PAD = 0


def head_on_both(model_type: str, auto: str, folder):
    """The dense model with a head, and the sparse one with the same weights, by way of a converted language model."""
    dense_lm = tiny_dense(model_type)
    dense_lm.config.pad_token_id = PAD
    family = define_family(model_type)
    family.causal_lm_class.from_dense(dense_lm, **SIZES).save_pretrained(folder / "lm")
    labels = {} if auto == "AutoModelForQuestionAnswering" else {"num_labels": 3}
    sparse = HEADS[auto].from_pretrained(folder / "lm", **labels).eval()
    dense_config = dense_lm.config
    for name, value in labels.items():
        setattr(dense_config, name, value)
    dense = HEADS[auto].from_config(dense_config).eval()
    state = {name: value for name, value in sparse.state_dict().items() if ".nsa." not in name}
    dense.load_state_dict(state)
    return dense, sparse, dense_lm


@torch.no_grad()
@pytest.mark.parametrize("auto", HEADS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_equal_to_dense_in_the_exact_range_and_kept_by_saving(model_type, auto, tmp_path):
    dense, sparse, dense_lm = head_on_both(model_type, auto, tmp_path)
    assert type(sparse) is define_family(model_type).head_classes[auto]
    assert any(isinstance(module, NsaModelMixin) for module in sparse.modules())
    x = tokens(2, LENGTH).clamp(min=1)

    def outputs(model, inputs):
        out = model(inputs, attention_mask=torch.ones_like(inputs))
        return torch.stack([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits

    torch.testing.assert_close(outputs(sparse, x[:, :EXACT]), outputs(dense, x[:, :EXACT]), **CLOSE)
    assert (outputs(sparse, x) - outputs(dense, x)).abs().max() > 1e-4, "beyond the exact range it must be sparse"
    with sparse.dense_attention():
        torch.testing.assert_close(outputs(sparse, x), outputs(dense, x), **CLOSE)
    # the language model's weights were loaded, and not drawn anew
    if auto != "AutoModelForQuestionAnswering":
        assert torch.equal(sparse.model.embed_tokens.weight, dense_lm.model.embed_tokens.weight)
        assert torch.equal(sparse.model.layers[1].mlp.up_proj.weight, dense_lm.model.layers[1].mlp.up_proj.weight)
    sparse.save_pretrained(tmp_path / "head")
    again = HEADS[auto].from_pretrained(tmp_path / "head").eval()
    assert type(again) is type(sparse) and torch.equal(outputs(again, x), outputs(sparse, x))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_is_pooled_in_padded_rows(side, tmp_path):
    dense, sparse, _ = head_on_both("llama", "AutoModelForSequenceClassification", tmp_path)
    x = tokens(2, EXACT).clamp(min=1)
    padding, real = (slice(0, 7), slice(7, None)) if side == "left" else (slice(-7, None), slice(0, -7))
    mask = torch.ones_like(x)
    mask[1, padding] = 0
    padded = x.masked_fill(mask == 0, PAD)
    logits = sparse(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits, dense(padded, attention_mask=mask).logits, **CLOSE)
    torch.testing.assert_close(logits[1:], sparse(x[1:, real]).logits, **CLOSE)


@torch.no_grad()
def test_a_source_with_another_head_is_refused_and_not_converted_without_it(tmp_path):
    dense, sparse, _ = head_on_both("llama", "AutoModelForSequenceClassification", tmp_path)
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(NsaError, match=r"missing tensors \(lm_head.weight\) and 1 unknown tensors \(score.weight"):
        convert(tmp_path / "dense", tmp_path / "converted", **SIZES)
    sparse.save_pretrained(tmp_path / "sparse")
    with pytest.raises(NsaError, match=r"unknown tensors \(score.weight"):
        export_dense(tmp_path / "sparse", tmp_path / "exported")


def test_a_classifier_trains(tmp_path):
    _, sparse, _ = head_on_both("llama", "AutoModelForSequenceClassification", tmp_path)
    out = sparse.train()(tokens(2, LENGTH).clamp(min=1), labels=torch.tensor([0, 2]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))
    out.loss.backward()
    assert sparse.score.weight.grad.abs().sum() > 0
    assert sparse.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_head_that_the_family_lacks_is_refused(tmp_path):
    family = define_family("olmo2")
    without = next(auto for auto in HEADS if auto not in family.head_classes)
    model = family.causal_lm_class.from_dense(tiny_dense("olmo2"), **SIZES)
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is family.causal_lm_class
    with pytest.raises(ValueError, match=r"NsaOlmo2Config.*" + without):
        HEADS[without].from_pretrained(tmp_path)


def test_every_head_is_of_its_family():
    heads = define_family("qwen3").head_classes
    assert heads.keys() == HEADS.keys()
    assert heads["AutoModelForSequenceClassification"].__name__ == "NsaQwen3ForSequenceClassification"
    assert AutoModelForSequenceClassification._model_mapping[define_family("qwen3").config_class] in heads.values()
