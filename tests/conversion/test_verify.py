"""conversion/verify.py: exact where it is, not exact wherever something was changed, and the right figures."""

from __future__ import annotations

import importlib
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_families import tiny_dense
from tiny_models import randomize_nsa
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.conversion import convert, export_dense, manifest, render_verify, verify
from nsa_hf.conversion.compare.metrics import Bucket
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.hashes import hash_tensor
from nsa_hf.conversion.verify import judge
from nsa_hf.errors import NsaError

LENGTH = 150
NORM = "model.layers.1.input_layernorm.weight"
KEPT = {"kept": 3, "of": 3, "unlike_manifest": []}


@pytest.fixture(scope="module")
def converted(tiny_dense_dir, tiny_sizes, tmp_path_factory) -> Path:
    return convert(tiny_dense_dir, tmp_path_factory.mktemp("converted") / "out", **tiny_sizes)


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def flip_bit(folder: Path, name: str) -> None:
    """The lowest bit of one number: far too small a change for any logit to show."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1).view(torch.int32)[3] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_manifest(folder: Path, change) -> None:
    record = manifest.read(folder)
    change(record)
    manifest.write(folder, record)


def test_a_conversion_is_exact_and_beyond_the_range_it_is_not_dense(tiny_dense_dir, converted):
    result = verify(tiny_dense_dir, converted, length=LENGTH)
    assert result["exact"] is True
    assert result["tensors"] == {"kept": 29, "of": 29, "changed": [], "written": 65, "unlike_manifest": []}
    exact = result["exact_range"]
    assert (exact["up_to"], exact["tokens"], exact["same_top1"], exact["top1_gap"]) == (64, 128, 1.0, 0.0)
    assert exact["max_abs_diff"] < 1e-5
    assert [(row["from"], row["to"], row["tokens"]) for row in result["by_position"]] == [(0, 64, 128), (64, 150, 172)]
    assert result["by_position"][1]["max_abs_diff"] > 0.1
    assert result["source_matches_manifest"] is True
    assert result["documents"] == [{"name": n, "tokens": LENGTH} for n in ("_pydecimal.py", "tarfile.py")]
    assert result["texts"]["license"] == "PSF-2.0"
    assert json.loads((converted / "verify.json").read_text(encoding="utf-8")) == result


def test_by_position_is_what_whole_forwards_give(tiny_dense_dir, converted):
    text = "def f(x):\n    return x + 1\n" * 20
    result = verify(tiny_dense_dir, converted, length=LENGTH, documents=1, texts=[("mine", text)])
    ids = AutoTokenizer.from_pretrained(converted)(text, return_tensors="pt").input_ids[:, :LENGTH]
    with torch.no_grad():
        dense, sparse = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation=a).eval()(ids).logits[0]
            for d, a in ((tiny_dense_dir, "sdpa"), (converted, "nsa"))
        )
    row = result["by_position"][1]
    part = slice(64, LENGTH)
    log_p, log_q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[part].mean().item()
    nll = [torch.nn.functional.nll_loss(x[64:-1], ids[0, 65:]).item() for x in (log_p, log_q)]
    assert row["tokens"] == LENGTH - 64
    assert row["kl"] == pytest.approx(kl, rel=1e-4)
    assert [row["ppl_reference"], row["ppl"]] == pytest.approx([math.exp(x) for x in nll], rel=1e-4)
    assert row["same_top1"] == pytest.approx((dense.argmax(-1) == sparse.argmax(-1))[part].double().mean().item())
    assert row["max_abs_diff"] == pytest.approx((dense - sparse)[part].abs().max().item(), rel=1e-4)
    assert result["texts"]["origin"] == "given by the user"


def test_with_everything_selected_all_positions_are_exact(tiny_dense_dir, tiny_sizes, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out", **{**tiny_sizes, "nsa_topk": 10})
    result = verify(tiny_dense_dir, out, length=LENGTH)
    assert result["exact"] is True
    assert [row["to"] for row in result["by_position"]] == [LENGTH]
    assert result["by_position"][0]["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("options", [{"nsa_gate": "blend"}, {"dense_layers": [0, 2]}, {"compression": "mean"}])
def test_other_exact_conversions(tiny_dense_dir, tiny_sizes, tmp_path, options):
    out = convert(tiny_dense_dir, tmp_path / "out", **tiny_sizes, **options)
    assert verify(tiny_dense_dir, out, length=100, documents=1)["exact"] is True


@pytest.mark.parametrize("options", [{"nsa_gate": "sigmoid"}, {"nsa_gate": "blend", "gate_blend": 0.5}])
def test_gates_that_do_not_start_exact_are_found_by_the_logits(tiny_dense_dir, tiny_sizes, tmp_path, options):
    out = convert(tiny_dense_dir, tmp_path / "out", **tiny_sizes, **options)
    result = verify(tiny_dense_dir, out, length=100, documents=1)
    assert result["exact"] is False
    assert result["tensors"]["kept"] == result["tensors"]["of"]
    assert "a logit within the exact range differs by" in result["why"]


@pytest.mark.parametrize(
    ("name", "changed", "why"),
    [
        (NORM, [NORM], "1 of 29 tensors are not the source's; 1 tensors are not the manifest's"),
        ("model.layers.0.self_attn.nsa.compress_k.position", [], "1 tensors are not the manifest's"),
    ],
)
def test_a_single_flipped_bit_is_found(tiny_dense_dir, copy, name, changed, why):
    flip_bit(copy, name)
    result = verify(tiny_dense_dir, copy, length=100, documents=1)
    assert (result["exact"], result["why"]) == (False, why)
    assert result["tensors"]["changed"] == changed
    assert result["tensors"]["unlike_manifest"] == [name]


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "modeling_nsa.py"]
)
def test_a_single_flipped_bit_of_any_other_file_is_found(tiny_dense_dir, copy, monkeypatch, name):
    module = importlib.import_module("nsa_hf.conversion.verify")
    zeros = torch.zeros(1, 100, 48)
    monkeypatch.setattr(module, "final_states", lambda model, windows, **_: [zeros] * len(windows))
    assert verify(tiny_dense_dir, copy, length=100, documents=1)["changed_files"] == []
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    try:
        result = verify(tiny_dense_dir, copy, length=100, documents=1)
        outcome = [result["exact"], result["changed_files"], f"{name} changed since the conversion" in result["why"]]
    except NsaError:  # it cannot be read at all
        outcome = [False, [name], True]
    assert outcome == [False, [name], True]


def with_earlier_hashes(folder: Path) -> Path:
    """The folder as versions before xxh3_128 wrote it: format 1, sha256 in every entry, no word of a kind of hash."""
    tensors = dict(SafetensorsCheckpoint(folder).tensors())

    def change(record):
        del record["hash"]
        record["format"] = 1
        for name, entry in record["tensors"].items():
            del entry["xxh3_128"]
            entry["sha256"] = hash_tensor(tensors[name], "sha256")

    edit_manifest(folder, change)
    return folder


def test_a_manifest_of_earlier_hashes_is_still_a_proof(tiny_dense_dir, copy, tmp_path):
    result = verify(tiny_dense_dir, with_earlier_hashes(copy), length=100, documents=1)
    assert (result["exact"], result["source_matches_manifest"]) == (True, True)
    assert export_dense(copy, tmp_path / "dense")["as_in_source"] == 29
    name = "model.layers.0.self_attn.nsa.compress_k.position"
    flip_bit(copy, name)
    assert verify(tiny_dense_dir, copy, length=100, documents=1)["tensors"]["unlike_manifest"] == [name]


def test_a_changed_weight_is_found_even_if_the_manifest_was_changed_too(tiny_dense_dir, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors[NORM] *= 1.1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    edit_manifest(
        copy, lambda record: record["tensors"].update({NORM: manifest.describe_tensor(tensors[NORM], "source")})
    )
    result = verify(tiny_dense_dir, copy, length=100, documents=1)
    assert result["exact"] is False
    assert result["tensors"]["unlike_manifest"] == []
    assert "1 of 29 tensors are not the source's; a logit" in result["why"]


REMOTE = """
from transformers import LlamaForCausalLM

class XForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * {factor}
        return output
"""


@pytest.mark.parametrize("factor", [1, 1.1])
def test_trusted_code_is_the_dense_model(tiny_dense_dir, tiny_sizes, tmp_path, monkeypatch, factor):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    dense = Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))
    config = json.loads((dense / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (dense / "config.json").write_text(json.dumps(config))
    (dense / "modeling_x.py").write_text(REMOTE.format(factor=factor))
    out = convert(dense, tmp_path / "out", trust_remote_code=True, **tiny_sizes)
    with pytest.raises(NsaError, match="defined by code of its own"):
        verify(dense, out)
    assert verify(dense, out, length=100, documents=1, trust_remote_code=True)["exact"] is (factor == 1)
    assert not (out / "modeling_x.py").exists()
    assert "modeling_x" not in (out / "config.json").read_text()


def test_against_another_source_it_is_not_exact(tiny_dense_dir, converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_dense_dir)
    model.model.norm.weight.data[0] += 1
    other = Path(shutil.copytree(tiny_dense_dir, tmp_path / "other"))
    model.save_pretrained(other)
    result = verify(other, converted, length=100, documents=1)
    assert (result["exact"], result["source_matches_manifest"]) == (False, False)
    assert result["tensors"]["changed"] == ["model.norm.weight"]


def train_elsewhere(folder: Path) -> None:
    """Other weights, saved over a folder as Trainer, TRL or a merge do."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data *= 1.01
    randomize_nsa(model)
    model.save_pretrained(folder)


