"""recipes/benchmarks/selectors.py and converted.py on a tiny dense model."""

from __future__ import annotations

import csv
import json
import random
import sys

import pytest
import torch
from tiny_models import tiny_dense_model
from tiny_runs import WORDS
from transformers import AutoTokenizer

import nsa_hf
from nsa_hf.recipes.benchmarks import converted, selectors
from nsa_hf.recipes.benchmarks.converted import CONVERTED
from nsa_hf.recipes.benchmarks.selectors import ASKED, MEASURED, RAN, Study, Variant, mean_and_error

TOKENS = 1100


@pytest.fixture
def documents(tmp_path):
    """Three that are long enough, and one that is not."""
    texts = [" ".join(random.Random(seed).choices(WORDS, k=1000)) for seed in range(3)] + ["short"]
    path = tmp_path / "documents.json"
    path.write_text(json.dumps([{"name": str(index), "text": text} for index, text in enumerate(texts)]))
    return path


def test_a_run_writes_a_row_for_each_variant_and_range(documents, tiny_dense_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "selectors.csv"
    arguments = [str(tiny_dense_dir), str(documents), "--csv", str(out), "--tokens", str(TOKENS), "--single-layers"]
    monkeypatch.setattr(sys, "argv", ["selectors", *arguments, "--commit", "abc"])
    selectors.main()
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == (*ASKED, *MEASURED, *RAN)
        rows = list(reader)
    assert [(row["layers"], row["from"], row["to"]) for row in rows] == [
        (f"{layer}-{layer}", start, end) for layer in range(3) for start, end in (("0", "1024"), ("1024", "2048"))
    ]
    # the first document calibrates, the short one is left out
    assert {row["documents"] for row in rows} == {"2"} and {row["commit"] for row in rows} == {"abc"}
    # up to 16 blocks of 64 tokens every block is selected
    assert all(float(row["kl"]) == float(row["rise_percent"]) == 0 for row in rows if row["from"] == "0")
    assert all(float(row["rise_percent"]) != 0 for row in rows if row["from"] == "1024")
    assert "2 of 2 documents" in capsys.readouterr().out


def test_too_few_long_texts_are_an_error(documents, tiny_dense_dir, tmp_path, monkeypatch, capsys):
    arguments = [str(tiny_dense_dir), str(documents), "--csv", str(tmp_path / "out.csv"), "--tokens", str(TOKENS)]
    monkeypatch.setattr(sys, "argv", ["selectors", *arguments, "--most", "0"])
    with pytest.raises(SystemExit):
        selectors.main()
    assert f"two texts of {TOKENS} tokens or more (the first only calibrates), got 1:" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


@torch.no_grad()
def test_what_selects_every_block_is_dense():
    study = Study(tiny_dense_model())
    ids = torch.randint(256, (1, 200), generator=torch.Generator().manual_seed(0))
    study.calibrate(ids)
    assert set(study.energy) == {0, 1, 2}
    dense = study.hidden(ids, None)
    everything = Variant(channels=None, block_size=16, topk=13, rule="energy", bits=8, mean_query=True)
    torch.testing.assert_close(study.hidden(ids, everything), dense)
    few = study.hidden(ids, Variant(channels=4, block_size=16, topk=4, rule="energy"))
    torch.testing.assert_close(few[:64], dense[:64])
    assert (few[64:] - dense[64:]).abs().max() > 1e-3


def test_the_error_of_a_mean():
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    mean, error = mean_and_error([5.0])
    assert mean == 5.0 and error != error


def test_a_converted_model_is_measured_by_position(documents, tiny_dense_dir, tmp_path, capsys):
    out = tmp_path / "converted.csv"
    arguments = [str(tiny_dense_dir), str(documents), "--csv", str(out), "--tokens", str(TOKENS), "--commit", "abc"]
    converted.main([*arguments, "--option", "topk=8", "--option", "selector=channels"])
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == (*CONVERTED, *MEASURED, *RAN)
        rows = list(reader)
    assert [(row["from"], row["documents"], row["commit"]) for row in rows] == [("0", "2", "abc"), ("1024", "2", "abc")]
    assert [rows[0][name] for name in CONVERTED[2:]] == ["channels", "4", "8", "none", "64", "8", ""]
    assert "2 of 2 documents" in capsys.readouterr().out
    # by hand, of the second document, beyond what eight blocks hold
    model = nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense_dir, topk=8, selector="channels").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense_dir)
    texts = [document["text"] for document in json.loads(documents.read_text())][1:3]
    kl = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        with torch.no_grad():
            sparse = model(ids).logits[0, 1024 : TOKENS - 1].log_softmax(-1)
            with model.dense_attention():
                dense = model(ids).logits[0, 1024 : TOKENS - 1].log_softmax(-1)
        kl.append(float((dense.exp() * (dense - sparse)).sum(-1).mean()))
    assert float(rows[1]["kl"]) == pytest.approx(sum(kl) / 2, rel=0.02, abs=2e-5)
    assert sum(kl) > 0


def test_a_wrong_option_or_short_texts_are_errors(documents, tiny_dense_dir, tmp_path, capsys):
    arguments = [str(tiny_dense_dir), str(documents), "--csv", str(tmp_path / "out.csv"), "--tokens"]
    for more, message in (
        (["1100", "--option", "topk"], "NAME=VALUE, as in topk=24, got topk"),
        (["9999"], "9999 tok"),
    ):
        with pytest.raises(SystemExit):
            converted.main([*arguments, *more])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
