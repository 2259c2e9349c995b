"""Every command on every family of the table: what families differ in never reaches a user as a traceback.

(Whether what they compute is right: test_families.py.) One family of each kind is in `make test`, all are in
`make test-all`.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_families import SIZES, TABLE, letters_tokenizer, refusal, tiny_dense
from tiny_runs import tiny_run, write_texts
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from nsa_hf.attention import NsaAttentionMixin
from nsa_hf.conversion import (
    Measuring,
    convert,
    export_dense,
    plan,
    render_export,
    render_plan,
    render_verify,
    verify,
)
from nsa_hf.discovery import causal_model_types, find_family
from nsa_hf.errors import NotPlain, NsaError
from nsa_hf.kernels import MeanCompressor, n_blocks
from nsa_hf.model_cards import pictures
from nsa_hf.model_cards.card import render_card
from nsa_hf.recipes.evaluation.subject import Settings
from nsa_hf.recipes.evaluation.suites import evaluate, render
from nsa_hf.recipes.generate import generate_text
from nsa_hf.recipes.inspection import inspect_model, render_inspection
from nsa_hf.recipes.training.loop import train

LENGTH, PROMPT, NEW = 60, 30, 8
# What has nothing to do with entries: what scores blocks is chosen as recommended.
RECOMMENDED = {name: size for name, size in SIZES.items() if not re.search("selector|kernel|compression", name)}
# The one family without channels to choose by: entries' sizes must fit the blocks.
BY_ENTRIES = "ctrl"
ONE_OF_EACH_KIND = {
    "llama": "plain",
    "qwen3_moe": "experts",
    "phi3": "fused projections",
    "exaone": "checkpoints with other names of layers' parts than the model's",
    "gemma3_text": "sliding layers, RoPE of two kinds",
    "lfm2": "convolutions",
    "granitemoehybrid": "Mamba layers, logits scaled",
    "stablelm": "partial RoPE",
    "gptj": "interleaved RoPE, config's own names",
    "gpt_neox": "the decoder's ids without a name, cache as layer_past",
    "ctrl": "no RoPE, no gradient checkpointing",
    "jetmoe": "experts in the attention, no gradient checkpointing",
    "nemotron": "layers that hand nothing down",
    "modernbert-decoder": "a layer before the head",
}


def families() -> list:
    """Those that the table calls exact, as far as this Transformers has them."""
    with TABLE.open() as file:
        exact = {row["model_type"] for row in csv.DictReader(file) if row["result"] == "exact"}
    return [
        pytest.param(name, marks=() if name in ONE_OF_EACH_KIND else pytest.mark.slow)
        for name in causal_model_types()
        if name in exact
    ]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), count=2)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("model_type", families())
def test_every_command(model_type, texts, tmp_path, monkeypatch):
    src, out, trained = tmp_path / "dense", tmp_path / "nsa", tmp_path / "trained-0"
    tiny_dense(model_type).save_pretrained(src)
    letters_tokenizer().save_pretrained(src)
    if reason := refusal(model_type):  # an older Transformers has it otherwise
        with pytest.raises(NotPlain, match=re.escape(reason)):
            convert(src, out, **SIZES)
        return
    text = ("0.txt", (texts / "0.txt").read_text())

    said = plan(src, measure=Measuring([text], LENGTH), **SIZES)
    assert render_plan(said)
    fitting = {"kernel_size": 4, "kernel_stride": 2} if model_type == BY_ENTRIES else {}
    chosen = convert(src, tmp_path / "chosen", **RECOMMENDED, **fitting)
    assert verify(src, chosen, length=LENGTH, documents=1, texts=[text])["exact"] is True
    config = json.loads((chosen / "config.json").read_text())
    assert config["nsa_selector"] == ("compressed" if model_type == BY_ENTRIES else "channels")
    convert(src, out, **SIZES)
    channels = said["measured"]["without_channels"] is None
    result = verify(src, out, length=LENGTH, documents=1, texts=[text], compare_selectors=channels)
    assert result["exact"] is True, result["why"]
    assert render_verify(result)
    check_measured(said["measured"], result)
    evaluated = evaluate(out, ["ppl"], Settings(text=str(texts), documents=1, length=LENGTH))
    measured = evaluated["suites"]["ppl"]
    assert render(evaluated, ["ppl"], out) and measured["rows"][0]["kl"] < 1e-6 < measured["rows"][-1]["kl"]
    assert all(0 <= row["recall"] <= 1 and row["captured"] <= row["oracle"] + 1e-6 for row in measured["recall"])
    assert render_inspection(inspect_model(out, text, LENGTH))
    check_generation(out, text[1])
    check_training(model_type, out, texts)
    # pictures are the same for all (test_pictures.py), and slow
    monkeypatch.setattr(pictures, "draw_pictures", lambda *_: [])
    assert "# dense with Native Sparse Attention" in render_card(trained).read_text()
    for folder in (out, trained):
        report = export_dense(folder, folder / "dense")
        assert render_export(report) and report["trained"] is (folder is trained)


def check_measured(measured: dict, verified: dict) -> None:
    """What was measured in memory is what the converted model then is, with either selector."""
    rows = [
        verified["by_position"],
        *([verified["other_selector"]["by_position"]] if verified["other_selector"] else []),
    ]
    assert len(rows) == len(measured["conversions"])
    for (*_, expected), one in zip(rows, measured["conversions"], strict=True):
        row = one["by_position"][-1]
        assert expected["kl"] > 1e-6
        assert {name: row[name] for name in ("kl", "ppl")} == pytest.approx(
            {name: expected[name] for name in ("kl", "ppl")}, rel=1e-3
        )
    assert all(row["kl"] > 1e-9 for row in measured["by_layer"])


def check_generation(out: Path, text: str) -> None:
    """Each block is compressed once, not anew at each step, whatever the family's layers call their cache."""
    blocks: Counter[nn.Module] = Counter()

    def count(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, MeanCompressor):
            blocks[module] += given[0].shape[1]

    with register_module_forward_pre_hook(count):
        new = generate_text(out, text, prompt_tokens=PROMPT, max_new_tokens=NEW)["new_tokens"]
    # the last token is not read
    once = n_blocks(PROMPT + new - 1, SIZES["nsa_kernel_size"], SIZES["nsa_kernel_stride"])
    assert set(blocks.values()) == {once}


def check_training(model_type: str, out: Path, texts: Path) -> None:
    """Two steps, into `trained-0`; with gradient checkpointing the same weights, or refused where there is none."""
    runs = [
        tiny_run(
            out,
            texts,
            out.with_name(f"trained-{every}"),
            length=LENGTH,
            steps=2,
            save_every=0,
            held_out_documents=1,
            gradient_checkpointing=every,
        )
        for every in (0, 1)
    ]
    forwards: list[int] = []

    def count(module: nn.Module, given: tuple) -> None:
        # where gates are only looked at there are no gradients
        forwards[-1] += isinstance(module, NsaAttentionMixin) and module.training and torch.is_grad_enabled()

    with register_module_forward_pre_hook(count):
        for run in runs:
            forwards.append(0)
            if run.gradient_checkpointing and not find_family(model_type).causal_lm.supports_gradient_checkpointing:
                with pytest.raises(NsaError, match=f"Transformers has none for {model_type} models"):
                    train(run)
                assert not list(out.parent.glob("trained-1*"))
                return
            train(run)
    assert forwards[1] == 2 * forwards[0] > 0, "nothing was computed again"
    kept, again = (load_file(f"{run.out}/model.safetensors") for run in runs)
    assert {name for name in kept if not torch.equal(kept[name], again[name])} == set()
