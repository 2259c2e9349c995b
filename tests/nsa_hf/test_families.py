"""Every causal language model that Transformers has: converted and exact, or refused with the feature named.

`PYTHONPATH=tests/helpers python tests/nsa_hf/test_families.py` writes what was found to recipes/results: families.csv,
and families.md to read.
"""

from __future__ import annotations

import copy
import csv
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_families import (
    EXACT,
    LENGTH,
    ROUNDING,
    SIZES,
    TABLE,
    check_converted_and_exported,
    refusal,
    sparse_of,
    tiny_dense,
    tokens,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import nsa_hf
from nsa_hf.discovery import causal_model_types, find_family
from nsa_hf.families import family_of, nsa_config_from_dense
from nsa_hf.modeling import NOT_QUANTISED
from nsa_hf.releases import CACHE

FEATURES = {
    "no attention": r"no attention at all",
    "attention of its own": r"does not go through Transformers' attention interface",
    "nested decoder": r"in a decoder inside its decoder",
    "several models in one (multimodal)": r"several models in one",
    "cross-attention": r"cross-attention",
    "ALiBi": r"ALiBi",
    "MLA": r"MLA",
    "sinks": r"sinks",
    "softcap": r"softcap",
    "sliding_window on every layer": r"^sliding_window: ",
    "shared keys and values": r"share",
    "differential attention": r"differential",
    "mask of its own": r"mask of its own",
    "position bias": r"position_bias",
    "chunked attention": r"kind chunked_attention",
    "attention and state in one layer": r"\(hybrid[,)]|kind hybrid",
}


def found(model_type: str) -> dict[str, str]:
    """A family's row of the table."""
    why = refusal(model_type) or ""
    feature = next((name for name, pattern in FEATURES.items() if re.search(pattern, why)), "")
    return {"model_type": model_type, "result": "refused" if why else "exact", "feature": feature, "why": why}


COMMON = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "glm4",
}


def rows_of_the_table() -> dict[str, dict[str, str]]:
    """recipes/results/families.csv, from which the README's table is made."""
    with TABLE.open() as file:
        return {row["model_type"]: row for row in csv.DictReader(file)}


def is_of_this_release(row: dict[str, str]) -> bool:
    """Whether a row of the table was found with the Transformers that is installed."""
    return row["transformers"].split(".")[:2] == transformers.__version__.split(".")[:2]


@pytest.mark.parametrize("model_type", causal_model_types())
def test_a_family_is_exact_or_refused_by_feature(model_type, tmp_path):
    row = found(model_type)
    assert model_type not in COMMON or row["result"] == "exact", row["why"]
    in_table = rows_of_the_table().get(model_type)
    if in_table is not None and is_of_this_release(in_table):
        assert row == {name: in_table[name] for name in row}, "the table says otherwise"
    if row["result"] == "refused":
        assert row["feature"], f"no feature is named: {row['why']}"
    else:
        check_exact(model_type, tmp_path)


def check_exact(model_type: str, folder: Path) -> None:
    dense, x = tiny_dense(model_type), tokens()
    model = sparse_of(dense)
    with torch.no_grad():
        expected = dense(x).logits
        difference = (model(x).logits - expected).abs().amax((0, 2))
        assert difference[:EXACT].max() < ROUNDING
        assert difference[EXACT + 2 :].max() > 1e-3, "nothing is sparse"
        with model.dense_attention():
            assert (model(x).logits - expected).abs().max() < ROUNDING
        assert (sparse_of(dense, nsa_topk=8)(x).logits - expected).abs().max() < ROUNDING
    check_answers(dense.config)
    check_padding_and_greedy_text(dense, model)
    check_attentions(dense, model)
    check_gradients(model)
    random = sparse_of(dense, random=True)
    if find_family(model_type).is_recurrent:
        # Mamba layers in pieces are not what they are in one pass, in dense models too
        pieces = in_pieces(dense, [53, *[1] * 7])
        assert (in_pieces(sparse_of(dense, nsa_topk=8), [53, *[1] * 7]) - pieces).abs().max() < ROUNDING
    else:
        with torch.no_grad():
            whole = random(x, use_cache=False).logits
        assert (in_pieces(random, [33, 1, 1, 20, 5]) - whole).abs().max() < ROUNDING
    check_saved_and_loaded(random, folder / "saved")
    check_converted_and_exported(dense, folder)