@pytest.fixture
def trained(copy) -> Path:
    """As `train` leaves it."""
    start = manifest.read(copy)
    train_elsewhere(copy)
    (copy / "training.json").write_text("{}")
    run = {"steps": 1, "fingerprint": {"seed": 0}}
    manifest.write(copy, manifest.build_trained(copy, copy, start, start["companions"], run))
    return copy


def test_a_trained_model_is_compared_but_exactness_does_not_apply(tiny_dense_dir, trained):
    result = verify(tiny_dense_dir, trained, length=100, documents=1)
    assert (result["exact"], result["why"]) == (None, "trained: differs from its source as recorded")
    assert (result["tensors"]["kept"], result["tensors"]["unlike_manifest"], result["trained"]) == (28, [], True)
    assert result["by_position"][0]["kl"] > 0
    console = Console(file=io.StringIO(), width=120)
    console.print(render_verify(result))
    assert "trained: differs from its source as recorded" in console.file.getvalue()


@pytest.mark.parametrize("name", [NORM, "model.layers.0.self_attn.nsa.compress_k.position"])
def test_a_single_flipped_bit_of_a_trained_model_is_found(name, tiny_dense_dir, trained, tmp_path):
    flip_bit(trained, name)
    result = verify(tiny_dense_dir, trained, length=100, documents=1)
    assert (result["exact"], result["why"]) == (False, "not as trained: 1 tensors are not the manifest's")
    assert result["tensors"]["unlike_manifest"] == [name]
    if name == NORM:
        with pytest.raises(NsaError, match=f"1 tensors are not what its manifest says, {NORM} for one"):
            export_dense(trained, tmp_path / "dense")


