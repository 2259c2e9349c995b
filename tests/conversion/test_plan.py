"""conversion/plan.py: what it says is what a conversion then does, and its formulas are what counting gives."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from gguf_file import write_gguf
from packaging.version import Version
from rich.console import Console
from tiny_families import tiny_config
from tiny_models import SELECTORS, tiny_dense_model
from transformers import AutoModelForCausalLM, StaticCache

import nsa_hf
from nsa_hf.conversion import convert, plan, render_plan
from nsa_hf.conversion.costs import PAPER, Scoring, pays_from, read_tokens, read_tokens_of_text
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.plan import training_hindrance
from nsa_hf.errors import NotPlain, NsaError
from nsa_hf.families import family_of, nsa_config_from_dense
from nsa_hf.kernels import Sizes
from nsa_hf.releases import CACHE, INSTALLED

SIZES = [
    Sizes(),
    Sizes(kernel_size=8, kernel_stride=4, block_size=16, topk=4, init_blocks=1, local_blocks=1, window_size=24),
    Sizes(kernel_size=4, kernel_stride=2, block_size=4, topk=3, window_size=100),
    Sizes(kernel_size=6, kernel_stride=3, block_size=12, topk=3, window_size=1),
]


def test_it_counts_what_a_conversion_writes(tiny_dense_dir, tiny_sizes, tmp_path):
    options = {**tiny_sizes, "dense_layers": [-1], "compression": "linear"}
    description = plan(tiny_dense_dir, **options)
    table = SafetensorsCheckpoint(convert(tiny_dense_dir, tmp_path / "out", **options)).table
    added = {name: torch.Size(info.shape).numel() for name, info in table.items() if ".nsa." in name}
    total = sum(torch.Size(info.shape).numel() for info in table.values())
    assert description["parameters"]["added"] == sum(added.values()) > 0
    assert description["parameters"]["dense"] == total - sum(added.values())
    assert description["bytes"]["nsa"] == sum(info.nbytes for info in table.values())
    for layer in description["layers"]:
        new = sum(count for name, count in added.items() if f".layers.{layer['layer']}." in name)
        assert layer["parameters_added"] == new
    assert [layer["becomes"] for layer in description["layers"]] == ["nsa", "nsa", "dense"]
    assert [layer["why"] for layer in description["layers"]] == [
        "full attention",
        "full attention",
        "named in nsa_dense_layers",
    ]
    assert description["exact_up_to"] == 64
    assert description["options"]["nsa_compression"] == "linear"


SHARED = [*SELECTORS.values(), {"nsa_selector": "channels", "nsa_selector_bits": 8}]
OF_EACH_BRANCH = [{"nsa_branch_kv": "independent"}, {"nsa_branch_kv": "independent", "nsa_selector": "channels"}]


@pytest.mark.parametrize(
    "kind, options",
    [*(("dynamic", options) for options in [*SHARED, *OF_EACH_BRANCH]), *(("static", options) for options in SHARED)],
    ids=str,
)
def test_cache_bytes_are_those_of_a_cache_that_was_filled(options, kind, tiny_dense_dir, tiny_sizes, tiny_nsa_model):
    """Keys, values, compressed entries, the index's keys, and what the branches keep besides."""
    model = tiny_nsa_model(nsa_dense_layers=[1], **options)
    row = plan(tiny_dense_dir, **{**tiny_sizes, **options}, dense_layers=[1], lengths=[99])["kv_cache"][0]
    cache = StaticCache(model.config, max_cache_len=99) if kind == "static" else None
    with torch.no_grad():
        cache = model(torch.arange(99)[None], use_cache=True, **{CACHE: cache})[CACHE]

    def nbytes(of) -> int:
        return sum(x.nbytes for x in vars(of).values() if isinstance(x, torch.Tensor) and x.dim())

    layer_bytes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert row["dense_bytes"] == sum(layer_bytes)
    assert row["nsa_bytes"] == sum(nbytes(layer) for layer in cache.layers)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_of_a_gguf_file_it_counts_what_the_converted_model_has(dtype, tiny_sizes, tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf")
    planned = plan(source, dtype=dtype, lengths=[99], **tiny_sizes)
    out = convert(source, tmp_path / "out", dtype=dtype, **tiny_sizes)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        cache = model(torch.arange(99)[None], use_cache=True)[CACHE]
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    assert planned["kv_cache"][0]["nsa_bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert planned["bytes"]["nsa"] == sum(parameter.nbytes for parameter in model.parameters())
    console = Console(file=io.StringIO(), width=200)
    console.print(render_plan(planned))
    said = (
        "whatever the file's bits: --dtype bfloat16 halves" if dtype is None else "gguf, float32, rounded to bfloat16"
    )
    assert said in console.file.getvalue() and f"one sequence, {dtype or 'float32'}" in console.file.getvalue()


def test_read_bytes_by_hand():
    # The specification's count for 64k: 4095 compressed, 1024 selected, 512 in the window.
    assert read_tokens(Sizes(), 65536) == 5631
    assert read_tokens(Sizes(), 100) == 100 + 100 + 5
    assert read_tokens(Sizes(), 31) == 31 + 31


def test_read_bytes_of_a_model(tiny_dense_dir):
    options = {"dtype": "bfloat16", "selector": "compressed", "dense_layers": [0]}
    row = plan(tiny_dense_dir, **options, lengths=[65536])["kv_cache"][0]
    entry = 2 * 2 * 8 * 2  # K and V, two heads of 8, two bytes
    assert row["dense_read_bytes"] == row["dense_bytes"] == 3 * 65536 * entry
    assert row["nsa_read_bytes"] == (65536 + 2 * 5631) * entry
    assert row["read_less"] == pytest.approx(3 * 65536 / (65536 + 2 * 5631))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compression, bits", [("none", 16), ("mlp", 16), ("none", 8), ("mlp", 8)])
def test_read_bytes_of_a_model_that_chooses_by_channels(tiny_dense_dir, tiny_sizes, compression, bits, dtype):
    options = {**tiny_sizes, "nsa_selector": "channels", "compression": compression, "selector_bits": bits}
    row = plan(tiny_dense_dir, **options, dtype=dtype, lengths=[99])["kv_cache"][0]
    size = 4 if dtype == "float32" else 2
    # 64 selected tokens, 24 in the window, 23 entries: K and V of 8 numbers; 4 of 8 channels of all 99 keys
    read = (64 + 24 + (0 if compression == "none" else 23)) * 2 * 8 * size
    read += 99 * (4 + 2 if bits == 8 else 4 * size)
    assert row["nsa_read_bytes"] == 3 * 2 * read  # layers and heads
    assert row["read_less"] == row["dense_read_bytes"] / row["nsa_read_bytes"]


@pytest.mark.parametrize("scoring", [PAPER, Scoring(False, 0.25), Scoring(True, 0.125)], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_pays_from_equals_counting(sizes, scoring):
    pays = pays_from(sizes, scoring)
    top = 3 * pays["whole_text"]
    read = [read_tokens(sizes, length, scoring) for length in range(1, top + 1)]
    gains = [length for length in range(1, top + 1) if length > read[length - 1]]
    # with an index and entries, which come by steps, a length may pay and the next one not
    assert gains[-(top + 1 - pays["one_token"]) :] == list(range(pays["one_token"], top + 1))
    assert pays["one_token"] - 1 not in gains
    totals = [sum(read[:length]) for length in (1, 7, sizes.window_size, sizes.exact_tokens + 1, top)]
    for length, total in zip((1, 7, sizes.window_size, sizes.exact_tokens + 1, top), totals, strict=True):
        assert read_tokens_of_text(sizes, length, scoring) == total
    balance, pays_text = 0, []
    for length in range(1, top + 1):
        balance += length - read[length - 1]
        pays_text += [length] if balance > 0 else []
    assert pays_text == list(range(pays["whole_text"], top + 1))


def test_with_a_stride_of_one_it_never_pays():
    pays = pays_from(Sizes(kernel_stride=1))
    assert pays["one_token"] is pays["whole_text"] is None
    assert all(read_tokens(Sizes(kernel_stride=1), length) >= length for length in (1, 1000, 100_000))


def test_no_weights_are_loaded(tiny_dense_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(SafetensorsCheckpoint, "tensors", lambda self: pytest.fail("weights were read"))
    monkeypatch.setattr(SafetensorsCheckpoint, "read", lambda self, name: pytest.fail("weights were read"))
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert plan(tiny_dense_dir)["parameters"]["dense"] > 0


def test_what_would_not_convert_is_refused_here_already(tiny_dense_dir, tmp_path):
    with pytest.raises(nsa_hf.NsaError, match="nsa_kernel_stride"):
        plan(tiny_dense_dir, kernel_stride=5)
    spoiled = shutil.copytree(tiny_dense_dir, tmp_path / "spoiled")
    config = json.loads((spoiled / "config.json").read_text())
    (spoiled / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(NsaError, match="missing tensors"):
        plan(spoiled)


def test_what_cannot_be_trained_is_said(tmp_path):
    dense = tiny_dense_model(attention_dropout=0.1)
    dense.save_pretrained(tmp_path / "dense")
    description = plan(tmp_path / "dense")
    hindrance = "attention_dropout is 0.1, and sparse attention has no dropout: set it to 0"
    assert description["training"].startswith(hindrance)
    console = Console(file=io.StringIO(), width=200)
    console.print(render_plan(description))
    assert "refused: attention_dropout is 0.1" in console.file.getvalue()


@pytest.mark.parametrize("family", ["llama", "gptj", "ernie4_5", "lfm2", "ctrl", "gpt_neox", "nanochat"])
def test_every_name_of_attention_dropout_is_known(family):
    """What a layer of the family would drop, whatever its config calls that."""
    config = tiny_config(family)
    for name in ("attention_dropout", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.125)
    if family == "gptj" and Version("5.24") > INSTALLED:
        with pytest.raises(NotPlain, match="does not go through Transformers' attention interface"):
            nsa_config_from_dense(config)
        return
    config = nsa_config_from_dense(config)
    with torch.device("meta"):
        model = family_of(config).causal_lm_class(config)
    layers = [module for module in model.modules() if getattr(module, "nsa", None) is not None]
    dropped = {getattr(layer, "attention_dropout", 0.0) for layer in layers}
    shares = {getattr(share, "p", share) for share in dropped}
    assert shares == ({0.125} if training_hindrance(config) else {0.0})


def test_it_is_json_and_renders(tiny_dense_dir):
    description = plan(tiny_dense_dir, selector="compressed", dense_layers=[1], dtype="bfloat16")
    assert description["training"] is None
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    console = Console(file=io.StringIO(), width=100)
    console.print(render_plan(description))
    text = console.file.getvalue()
    for part in ("1,024 tokens", "rounded to bfloat16", "named in nsa_dense_layers", "65,536", "1,638 tokens"):
        assert part in text
    console.print(render_plan(plan(tiny_dense_dir, gate="sigmoid", kernel_stride=1)))
    assert "nowhere: nsa_gate=sigmoid" in console.file.getvalue()
    assert "no length" in console.file.getvalue()
