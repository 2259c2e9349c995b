"""nsa_hf/heads.py: a sparse decoder under a family's other heads."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from tiny_families import EXACT, LENGTH, SIZES, randomized, tiny_config, tiny_dense, tokens
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import nsa_hf
from nsa_hf import NsaError
from nsa_hf.conversion import convert, export_dense, merge, plan, verify
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.pieces import same_bits
from nsa_hf.conversion.measure import Measuring
from nsa_hf.conversion.verify import render_verify
from nsa_hf.families import define_family
from nsa_hf.heads import HEADS, auto_class
from nsa_hf.modeling import NsaModelMixin
from nsa_hf.recipes.load import load_nsa_model
from nsa_hf.recipes.serve import serve_model
from nsa_hf.recipes.training.config import RunConfig
from nsa_hf.recipes.training.loop import check_model

# Rounding, as in tiny_families.py.
CLOSE = {"atol": 5e-5, "rtol": 0}
PAD = 0
LABELS = 3
CASES = [("llama", auto) for auto in HEADS] + [("qwen3_moe", "AutoModelForTokenClassification")]


def outputs(model, inputs):
    out = model(inputs, attention_mask=torch.ones_like(inputs))
    return torch.stack([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def head(request, tmp_path_factory):
    """A folder with a dense model that has a head, `dense`, and the converted one, `nsa`; and both models."""
    model_type, auto = request.param
    folder = tmp_path_factory.mktemp("head")
    dense = randomized(HEADS[auto].from_config(tiny_config(model_type, num_labels=LABELS)))
    dense.save_pretrained(folder / "dense")
    convert(folder / "dense", folder / "nsa", **SIZES)
    return auto, folder, dense, HEADS[auto].from_pretrained(folder / "nsa").eval()


@torch.no_grad()
def test_a_converted_head_equals_the_dense_one_in_the_exact_range(head):
    auto, _, dense, sparse = head
    assert type(sparse) is define_family(dense.config.model_type).head_classes[auto]
    assert sum(isinstance(module, NsaModelMixin) for module in sparse.modules()) == 1
    assert sparse.config.architectures == [type(sparse).__name__] and auto_class(sparse.config) is HEADS[auto]
    assert (sparse.config.num_labels, sparse.config.id2label) == (LABELS, dense.config.id2label)
    x = tokens(2, LENGTH)
    torch.testing.assert_close(outputs(sparse, x[:, :EXACT]), outputs(dense, x[:, :EXACT]), **CLOSE)
    assert (outputs(sparse, x) - outputs(dense, x)).abs().max() > 1e-3, "beyond the exact range it must be sparse"
    with sparse.dense_attention():
        torch.testing.assert_close(outputs(sparse, x), outputs(dense, x), **CLOSE)


def test_it_is_verified_and_goes_back_bit_for_bit(head, tmp_path):
    _, folder, _, _ = head
    folder = shutil.copytree(folder, tmp_path / "copy")
    result = verify(folder / "dense", folder / "nsa", length=LENGTH)
    assert result["exact"] and result["tensors"]["kept"] == result["tensors"]["of"]
    first, beyond = result["by_position"]
    assert (first["to"], first["ppl"], beyond["ppl"]) == (EXACT, None, None), "a head of labels predicts no token"
    assert first["max_abs_diff"] < CLOSE["atol"] and beyond["max_abs_diff"] > 1e-3
    render_verify(result)
    report = export_dense(folder / "nsa", folder / "back")
    before, after = SafetensorsCheckpoint(folder / "dense"), SafetensorsCheckpoint(folder / "back")
    assert before.table.keys() == after.table.keys()
    assert report["as_in_source"] == report["tensors"] == result["tensors"]["of"] == len(before.table)
    assert all(same_bits(before.read(name), after.read(name)) for name in before.table)
    configs = [AutoConfig.from_pretrained(folder / name).to_dict() for name in ("dense", "back")]
    assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}


def test_a_head_that_is_not_the_sources_is_not_exact(head, tmp_path):
    auto, folder, _, _ = head
    folder = shutil.copytree(folder, tmp_path / "copy")
    other = HEADS[auto].from_pretrained(folder / "nsa")
    for name, parameter in other.named_parameters():
        if name.startswith(("score.", "qa_outputs.")):
            parameter.data.mul_(1.1)
    other.save_pretrained(folder / "nsa")
    result = verify(folder / "dense", folder / "nsa", length=LENGTH)
    assert not result["exact"] and "a logit within the exact range differs by" in result["why"]


def test_in_memory_it_is_as_on_disk(head, tmp_path):
    auto, folder, dense, written = head
    for source in (dense, folder / "dense"):
        model = type(written).from_dense(source, **SIZES)
        assert model.config.architectures == [type(written).__name__]
        assert model.state_dict().keys() == written.state_dict().keys()
        assert all(torch.equal(value, written.state_dict()[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = HEADS[auto].from_pretrained(tmp_path).eval()
    for again in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert type(again) is type(written)
        with torch.no_grad():
            assert torch.equal(outputs(again, tokens()), outputs(written, tokens()))


@torch.no_grad()
def test_an_adapter_is_merged_into_it(head, tmp_path):
    peft = pytest.importorskip("peft")
    auto, folder, _, _ = head
    task = {"Sequence": "SEQ_CLS", "Token": "TOKEN_CLS", "Question": "QUESTION_ANS"}
    model = HEADS[auto].from_pretrained(folder / "nsa").eval()
    config = peft.LoraConfig(task_type=next(task[name] for name in task if name in auto), r=4)
    adapted = peft.get_peft_model(model, config).eval()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for parameter in trained:
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    merge(folder / "nsa", tmp_path / "adapter", tmp_path / "merged")
    merged = HEADS[auto].from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(merged, tokens()), outputs(adapted, tokens()), **CLOSE)


def test_what_needs_a_language_model_names_the_head(head):
    auto, folder, _, sparse = head
    run = RunConfig(model=str(folder / "nsa"), out=str(folder / "out"))
    for command in (
        lambda: load_nsa_model(folder / "nsa"),
        lambda: serve_model(folder / "nsa", []),
        lambda: check_model(run),
        lambda: plan(folder / "dense", measure=Measuring([]), **SIZES),
    ):
        with pytest.raises(NsaError, match=rf"no language model.*{type(sparse).__name__}; load it with {auto}"):
            command()
    assert plan(folder / "dense", **SIZES)["parameters"]["added"] > 0


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A folder with a dense Llama, `dense`, and the converted one, `nsa`."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_dense("llama").save_pretrained(folder / "dense")
    convert(folder / "dense", folder / "nsa", **SIZES)
    return folder


@pytest.mark.parametrize("auto", HEADS)
def test_a_new_head_on_a_language_model_keeps_its_decoder(auto, language_model, tmp_path):
    """Question answering too, whose decoder Llama calls otherwise."""
    decoder = AutoModelForCausalLM.from_pretrained(language_model / "nsa").model.state_dict()
    head_class = define_family("llama").head_classes[auto]
    loaded = HEADS[auto].from_pretrained(language_model / "nsa", num_labels=LABELS)
    more = {"key_mapping": {"^other": "names"}}  # beside those by which the decoder is found
    made = head_class.from_dense(language_model / "dense", num_labels=LABELS, **more, **SIZES)
    for model in (loaded, made):
        assert type(model) is head_class
        state = model.base_model.state_dict()
        assert state.keys() == decoder.keys() and all(torch.equal(state[name], decoder[name]) for name in decoder)
    loaded.save_pretrained(tmp_path)
    names = SafetensorsCheckpoint(tmp_path).table
    assert {name.split(".")[0] for name in names} <= {loaded.base_model_prefix, "score", "qa_outputs"}, "as the family"
    back = AutoModelForCausalLM.from_pretrained(tmp_path).model.state_dict()
    assert all(torch.equal(back[name], decoder[name]) for name in decoder)


def test_from_dense_names_the_class_of_the_head(language_model, tmp_path):
    dense = AutoModelForSequenceClassification.from_pretrained(language_model / "dense")
    dense.save_pretrained(tmp_path)
    for source in (dense, tmp_path):
        for wrong in (nsa_hf.NsaLlamaForCausalLM, nsa_hf.NsaLlamaForTokenClassification):
            with pytest.raises(
                NsaError, match=r"LlamaForSequenceClassification: use NsaLlamaForSequenceClassification.from_dense"
            ):
                wrong.from_dense(source)
        assert type(nsa_hf.from_dense(source, **SIZES)) is nsa_hf.NsaLlamaForSequenceClassification
    mine = type("Mine", (type(dense),), {})(dense.config)
    assert type(nsa_hf.from_dense(mine, **SIZES)) is nsa_hf.NsaLlamaForSequenceClassification
    with pytest.raises(NsaError, match=r"LlamaForCausalLM: use NsaLlamaForCausalLM.from_dense"):
        nsa_hf.NsaLlamaForSequenceClassification.from_dense(tiny_dense("llama"))
    with pytest.raises(NsaError, match=r"was given a LlamaModel: expected a LlamaForCausalLM"):
        nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense("llama").model)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_is_pooled_in_padded_rows(side):
    dense = randomized(AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=LABELS)))
    sparse = nsa_hf.NsaLlamaForSequenceClassification.from_dense(dense, **SIZES)
    x = tokens(2, EXACT)
    padding, real = (slice(0, 7), slice(7, None)) if side == "left" else (slice(-7, None), slice(0, -7))
    mask = torch.ones_like(x)
    mask[1, padding] = 0
    padded = x.masked_fill(mask == 0, PAD)
    logits = sparse(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits, dense(padded, attention_mask=mask).logits, **CLOSE)
    torch.testing.assert_close(logits[1:], sparse(x[1:, real]).logits, **CLOSE)
    # and in longer rows, which are sparse
    longer = tokens(2, LENGTH).masked_fill(torch.nn.functional.pad(mask, (LENGTH - EXACT, 0), value=1) == 0, PAD)
    if side == "right":
        mask = (longer != PAD).long()
        alone = sparse(longer[1:, :-7]).logits
        torch.testing.assert_close(sparse(longer, attention_mask=mask).logits[1:], alone, **CLOSE)


def test_losses_are_those_computed_by_hand():
    x = tokens(2, LENGTH)
    family = define_family("llama")
    models = {
        auto: head_class(family.config_class.from_dense_config(tiny_config("llama", num_labels=LABELS), **SIZES)).eval()
        for auto, head_class in family.head_classes.items()
    }
    labels = torch.tensor([0, 2])
    model = models["AutoModelForSequenceClassification"]
    out = model(x, labels=labels)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits, labels))
    out.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0 and model.model.layers[0].self_attn.q_proj.weight.grad.norm() > 0
    labels = x % LABELS
    labels[0, :5] = -100
    out = models["AutoModelForTokenClassification"](x, labels=labels)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    start, end = torch.tensor([1, 50]), torch.tensor([4, 55])
    out = models["AutoModelForQuestionAnswering"](x, start_positions=start, end_positions=end)
    by_hand = (cross_entropy(out.start_logits, start) + cross_entropy(out.end_logits, end)) / 2
    torch.testing.assert_close(out.loss, by_hand)


def test_a_step_of_trainer(tmp_path):
    config = tiny_config("llama", num_labels=LABELS)
    dense = randomized(AutoModelForSequenceClassification.from_config(config))
    model = nsa_hf.NsaLlamaForSequenceClassification.from_dense(dense, **SIZES)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(tokens(2, LENGTH), (0, 2), strict=True)]
    before = model.score.weight.clone()
    with torch.no_grad():
        loss = model(tokens(2, LENGTH), labels=torch.tensor([0, 2])).loss
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], logging_steps=1
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert not torch.equal(before, model.score.weight)
    trainer.save_model(tmp_path / "saved")
    assert auto_class(AutoConfig.from_pretrained(tmp_path / "saved")) is AutoModelForSequenceClassification
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)
    export_dense(tmp_path / "saved", tmp_path / "back")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
    assert torch.equal(back.score.weight, model.score.weight)


def test_a_head_that_the_family_lacks_is_refused(tmp_path):
    family = define_family("olmo2")
    without = next(auto for auto in HEADS if auto not in family.head_classes)
    family.causal_lm_class.from_dense(tiny_dense("olmo2"), **SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NsaOlmo2Config.*" + without):
        HEADS[without].from_pretrained(tmp_path)


def test_every_head_is_of_its_family():
    heads = define_family("qwen3").head_classes
    assert heads.keys() == HEADS.keys()
    assert heads["AutoModelForSequenceClassification"].__name__ == "NsaQwen3ForSequenceClassification"
    for auto in (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    ):
        assert auto._model_mapping[define_family("qwen3").config_class] is heads[auto.__name__]