@pytest.mark.parametrize("name", ["config.json", "training.json"])
def test_an_edited_file_of_a_trained_model_is_found(name, tiny_dense_dir, trained):
    content = json.loads((trained / name).read_text())
    (trained / name).write_text(json.dumps({**content, "nsa_topk": 5}))
    result = verify(tiny_dense_dir, trained, length=100, documents=1)
    assert (result["exact"], result["why"]) == (False, f"not as trained: {name} changed since the training")


@pytest.mark.parametrize("record", [{}, {"training": {}}, {"training": {"steps": 9}}, {"training": True}])
def test_the_bare_word_trained_makes_no_trained_model(record, copy):
    edit_manifest(copy, lambda content: content.update(trained=True, **record))
    content = manifest.read(copy)
    assert not manifest.is_trained(content)
    why = "its manifest says that it was trained, and has no record of a run"
    assert judge(content, KEPT, Bucket(0, 64)) == (False, why)


def test_an_untrained_model_is_not_waved_through_as_trained(tiny_dense_dir, copy):
    edit_manifest(copy, lambda record: record.update(trained=True))
    result = verify(tiny_dense_dir, copy, length=100, documents=1)
    assert (result["exact"], result["trained"]) == (False, False)


def test_a_folder_that_was_saved_elsewhere_is_held_against_its_source(tiny_dense_dir, copy, tmp_path):
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(saved)
    AutoTokenizer.from_pretrained(copy).save_pretrained(saved)
    result = verify(tiny_dense_dir, saved, length=100, documents=1)
    assert (result["exact"], result["trained"], result["source_matches_manifest"]) == (True, None, None)
    assert result["why"].endswith("; no manifest.json, so nothing vouches for the new parameters and the other files")
    train_elsewhere(saved)
    result = verify(tiny_dense_dir, saved, length=100, documents=1)
    assert (result["exact"], result["tensors"]["kept"], result["tensors"]["unlike_manifest"]) == (None, 28, None)
    assert result["why"].startswith("not proved: 1 of 29 tensors are not the source's; a logit within the exact range")
    assert result["why"].endswith("; by training or by damage: there is no manifest.json to tell")
    console = Console(file=io.StringIO(), width=120)
    console.print(render_verify(result))
    assert "not proved" in console.file.getvalue()


def test_scaling_that_nothing_vouches_for_is_not_called_exact(tiny_dense_dir, copy):
    (copy / "manifest.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (copy / "config.json").write_text(json.dumps(config))
    result = verify(tiny_dense_dir, copy, length=100, documents=1)
    assert (result["exact"], result["tensors"]["kept"]) == (None, 29)
    assert result["why"].startswith("not proved: its config scales RoPE, and the source's does not; scaled alike, all")


def test_of_a_tensor_lost_elsewhere_nothing_is_made_up(tiny_dense_dir, copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "manifest.json").unlink()
    with pytest.raises(NsaError, match="lacks 1 tensors"):
        verify(tiny_dense_dir, copy, length=100)


def test_in_another_dtype_it_is_exact_with_respect_to_the_rounded_source(tiny_dense_dir, tiny_sizes, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out", dtype="bfloat16", **tiny_sizes)
    result = verify(tiny_dense_dir, out, length=100, documents=1)
    assert (result["exact"], result["checkpoint_dtype"], result["computed_in"]) == (True, "bfloat16", "float32")
    assert result["tensors"]["kept"] == 29
    assert result["exact_range"]["max_abs_diff"] < 1e-5


def test_a_tokenizer_of_another_model_is_named(tiny_dense_dir, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(NsaError, match="the tokenizer gives token 256, and the model's vocabulary ends at 255"):
        verify(tiny_dense_dir, copy, texts=[("text", "and beyond it, " * 40)], length=100, documents=1)


def test_without_a_tokenizer_random_tokens_show_exactness_and_no_perplexity(tiny_dense_dir, tiny_sizes, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_dense_dir).save_pretrained(tmp_path / "dense")
    out = convert(tmp_path / "dense", tmp_path / "out", **tiny_sizes)
    result = verify(tmp_path / "dense", out, length=100)
    assert result["exact"] is True
    assert [document["name"] for document in result["documents"]] == ["random tokens 0", "random tokens 1"]
    assert result["texts"] is None
    assert all(row["ppl"] is row["ppl_reference"] is None for row in result["by_position"])
    assert result["by_position"][1]["kl"] > 0


def test_length_stops_at_what_the_model_was_made_for(tiny_dense_dir, tiny_sizes, tmp_path):
    dense = Path(shutil.copytree(tiny_dense_dir, tmp_path / "dense"))
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 90}))
    out = convert(dense, tmp_path / "out", **tiny_sizes)
    assert verify(dense, out, documents=1)["length"] == 90


