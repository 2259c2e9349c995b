"""A checkpoint of `nsa_format` 1, kept in `format_1/`: it loads, computes what it computed, and is saved as a new one.

`nsa-hf convert` wrote it at 0fb429c, the last commit of that format, of a random Llama. Then its new parameters were
drawn at random (the manifest's hashes are of before), and `modeling_nsa.py`, which is not needed here, was left out.
`expected.safetensors` has token ids and the logits which that commit gave for them.
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

OLD = Path(__file__).with_name("format_1")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(OLD / "expected.safetensors")


def test_it_gives_the_logits_that_it_gave(expected):
    assert json.loads((OLD / "config.json").read_text())["nsa_format"] == 1
    model, loaded = AutoModelForCausalLM.from_pretrained(OLD, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    ids = expected["ids"].long()
    with torch.no_grad():
        assert relative(model(ids).logits, expected["logits"]) < 1e-5
        for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=50)):
            assert relative(in_steps(model, ids, [30, 1, 1, 16], cache), expected["logits"]) < 1e-5
        with model.dense_attention():
            assert relative(model(ids).logits, expected["logits"]) > 0.1, "else this would show little"


def test_saved_again_it_is_of_the_newest_format(expected, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(OLD)
    model.save_pretrained(tmp_path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (OLD, tmp_path))
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"nsa_format", "transformers_version", "auto_map"} and after.keys() >= NSA_FIELDS.keys()
    assert after["auto_map"].items() > before["auto_map"].items(), "classes with other heads are named too"
    assert (after["nsa_format"], after["nsa_selector"], after["nsa_selector_bits"]) == (NSA_FORMAT, "compressed", 16)
    kept, saved = (load_file(folder / "model.safetensors") for folder in (OLD, tmp_path))
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in kept)
    assert AutoConfig.from_pretrained(tmp_path).nsa_selector == "compressed"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert relative(again(expected["ids"].long()).logits, expected["logits"]) < 1e-5