# What Transformers knows of a model by its class or its class's name.
ANSWERS = (
    "loss_type",
    "all_tied_weights_keys",
    "supports_gradient_checkpointing",
    "_can_compile_fullgraph",
    "_is_stateful",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
    "_skip_keys_device_placement",
    "_ep_plan",
    "_fsdp_plan",
    "main_input_name",
    "base_model_prefix",
    "input_modalities",
)
ASKED = (
    "_can_set_experts_implementation",
    "_can_set_attn_implementation",
    "_supports_default_dynamic_cache",
    "can_generate",
    "is_custom_code",
    "is_remote_code",
)


def check_answers(config: PreTrainedConfig) -> None:
    """Nothing that Transformers tells by a class, its source or its name is lost in the sparse one."""
    config.initializer_range, config._experts_implementation = 0.3, None
    sparse_config = nsa_config_from_dense(config, **SIZES)
    classes = [family_of(sparse_config).causal_lm_class, type(AutoModelForCausalLM.from_config(config))]
    for base in classes[1].__mro__:
        # as in a process that has not asked a dense class
        for name in [name for name in vars(base) if name.endswith("_cached_value")]:
            delattr(base, name)
    told = [{name: getattr(one, name)() for name in ASKED} for one in classes]
    assert told[0] == told[1]
    torch.manual_seed(0)
    sparse, dense = (one(its) for one, its in zip(classes, (sparse_config, copy.deepcopy(config)), strict=True))
    answers = [{name: getattr(model, name, None) for name in ANSWERS} for model in (sparse, dense)]
    assert answers[0] == answers[1] | {"_keep_in_fp32_modules": {*dense._keep_in_fp32_modules, NOT_QUANTISED}}
    assert sparse.config._experts_implementation == dense.config._experts_implementation
    # every part is the family's, or one made of it: isinstance and what stands on a class say the same of both
    parts = [(name, type(part)) for name, part in sparse.named_modules() if ".nsa" not in name]
    for (name, part), (dense_name, dense_part) in zip(
        parts, ((n, type(p)) for n, p in dense.named_modules()), strict=True
    ):
        assert name == dense_name and issubclass(part, dense_part)
        for names, says in ((sparse._no_split_modules, part), (dense._no_split_modules, dense_part)):
            assert (says.__name__ in names) == (dense_part.__name__ in dense._no_split_modules)
    drawn = dict(sparse.named_parameters())
    for name, expected in dense.named_parameters():
        if expected.numel() > 64:
            spread = [float(values.detach().std()) for values in (drawn[name], expected)]
            assert abs(spread[0] - spread[1]) <= 0.3 * spread[1], f"{name} is drawn otherwise"


