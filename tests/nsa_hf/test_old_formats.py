"""Checkpoints that are kept: they load, compute what they computed, and are saved as the newest format.

`format_1` is of `nsa_format` 1. `nsa-hf convert` wrote it at 0fb429c, the last commit of that format, of a random
Llama. Of format 2, written at 0.2.0: `format_2` chooses blocks by channels in 8 bits, without a compressed branch, and
`format_2_paper` has everything else: compressed keys, keys and values per branch, half-open gates, a dense layer. The
new parameters of all were drawn at random afterwards (the manifests' hashes are of before), and `modeling_nsa.py`,
which is not needed here, was left out. `expected.safetensors` has token ids and the logits which that commit gave.

A change of the fields or of what they mean is a new format: one more folder here, and `NSA_FORMAT` rises.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from generation_steps import in_steps, relative
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from nsa_hf.fields import NSA_FIELDS, NSA_FORMAT

HERE = Path(__file__).parent
KEPT = {"format_1": 1, "format_2": 2, "format_2_paper": 2}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest) -> Path:
    return HERE / request.param


@pytest.fixture
def expected(kept: Path) -> dict[str, torch.Tensor]:
    return load_file(kept / "expected.safetensors")


def test_it_gives_the_logits_that_it_gave(kept, expected):
    assert config_of(kept)["nsa_format"] == KEPT[kept.name]
    model, loaded = AutoModelForCausalLM.from_pretrained(kept, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    ids = expected["ids"].long()
    with torch.no_grad():
        assert relative(model(ids).logits, expected["logits"]) < 1e-5
        for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=50)):
            assert relative(in_steps(model, ids, [30, 1, 1, 16], cache), expected["logits"]) < 1e-5
        with model.dense_attention():
            assert relative(model(ids).logits, expected["logits"]) > 0.1, "else this would show little"


def test_saved_again_it_is_of_the_newest_format(kept, expected, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(kept)
    model.save_pretrained(tmp_path)
    before, after = config_of(kept), config_of(tmp_path)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"nsa_format", "transformers_version", "auto_map"} and after.keys() >= NSA_FIELDS.keys()
    assert after["auto_map"].items() > before["auto_map"].items(), "classes with other heads are named too"
    assert after["nsa_format"] == NSA_FORMAT
    stored, saved = (load_file(folder / "model.safetensors") for folder in (kept, tmp_path))
    assert stored.keys() == saved.keys() and all(torch.equal(stored[name], saved[name]) for name in stored)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert relative(again(expected["ids"].long()).logits, expected["logits"]) < 1e-5


def test_format_1_is_what_its_fields_meant():
    config = AutoConfig.from_pretrained(HERE / "format_1")
    assert (config.nsa_selector, config.nsa_selector_bits) == ("compressed", 16)


def test_the_newest_format_has_the_fields_that_are_kept():
    """A field more, or one less, without a new format would be read wrongly by a released nsa_hf, and silently."""
    assert max(KEPT.values()) == NSA_FORMAT, "keep a checkpoint of the new format"
    for name in (name for name, number in KEPT.items() if number == NSA_FORMAT):
        fields = {field for field in config_of(HERE / name) if field.startswith("nsa_")}
        assert fields == NSA_FIELDS.keys(), "the fields have changed: NSA_FORMAT rises by one"