@pytest.mark.parametrize("options", [{"length": 1}, {"documents": 0}, {"length": 64.5}, {"documents": 10**9}])
def test_bad_options(tiny_dense_dir, converted, options):
    with pytest.raises(NsaError, match=r"(length|documents) must be an int of at least"):
        verify(tiny_dense_dir, converted, **options)


def test_what_is_missing_or_damaged_is_refused_and_the_old_result_stays(tiny_dense_dir, copy, tmp_path):
    (copy / "verify.json").write_text("old")
    with pytest.raises(NsaError, match="there is no folder"):
        verify(tmp_path / "gone", copy)
    with pytest.raises(NsaError, match=r"holds a dense model \(llama\)"):
        verify(tiny_dense_dir, tiny_dense_dir)
    with pytest.raises(NsaError, match=r"has no manifest\.json"):
        verify(tiny_dense_dir, tmp_path)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(NsaError, match="damaged"):
        verify(tiny_dense_dir, copy)
    assert (copy / "verify.json").read_text() == "old"


def test_weights_the_checkpoint_lacks_are_not_made_up(tiny_dense_dir, copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NsaError, match="lacks 1 tensors"):
        verify(tiny_dense_dir, copy, length=100)


@pytest.mark.parametrize(
    ("tensors", "difference", "gap", "expected"),
    [
        (KEPT, 9e-4, 0.0, True),
        (KEPT, 9e-4, 5e-5, True),  # a tie that rounding turned
        (KEPT, 9e-4, 5e-4, False),
        (KEPT, 1.1e-3, 0.0, False),
        (KEPT, math.nan, math.nan, False),
        (KEPT, math.inf, 0.0, False),
        ({**KEPT, "kept": 2}, 0.0, 0.0, False),
        ({**KEPT, "unlike_manifest": ["a"]}, 0.0, 0.0, False),
    ],
)
def test_judgement(tensors, difference, gap, expected):
    logits = Bucket(0, 64, max_abs_diff=difference, top1_gap=gap)
    assert judge({"trained": False}, tensors, logits)[0] is expected
    assert judge({"trained": False}, tensors, logits, ["config.json"])[0] is False
    assert judge({"trained": True}, tensors, logits)[0] is False
    alone = judge(None, {**tensors, "unlike_manifest": None}, logits)[0]
    assert alone is (True if expected or tensors["unlike_manifest"] else None)
    trained = {"trained": True, "training": {"steps": 1, "fingerprint": {"seed": 0}}}
    assert judge(trained, tensors, logits)[0] is (False if tensors["unlike_manifest"] else None)


CHANNELS = {"nsa_selector": "channels", "nsa_compression": "none"}


