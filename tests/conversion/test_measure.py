"""conversion/measure.py: its figures are those of whole models converted by hand, and its advice follows its rule."""

from __future__ import annotations

import io
import json
import math
import shutil

import pytest
import torch
from rich.console import Console
from tiny_families import tiny_dense
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa_hf
from nsa_hf.conversion import Measuring, convert, measure, plan, render_plan, verify
from nsa_hf.conversion.measure import dense_layers_worth_leaving
from nsa_hf.conversion.options import target_config
from nsa_hf.conversion.sources import open_source
from nsa_hf.errors import NsaError

LENGTH, EXACT = 150, 64
TEXT = "def f(x):\n    return x + 1\n\n" + "class A:\n    pass\n" * 20
# beside `tiny_sizes`
CHANNELS = {"nsa_selector": "channels", "nsa_compression": "none"}
WAYS = {
    "channels (4)": CHANNELS,
    "channels (2)": {**CHANNELS, "nsa_selector_dim": 2},
    "compressed (mean)": {"nsa_compression": "mean"},
}


def measured(folder, tokens: int = LENGTH, texts=(("mine", TEXT),), **options):
    return plan(folder, measure=Measuring(texts, tokens), **options)["measured"]


@torch.no_grad()
def by_hand(dense_dir, positions: slice, **options) -> tuple[float, float]:
    """KL and rise of perplexity of a conversion, by logits of whole models in float64."""
    ids = AutoTokenizer.from_pretrained(dense_dir)(TEXT, return_tensors="pt").input_ids[:, :LENGTH]
    dense = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32).eval()
    sparse = nsa_hf.NsaLlamaForCausalLM.from_dense(dense, **options)
    log_p, log_q = (model(ids).logits[0].double().log_softmax(-1) for model in (dense, sparse))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[positions].mean().item()
    labels = ids[0, 1:, None]
    nll = [-log[:-1].gather(1, labels)[positions].mean().item() for log in (log_p, log_q)]
    return kl, math.exp(nll[1] - nll[0]) - 1


def test_each_way_to_choose_blocks_is_measured_as_a_conversion_by_hand(tiny_dense_dir, tiny_sizes):
    result = measured(tiny_dense_dir, **{**tiny_sizes, **CHANNELS})
    assert [one["name"] for one in result["conversions"]] == list(WAYS)
    for one, options in zip(result["conversions"], WAYS.values(), strict=True):
        exact, beyond = one["by_position"]
        assert (exact["from"], exact["to"], beyond["from"], beyond["to"]) == (0, EXACT, EXACT, LENGTH)
        assert exact["max_abs_diff"] < 1e-4
        kl, rise = by_hand(tiny_dense_dir, slice(EXACT, None), **{**tiny_sizes, **options})
        assert kl > 1e-3
        assert (beyond["kl"], beyond["rise"]) == pytest.approx((kl, rise), rel=1e-3)
    assert result["documents"] == [{"name": "mine", "tokens": LENGTH}]
    assert result["texts"]["origin"] == "given by the user"
    assert result["without_channels"] is None


def test_a_layers_kl_is_that_of_a_model_with_no_other_sparse_layer(tiny_dense_dir, tiny_sizes, monkeypatch):
    for step, few in ((1, 1024), (3, 25)):
        monkeypatch.setattr(measure, "POSITIONS", few)
        rows = measured(tiny_dense_dir, **{**tiny_sizes, **CHANNELS})["by_layer"]
        assert [row["layer"] for row in rows] == [0, 1, 2]
        for row in rows:
            others = [layer for layer in (0, 1, 2) if layer != row["layer"]]
            positions = slice(EXACT, None, step)
            kl, _ = by_hand(tiny_dense_dir, positions, **{**tiny_sizes, **CHANNELS}, dense_layers=others)
            assert kl > 1e-4
            assert row["kl"] == pytest.approx(kl, rel=1e-3)
        assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_layers_that_stay_dense_are_not_measured(tiny_dense_dir, tiny_sizes):
    result = measured(tiny_dense_dir, **tiny_sizes, dense_layers=[1])
    assert [row["layer"] for row in result["by_layer"]] == [0, 2]
    assert result["conversions"][0]["name"] == "compressed (mlp)"
    assert result["conversions"][1]["name"] == "channels (4)"


def test_texts_are_used_as_far_as_they_reach(tiny_dense_dir, tiny_sizes):
    texts = [("a", "x" * 90), ("b", TEXT), ("c", "y" * 200), ("d", "z" * 300), ("e", "z" * 400)]
    found = [
        [(text["name"], text["tokens"]) for text in measured(tiny_dense_dir, n, texts, **tiny_sizes)["documents"]]
        for n in (150, 250, 4000)
    ]
    assert found == [[("b", 150), ("c", 150)], [("b", 250), ("d", 250)], [("e", 400)]]