def check_padding_and_greedy_text(dense: PreTrainedModel, model: PreTrainedModel) -> None:
    x, mask = tokens(length=EXACT), torch.ones(2, EXACT, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        # the sparse model counts a row's positions from its first real token by itself
        expected = dense(x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        difference = (model(x, attention_mask=mask).logits - expected).abs()
    assert difference[0].max() < ROUNDING and difference[1, 7:].max() < ROUNDING
    prompt = {"input_ids": x[:, :12], "attention_mask": mask[:, :12]}
    texts = [one.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False) for one in (dense, model)]
    assert texts[0].shape == (2, 20) and torch.equal(*texts)


def check_attentions(dense: PreTrainedModel, model: PreTrainedModel) -> None:
    """One entry for each layer with attention, sliding ones too; dense they are the family's eager function's."""
    x, chosen = tokens(), dense.config._attn_implementation
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        expected = dense(x, output_attentions=True, use_cache=False).attentions
        with model.dense_attention():
            got = model(x, output_attentions=True, use_cache=False).attentions
        sparse = model(x, output_attentions=True, use_cache=False).attentions
    dense.set_attn_implementation(chosen)
    assert len(expected) >= len(list(model.attention_layers()))
    for ours, theirs, selected in zip(got, expected, sparse, strict=True):
        torch.testing.assert_close(ours, theirs, atol=ROUNDING, rtol=0)
        assert selected.shape == theirs.shape
        if selected.shape[-1] == LENGTH:  # minimax's linear attention has entries of its own kind
            torch.testing.assert_close(selected.sum(-1), torch.ones(selected.shape[:-1]))


def check_gradients(model: PreTrainedModel) -> None:
    x = tokens(1, 40)
    model.train()(x, labels=x, use_cache=False).loss.backward()
    model.eval()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        if name.endswith(("nsa.gate.down.bias", "q_proj.weight")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def in_pieces(model: PreTrainedModel, lengths: list[int]) -> Tensor:
    """The logits of text that comes in pieces, through a cache that Transformers makes; longer than every window."""
    cache, pieces = None, []
    with torch.no_grad():
        for piece in tokens().split(lengths, dim=1):
            out = model(piece, **{CACHE: cache}, use_cache=True)
            cache, pieces = out[CACHE], [*pieces, out.logits]
    return torch.cat(pieces, 1)


def check_saved_and_loaded(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model) is getattr(nsa_hf, type(model).__name__)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)


EXPERTS = """
import sys, torch
import nsa_hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert model.config._experts_implementation == "grouped_mm", model.config._experts_implementation
x = torch.arange(3, 83)[None]
with torch.no_grad():
    grouped = model(x, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, use_cache=False).logits, grouped)
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        torch.testing.assert_close(model(x, use_cache=False).logits, grouped)
"""


def test_experts_are_the_dense_classs_in_a_process_that_never_built_it(tmp_path):
    sparse_of(tiny_dense("qwen3_moe", num_hidden_layers=1), random=True).save_pretrained(tmp_path)
    command = [sys.executable, "-c", EXPERTS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_trainer_smooths_labels_as_for_a_dense_model(tmp_path):
    dense = tiny_dense("llama")
    smoothing = TrainingArguments(tmp_path, label_smoothing_factor=0.3, report_to=[], use_cpu=True)
    losses = []
    for model in (dense, sparse_of(dense, nsa_topk=8)):
        trainer = Trainer(model, smoothing, processing_class=None)
        losses.append(trainer.compute_loss(model, {"input_ids": tokens(), "labels": tokens()}))
    torch.testing.assert_close(losses[1], losses[0])


def test_at_least_fifty_are_exact_among_them_the_common_ones():
    """By the table, whose rows `test_a_family_is_exact_or_refused_by_feature` finds again with its Transformers."""
    exact = {name for name, row in rows_of_the_table().items() if row["result"] == "exact"}
    assert len(exact) >= 50
    assert exact >= COMMON


def test_the_table_has_every_family():
    """Of the Transformers that it names; with another one some are in common."""
    rows = rows_of_the_table()
    if is_of_this_release(next(iter(rows.values()))):
        assert list(rows) == list(causal_model_types())
    else:
        assert rows.keys() & set(causal_model_types())


def markdown(rows: list[dict[str, str]]) -> str:
    """The table for the README: what is converted and exact, and per feature what is refused."""
    exact = [row["model_type"] for row in rows if row["result"] == "exact"]
    lines = [
        f"{len(exact)} of the {len(rows)} causal language models of Transformers {rows[0]['transformers']}:",
        "",
        "| | `model_type` |",
        "| --- | --- |",
        f"| **converted and exact** ({len(exact)}) | {', '.join(exact)} |",
    ]
    for feature in FEATURES:
        refused = [row["model_type"] for row in rows if row["feature"] == feature]
        if refused:
            lines.append(f"| refused: {feature} ({len(refused)}) | {', '.join(refused)} |")
    lines += [
        "",
        "Windows, sinks and softcap are looked for in the config that is converted, here each family's default:",
    ]
    lines += ["a Mistral with a `sliding_window` is refused, a Gemma 2 without `attn_logit_softcapping` is converted."]
    return "\n".join(lines) + "\n"


def test_the_readable_table_is_made_of_the_other():
    with TABLE.open() as file:
        assert TABLE.with_suffix(".md").read_text() == markdown(list(csv.DictReader(file)))


if __name__ == "__main__":
    rows = [row | {"transformers": transformers.__version__} for row in map(found, causal_model_types())]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model_type", "result", "feature", "why", "transformers"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    TABLE.with_suffix(".md").write_text(markdown(rows))
    print(f"written: {TABLE} and {TABLE.with_suffix('.md')}")