@pytest.mark.parametrize(
    ("own", "others", "names"),
    [
        ({}, {"nsa_selector": "channels"}, ("compressed (mlp)", "channels (4)")),
        (CHANNELS, {"nsa_compression": "mean"}, ("channels (4)", "compressed (mean)")),
        ({**CHANNELS, "nsa_selector_dim": 2, "nsa_compression": "linear"}, {"nsa_compression": "linear"}, None),
        ({"nsa_branch_kv": "independent", "nsa_dense_layers": [1]}, {"nsa_selector": "channels"}, None),
    ],
)
def test_the_other_selector_is_measured_as_the_model_converted_with_it(
    own, others, names, tiny_dense_dir, tiny_sizes, tmp_path
):
    """Also of weights that were trained: they are the same in both, and the model's own figures stay as they are."""
    out = convert(tiny_dense_dir, tmp_path / "own", **{**tiny_sizes, **own})
    kept = {name: value for name, value in own.items() if name in ("nsa_branch_kv", "nsa_dense_layers")}
    other = convert(tiny_dense_dir, tmp_path / "other", **{**tiny_sizes, **kept, **others})
    trained = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in (name for name in trained if ".nsa.compress" in name):
        trained[name] += 0.3 * torch.randn(trained[name].shape, generator=generator)
    for folder in (out, other):
        save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})
    alone, of_other = (verify(tiny_dense_dir, folder, length=LENGTH, documents=1) for folder in (out, other))
    both = verify(tiny_dense_dir, out, length=LENGTH, documents=1, compare_selectors=True)
    compared = both["other_selector"]
    assert compared["by_position"] == of_other["by_position"]
    assert compared["by_position"][1]["kl"] != both["by_position"][1]["kl"]
    assert alone["other_selector"] is None
    same = {**alone, "seconds": both["seconds"], "other_selector": compared}
    assert both == same
    if names:
        assert (compared["instead_of"], compared["name"]) == names
    console = Console(file=io.StringIO(), width=80)
    console.print(render_verify(both))
    text = console.file.getvalue()
    assert "…" not in text, "something was cut off"
    assert f"{compared['by_position'][1]['kl']:.5f}" in text and "blocks chosen otherwise" in text


def test_a_comparison_with_channels_is_refused_where_there_are_none(tiny_sizes, tmp_path, monkeypatch):
    tiny_dense("ctrl").save_pretrained(tmp_path / "dense")
    out = convert(tmp_path / "dense", tmp_path / "out", **tiny_sizes)
    module = importlib.import_module("nsa_hf.conversion.verify")
    monkeypatch.setattr(module, "compare_tensors", lambda *_: pytest.fail("went on"))
    with pytest.raises(NsaError, match=r"selectors cannot be compared: .* together with one other channel"):
        verify(tmp_path / "dense", out, length=100, documents=1, compare_selectors=True)


def test_rendering_shows_the_verdict_and_the_figures(tiny_dense_dir, converted):
    result = verify(tiny_dense_dir, converted, length=LENGTH)
    console = Console(file=io.StringIO(), width=80)
    console.print(render_verify(result))
    text = console.file.getvalue()
    assert "…" not in text, "something was cut off"
    for part in (
        "Up to 64 tokens",
        "exact:",
        "29 of 29",
        "65 of 65",
        "64 - 150",
        f"{result['by_position'][1]['ppl']:.3f}",
    ):
        assert part in text
    console.print(render_verify({**result, "exact": False, "why": "because", "source": "models/[b]x"}))
    assert "NOT exact: because" in console.file.getvalue()
    assert "models/[b]x" in console.file.getvalue()


def test_one_model_at_a_time_and_only_heads_remain(tiny_dense_dir, converted, monkeypatch):
    module = importlib.import_module("nsa_hf.conversion.verify")
    steps: list[str | int] = []
    drop_decoder, load_whole = module.drop_decoder, module.load_whole

    def drop(model):
        drop_decoder(model)
        steps.append(sum(parameter.numel() for parameter in model.parameters()))

    def load(*args, **options):
        steps.append("the NSA model is loaded")
        return load_whole(*args, **options)

    monkeypatch.setattr(module, "drop_decoder", drop)
    monkeypatch.setattr(module, "load_whole", load)
    verify(tiny_dense_dir, converted, length=100, documents=1)
    assert steps == [256 * 48, "the NSA model is loaded", 256 * 48]