def test_no_weights_of_the_source_are_changed_or_written(tiny_dense_dir, tiny_sizes):
    before = {path.name: path.read_bytes() for path in tiny_dense_dir.iterdir()}
    result = plan(tiny_dense_dir, measure=Measuring([("mine", TEXT)], LENGTH), **tiny_sizes)
    assert {path.name: path.read_bytes() for path in tiny_dense_dir.iterdir()} == before
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for record in (plain := plan(tiny_dense_dir, **tiny_sizes), result):
        record["choices"].pop("dense_layers")  # the reason is what was measured
    assert plain == {**result, "measured": None}


def test_the_weights_are_in_memory_once(tiny_dense_dir, tiny_sizes):
    source = open_source(tiny_dense_dir)
    dense = source.load_model(torch.float32)
    config, _ = target_config(source.config, {**tiny_sizes, **CHANNELS})
    windows = [("mine", torch.arange(100)[None])]
    study = measure.Study(dense, config, windows, lambda: None)
    again = measure.sparse_model(study.model, config.with_fields(nsa_selector_dim=2))
    for name, parameter in dense.named_parameters():
        assert (
            study.model.get_parameter(name).data_ptr() == again.get_parameter(name).data_ptr() == parameter.data_ptr()
        )


def test_rope_that_is_scaled_is_measured_beside_the_source_scaled_alike(tiny_dense_dir, tiny_sizes, tmp_path):
    result = measured(tiny_dense_dir, **tiny_sizes, rope_scaling="linear:4")
    plain = measured(tiny_dense_dir, **tiny_sizes)
    exact, beyond = result["conversions"][0]["by_position"]
    assert exact["max_abs_diff"] < 1e-4
    assert beyond["ppl_reference"] != plain["conversions"][0]["by_position"][1]["ppl_reference"]
    out = convert(tiny_dense_dir, tmp_path / "out", **tiny_sizes, rope_scaling="linear:4")
    row = verify(tiny_dense_dir, out, length=LENGTH, documents=1, texts=[("mine", TEXT)])["by_position"][1]
    assert row.pop("rise_error") is None, "of one text"
    assert row == pytest.approx({name: beyond[name] for name in row}, rel=1e-3)


def test_a_model_whose_layers_slide_is_measured_in_the_others(tmp_path):
    dense = tiny_dense("gemma3_text")
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    text = "".join(chr(33 + n * n % 50) for n in range(300))
    result = measured(tmp_path / "dense", 120, [("a", text)], topk=3, block_size=8, kernel_size=4, kernel_stride=2)
    assert [row["layer"] for row in result["by_layer"]] == full != list(range(len(config["layer_types"])))


LAYERS = [{"layer": n, "becomes": "nsa", "keeps": None} for n in range(40)]


@pytest.mark.parametrize(
    ("large", "selector", "worth"),
    [
        ({}, "channels", []),
        ({7: 3.9}, "channels", []),  # not above the others by enough
        ({7: 5.0}, "channels", []),  # its share does not pay
        ({7: 6.0}, "channels", [7]),
        ({7: 9.0}, "compressed", []),  # whose other layers read less, so that a dense one costs more
        ({7: 30.0}, "compressed", [7]),
        ({7: 40.0, 3: 40.0, 9: 1.5}, "channels", [3, 7]),
    ],
)
def test_layers_worth_leaving_dense(large, selector, worth):
    compression = "none" if selector == "channels" else "mlp"
    fields = {
        "nsa_selector": selector,
        "nsa_compression": compression,
        "nsa_dense_layers": [1],
        "nsa_selector_bits": 16,
    }
    config = nsa_hf.nsa_config_from_dense(tiny_dense("llama", num_hidden_layers=40).config, **fields)
    layers = [{**row, "becomes": "dense" if row["layer"] == 1 else "nsa"} for row in LAYERS]
    by_layer = {n: 1e-3 * large.get(n, 1.0) for n in range(40) if n != 1}
    advice = dense_layers_worth_leaving(config, layers, by_layer)
    assert advice["layers"] == worth
    assert advice["option"] == sorted([1, *worth])
    assert (advice["read_bytes_then"] > advice["read_bytes"]) == bool(worth)
    first = max(by_layer, key=by_layer.get)
    assert advice["why"].startswith(", ".join(map(str, worth)) if worth else f"none: layer {first}, the first in KL")


def test_the_advice_is_measured_too_and_shown(tiny_dense_dir, tiny_sizes, monkeypatch):
    monkeypatch.setattr(measure, "STANDS_OUT", 1.1)
    monkeypatch.setattr(measure, "WORTH", 0)
    result = plan(tiny_dense_dir, measure=Measuring([("mine", TEXT)], LENGTH), **{**tiny_sizes, **CHANNELS})
    advice = result["measured"]["dense_layers"]
    option = ",".join(map(str, advice["option"]))
    why = f"worth it, as measured: --nsa-dense-layers {option}: {advice['why']}"
    assert result["choices"]["dense_layers"]["why"] == why
    assert len(advice["layers"]) == 1
    kl, rise = by_hand(tiny_dense_dir, slice(EXACT, None), **{**tiny_sizes, **CHANNELS}, dense_layers=advice["option"])
    assert (advice["by_position"][1]["kl"], advice["by_position"][1]["rise"]) == pytest.approx((kl, rise), rel=1e-3)
    console = Console(file=io.StringIO(), width=80)
    console.print(render_plan(result))
    text = console.file.getvalue()
    assert "…" not in text, "something was cut off"
    for part in ("mine (150 tokens)", "channels (2)", f"dense in {advice['layers'][0]}", f"{kl:.4f}", f"{rise:+.2%}"):
        assert part in text
    assert f"--nsa-dense-layers {advice['layers'][0]}" in text


def test_texts_within_the_exact_range_are_refused_with_what_is_needed(tiny_dense_dir, tiny_sizes, monkeypatch):
    monkeypatch.setattr("nsa_hf.conversion.measure.Study", lambda *_: pytest.fail("went on"))
    with pytest.raises(
        NsaError, match=r"expected a text of more, and the longest of 2 has 64; give one of at least 128"
    ):
        measured(tiny_dense_dir, 150, [("a", "x" * 64), ("b", "x" * 30)], **tiny_sizes)
    with pytest.raises(NsaError, match=r"tokens to measure must be more, got 64"):
        measured(tiny_dense_dir, 64, **tiny_sizes)
    with pytest.raises(NsaError, match="the longest of 0 has 0"):
        measured(tiny_dense_dir, 150, [], **tiny_sizes)
    with pytest.raises(NsaError, match="measure_documents must be an int of at least 1"):
        plan(tiny_dense_dir, measure=Measuring([], 150, documents=0), **tiny_sizes)


def test_sources_that_cannot_be_measured_are_refused(tiny_dense_dir, tiny_sizes, tmp_path):
    def copy(name: str, *left_out: str):
        return shutil.copytree(tiny_dense_dir, tmp_path / name, ignore=shutil.ignore_patterns(*left_out))

    with pytest.raises(NsaError, match="safetensors"):
        measured(copy("no-weights", "*.safetensors"), **tiny_sizes)
    with pytest.raises(NsaError, match="has no tokenizer, so no text can be measured"):
        measured(copy("no-tokenizer", "tokenizer*"), **tiny_sizes)
    with pytest.raises(NsaError, match="no layer would be sparse"):
        measured(tiny_dense_dir, **tiny_sizes, dense_layers=[0, 1, 2])
    slides = tiny_dense("gemma3_text", layer_types=["sliding_attention"] * 2, num_hidden_layers=2)
    slides.save_pretrained(tmp_path / "slides")
    byte_tokenizer().save_pretrained(tmp_path / "slides")
    with pytest.raises(NsaError, match="no layer has full attention"):
        measured(tmp_path / "slides", **tiny_sizes)


def test_a_family_without_channels_is_measured_without_them(tiny_dense_dir, tiny_sizes, monkeypatch):
    def refuse(*_):
        raise nsa_hf.errors.NotPlain("channel 0 turns alone")

    monkeypatch.setattr("nsa_hf.config.slowest_channels", refuse)
    result = measured(tiny_dense_dir, **tiny_sizes)
    assert [one["name"] for one in result["conversions"]] == ["compressed (mlp)"]
    assert result["without_channels"] == "channel 0 turns alone"


@pytest.mark.parametrize("gate", [{"gate": "sigmoid"}, {"gate": "blend", "gate_blend": 0.5}])
def test_gates_that_do_not_start_dense_are_measured_from_the_first_token(gate, tiny_dense_dir, tiny_sizes):
    result = measured(tiny_dense_dir, **tiny_sizes, **gate)
    first = result["conversions"][0]["by_position"][0]
    assert (result["exact_up_to"], first["from"]) == (0, 0) and first["kl"] > 1e-3
    console = Console(file=io.StringIO(), width=120)
    console.print(render_plan(plan(tiny_dense_dir, **tiny_sizes, **gate)))
    assert "nowhere: nsa_gate" in console.file.getvalue()
