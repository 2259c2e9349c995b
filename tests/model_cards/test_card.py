import json
import re
from pathlib import Path

import card_results as results
import pytest
import yaml

from nsa_hf.model_cards.card import CardError, render_card


def card_of(folder: Path) -> str:
    path = render_card(folder)
    assert path == folder / "README.md"
    return path.read_text()


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)", text, flags=re.MULTILINE)


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


def test_only_a_conversion(tmp_path):
    text = card_of(results.write(tmp_path))
    assert headings(text) == ["Made from"]
    assert pictures(tmp_path) == set()
    assert "![" not in text
    # nothing measured: no perplexity, no claim that it is exact
    for word in ("perplexity", "KL", "exact", "it is the dense model"):
        assert word not in text
    assert "It has not been trained since." in text
    assert f"| `tiny.gguf` | 123,456 bytes, sha256 `{'ab' * 32}` |" in text
    assert "| tensors | 1 of the source, unchanged; 1 new |" in text
    assert "`nsa_topk` 16" in text


def test_what_the_conversion_chose(tmp_path):
    choice = {"what": "blocks are scored by", "which": "channels, 32 of each head", "why": "near | to <dense>"}
    record = {
        **results.manifest(),
        "choices": {"selector": {**choice, "options": {}, "given": False, "hint": "of others"}},
    }
    config = {**results.config(), "nsa_selector": "channels", "nsa_selector_dim": 32, "nsa_compression": "none"}
    text = card_of(results.write(tmp_path, manifest=record, config=config))
    assert (
        "What the conversion chose:\n\n- blocks are scored by: channels, 32 of each head (near \\| to \\<dense\\>)"
        in text
    )
    assert "`nsa_selector` channels, `nsa_selector_dim` 32, `nsa_compression` none" in text
    assert "Every query reads 16 selected blocks of 64 tokens and a window of\n512." in text
    # what was measured on other models is no result of this one
    assert "of others" not in text
    text = card_of(results.write(tmp_path))
    assert "What the conversion chose" not in text and "Every query reads compressed blocks, 16 selected blocks" in text


def test_the_header_holds_what_is_known(tmp_path):
    header = yaml.safe_load(card_of(results.write(tmp_path)).split("---")[1])
    assert header["license"] == "apache-2.0"
    assert header["library_name"] == "transformers"
    assert "base_model" not in header
    source = {**results.manifest()["source"], "name": "owner/dense", "revision": "0123abc"}
    del source["license"]
    text = card_of(results.write(tmp_path, manifest={**results.manifest(), "source": source}))
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "owner/dense"
    assert "license" not in header
    assert "| license |" not in text
    assert "owner/dense, revision `0123abc`" in text


@pytest.mark.parametrize(
    ("name", "auto", "task"),
    [
        ("NsaLlamaForCausalLM", "AutoModelForCausalLM", "text-generation"),
        ("NsaLlamaForTokenClassification", "AutoModelForTokenClassification", "token-classification"),
    ],
)
def test_a_model_is_loaded_with_its_head(name, auto, task, tmp_path):
    text = card_of(results.write(tmp_path, config={**results.config(), "architectures": [name]}))
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == task
    assert f"import {auto}, AutoTokenizer" in text and f"model = {auto}.from_pretrained(" in text


def test_a_folder_that_was_saved_elsewhere_claims_nothing(tmp_path):
    """As Trainer, TRL and a merged adapter leave it: no manifest.json."""
    verify = {**results.verify(exact=None), "why": "not proved: 1 of 272 tensors are not the source's"}
    folder = results.write(tmp_path / "tuned", verify=verify)
    (folder / "manifest.json").unlink()
    with pytest.raises(CardError, match="is no converted model"):
        render_card(folder)
    (folder / "config.json").write_text(json.dumps({**results.config(), "model_type": "nsa_llama"}))
    text = card_of(folder)
    assert text.startswith("---\nlibrary_name: transformers") and "# tuned with Native Sparse Attention" in text
    assert "what it\nwas made from, and whether it was trained since, is not recorded" in text
    assert headings(text) == ["Settings", "What was kept"]
    assert "Exactness is not proved: 1 of 272 tensors are not the source's." in text
    for claim in ("has not been trained", "trained on", "it is the dense model", "does not apply", "| source |"):
        assert claim not in text


def test_the_bare_word_trained_makes_no_trained_model(tmp_path):
    text = card_of(results.write(tmp_path, manifest={**results.manifest(), "trained": True}))
    assert "It has not been trained since." in text


def test_a_card_that_somebody_wrote_or_edited_stays(tmp_path):
    card_of(results.write(tmp_path))
    card_of(tmp_path)
    path, ours = tmp_path / "README.md", (tmp_path / "README.md").read_text()
    trainer = "---\nlicense: mit\n---\n\n<!-- This model card has been generated automatically according to the "
    path.write_text(trainer + "information the Trainer had access to. You\nshould proofread it. -->")
    assert card_of(tmp_path) == ours
    for text in ("# Mine", ours.replace("It has not", "It HAS NOT"), ours + "\nmine\n"):
        path.write_text(text)
        with pytest.raises(CardError, match=r"README\.md was written, or edited, by hand.*--overwrite"):
            render_card(tmp_path)
        assert path.read_text() == text
        render_card(tmp_path, overwrite=True)
        assert path.read_text() == ours


def test_a_folder_on_disk_is_not_told(tmp_path):
    assert "on/a/disk" not in card_of(results.write(tmp_path))


def test_what_was_kept(tmp_path):
    text = card_of(results.write(tmp_path, verify=results.verify()))
    assert headings(text) == ["Made from", "What was kept"]
    assert "Up to 1,024 tokens it is the dense model" in text
    assert "271 of 272 of the source's tensors are kept" in text
    assert "8.50e-05" in text
    assert "| 1,024–2,048 | 2,048 | 7.250 | 7.375 | 3.12e-02 | 93.75% |" in text
    assert pictures(tmp_path) == {"perplexity.png"}
    assert "![Perplexity by position](perplexity.png)" in text


def test_a_failed_proof_is_told(tmp_path):
    text = card_of(results.write(tmp_path, verify=results.verify(exact=False)))
    assert "**Not exact: 1 of 272 tensors are not the source's.**" in text
    assert "it is the dense model" not in text


def test_a_trained_model_with_everything(tmp_path):
    folder = results.write(
        tmp_path,
        manifest=results.manifest(trained=True),
        verify=results.verify(exact=None),
        training=results.training(),
        inspection=results.inspection(),
        evaluation={"rows": [results.row(0, 1024, 9.75, 9.875)]},
        long=results.sample(),
        chat=results.sample(chat=True),
    )
    text = card_of(folder)
    sections = ["Made from", "Beside the dense source", "Training", "The same weights, dense and sparse"]
    assert headings(text) == [*sections, "What it attends to", "Samples"]
    assert "Exactness does not apply to a trained model." in text
    assert "it is the dense model" not in text
    assert (
        "| 1,024–2,048 | 8.000 | 8.500 | 8.250 | 8.125 | 6.25e-02 | 3.12e-02 | +6.25% ± 0.50% | +3.12% ± 0.25% |"
        in text
    )
    assert "| all | | | | | 3.15e-02 | 1.61e-02 | | |" in text
    assert "8 steps of 4,096 tokens" in text
    assert "0.1 next token + 1 KL" in text
    assert pictures(folder) == {"training.png", "perplexity.png", "selection.png", "gates.png"}
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == pictures(folder)
    assert text.count("12.2 tokens a second") == 2
    assert "After 1,500 tokens that end with" in text
    assert "    Paris is the capital of France." in text


def test_stages_are_told_one_after_another(tmp_path):
    training = results.training()
    usual = {"data": "stdlib", "ce_weight": 0.0, "kl_weight": 1.0, "lr_nsa": 0.0, "lr_backbone": 2e-5, "steps": 5}
    mixture = [{"length": 2048, "weight": 1}, {"length": 8192, "weight": 2}]
    stages = [
        {**usual, "trains": "nsa", "length": 2048, "tokens_per_step": 2048},
        {**usual, "trains": "lora", "length": mixture, "tokens_per_step": 32768, "layer_weight": 0.5, "data": [{}]},
    ]
    text = card_of(results.write(tmp_path, training={**training, "stages": stages, "warning": "worse than <before>"}))
    told = " ".join(text.split())
    assert r"**worse than \<before\>** Stage 1: 5 steps of 2,048 tokens of the Python standard library" in told
    assert "trained: the NSA parameters alone; loss = 1 KL to the dense teacher; AdamW, peak rates 0 (NSA" in told
    assert "Stage 2: 5 steps of 32,768 tokens of own text, windows of 2,048 and 8,192 tokens; trained: an" in told
    assert "loss = 1 KL to the dense teacher + 0.5 error of each attention's output; AdamW, peak rates 0" in told


def test_every_suite_of_an_evaluation_is_told(tmp_path):
    text = card_of(results.write(tmp_path, evaluation=results.evaluation()))
    assert "| 1,024–2,048 | 2,048 | 9.750 | 9.875 | +1.28% ± 0.11% |" in text
    assert "2,048 tokens of each of `a.txt`, `b.txt`, `c.txt` and 2 more; the rise" in text
    assert "dense and sparse alike: `ppl` with `yarn:2`." in text
    assert "| single | 8,192 | 100.00% | 66.67% |" in text and "finds less: 1 of 12" in text
    assert "| vt | 4,096 | 20 | 85.00% | 80.00% |" in text
    assert "| arc\\_easy | acc | 0.6125 | 0.6000 |" in text or "| arc_easy | acc | 0.6125 | 0.6000 |" in text
    assert pictures(tmp_path) == {"recall.png", "needle.png"}
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == pictures(tmp_path)


@pytest.mark.parametrize("left_out", ["verify", "training", "inspection", "long"])
def test_an_absent_result_is_an_absent_section(tmp_path, left_out):
    everything = {
        "verify": (results.verify(), "What was kept", "8.50e-05"),
        "training": (results.training(), "Training", "3.15e-02"),
        "inspection": (results.inspection(), "What it attends to", "selection.png"),
        "long": (results.sample(), "Samples", "tokens a second"),
    }
    folder = results.write(tmp_path, **{name: result for name, (result, _, _) in everything.items()})
    whole = card_of(folder)
    for _, heading, figure in everything.values():
        assert heading in headings(whole)
        assert figure in whole
    names = {"long": "generate-long", "inspection": "inspect"}
    (folder / f"{names.get(left_out, left_out)}.json").unlink()
    text = card_of(folder)
    _, heading, figure = everything.pop(left_out)
    assert heading not in headings(text)
    assert figure not in text
    for _, heading, figure in everything.values():
        assert heading in headings(text)
        assert figure in text
    # pictures of what is gone are gone
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == pictures(folder)


def test_every_number_comes_from_a_result(tmp_path):
    """Each number of the tables is one of the results', as printed."""
    text = card_of(results.write(tmp_path, verify=results.verify(), training=results.training()))
    cells = [cell.strip() for line in text.splitlines() if line.startswith("| ") for cell in line.split("|")]
    printed = {cell for cell in cells if re.fullmatch(r"[\d.,e%+-]*\d[\d.,e%+-]*", cell)}
    numbers: set[str] = set()
    held_out = results.training()["held_out"]
    rows = [*results.verify()["by_position"], *held_out["before"], *held_out["after"], *held_out["after_own_dense"]]
    for row in [*rows, {"kl": held_out["kl_before"]}, {"kl": held_out["kl_after"]}]:
        for value in row.values():
            numbers |= {f"{value:,.3f}", f"{value:.2e}", f"{value:.2%}", f"{value:,}"}
    assert len(printed) > 15
    assert printed <= numbers


def test_a_figure_that_was_not_measured_is_a_dash(tmp_path):
    verify = results.verify()
    verify["by_position"][2] = results.row(1024, 2048, None, None, None)
    text = card_of(results.write(tmp_path, verify=verify))
    assert "| 1,024–2,048 | 2,048 | – | – | – | 93.75% |" in text
    # a KL that is only rounding is told as such
    assert "| 0–512 | 1,024 | 10.125 | 10.125 | under 1e-07 | 93.75% |" in text
    assert "nan" not in text
    assert "None" not in text


def test_text_of_a_sample_cannot_break_the_card(tmp_path):
    text = card_of(results.write(tmp_path, long=results.sample(text="## Fake\n```\n| a |")))
    assert "Fake" not in headings(text)
    assert "    ## Fake\n    ```\n    | a |" in text


EVIL = "x`](javascript:alert) | y\n\n## Fake\n<img src=x onerror=alert(1)> **b** \u202e\x1b[31m"
SAFE = r"x\`\](javascript:alert) \| y ## Fake \<img src=x onerror=alert(1)\> \*\*b\*\* \[31m"


def test_what_a_source_says_cannot_break_the_card(tmp_path):
    """Licenses, names, revisions, versions and texts are others' words, wherever they stand."""
    source = {**results.manifest()["source"], "license": EVIL, "model_name": EVIL}
    source["files"] = {EVIL: {"bytes": 1, "sha256": EVIL}, "b": {"bytes": 1, "header_sha256": EVIL}}
    manifest = {**results.manifest(), "source": source, "versions": {"torch": EVIL}}
    verify = {**results.verify(exact=False), "why": EVIL, "computed_in": EVIL}
    verify["documents"] = [{"name": EVIL, "tokens": 1}]
    training = results.training()
    training["held_out"]["names"] = [EVIL]
    training["hardware"] = {"cpu": EVIL, "gpus": [EVIL]}
    training["versions"] = {EVIL: EVIL}
    folder = tmp_path / 'folder") ``` import os'
    text = card_of(
        results.write(
            folder,
            manifest=manifest,
            config={**results.config(), "nsa_topk": EVIL, "nsa_block_size": EVIL, "nsa_window_size": EVIL},
            verify=verify,
            training=training,
            inspection={**results.inspection(), "text": EVIL},
            long={**results.sample(), "dtype": EVIL, "device": "cuda", "hardware": {"cpu": EVIL, "gpus": [EVIL]}},
        )
    )
    assert "Fake" not in headings(text)
    assert {"Made from", "Training", "What it attends to", "Samples"} <= {*headings(text)}
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == EVIL
    body = body.replace(SAFE, "")
    for sign in ("javascript", "<img", "onerror", "**b", "\u202e", "\x1b"):
        assert sign not in body
    assert f"| license | {SAFE}, as the source says |" in text
    assert f"from_pretrained({json.dumps(folder.name)})" in text


def test_a_name_that_is_only_a_name_is_left_as_it_is(tmp_path):
    source = {**results.manifest()["source"], "model_name": "Smol_LM2-135M (Instruct), v1.0", "license": "cc-by-nc-4.0"}
    text = card_of(results.write(tmp_path, manifest={**results.manifest(), "source": source}))
    assert "# Smol_LM2-135M (Instruct), v1.0 with Native Sparse Attention" in text
    assert "| license | cc-by-nc-4.0, as the source says |" in text


@pytest.mark.parametrize(
    "change",
    [
        {"source": []},
        {"source": {"name": 7}},
        {"source": {"name": "x", "kind": "gguf", "files": {"a": {"bytes": "many", "sha256": ""}}}},
        {"source": {"name": "x", "kind": "gguf", "files": {"a": {"bytes": 1e400, "sha256": ""}}}},
        {"tensors": {"a": None}},
        {"versions": "none"},
    ],
)
def test_a_manifest_of_wrong_types_is_named_and_nothing_is_lost(tmp_path, change):
    folder = results.write(tmp_path, manifest={**results.manifest(), **change})
    for name in ("perplexity.png", "README.md"):
        (folder / name).write_text("mine")
    with pytest.raises(CardError, match="lacks what the card shows"):
        render_card(folder)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "config.json", "perplexity.png", "README.md"}


def test_another_tool_s_folder_loses_nothing(tmp_path):
    """A web project has a manifest.json and may have a config.json."""
    for name, text in (("manifest.json", '{"name": "App"}'), ("config.json", "{}"), ("gates.png", "mine")):
        (tmp_path / name).write_text(text)
    with pytest.raises(CardError, match="lacks what the card shows"):
        render_card(tmp_path)
    assert (tmp_path / "gates.png").read_text() == "mine"


def test_nothing_is_written_through_a_link(tmp_path):
    folder = results.write(tmp_path / "out", verify=results.verify())
    (tmp_path / "other").write_text("precious")
    for name in ("README.md", ".README.md.unfinished", "perplexity.png", "gates.png"):
        (folder / name).symlink_to(tmp_path / "other")
    with pytest.raises(CardError, match="by hand"):
        render_card(folder)
    render_card(folder, overwrite=True)
    assert (tmp_path / "other").read_text() == "precious"
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_depth_is_no_traceback(tmp_path):
    folder = results.write(tmp_path)
    (folder / "verify.json").write_text("[" * 5000)
    with pytest.raises(CardError, match=r"verify\.json is damaged"):
        render_card(folder)


def test_the_other_selector_stands_beside_the_models_own(tmp_path):
    verify = results.verify()
    rows = [{**row, "ppl": row["ppl"] + 1, "kl": 2 * row["kl"]} for row in verify["by_position"]]
    other = {"name": "compressed (mean)", "instead_of": "channels (32)", "by_position": rows}
    text = card_of(results.write(tmp_path / "with", verify={**verify, "other_selector": other}))
    assert "compressed (mean) in the place of channels (32):" in text
    assert "| 1,024–2,048 | 7.375 | 8.375 | 3.12e-02 | 6.25e-02 |" in text
    folder = results.write(tmp_path / "without", verify=verify)
    without = card_of(folder)  # written before there was a comparison
    assert "in the place of" not in without
    assert card_of(results.write(folder, verify={**verify, "other_selector": None})) == without


def test_made_twice_it_is_the_same(tmp_path):
    folder = results.write(tmp_path, verify=results.verify(), training=results.training())
    first = card_of(folder), {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert (card_of(folder), {path.name: path.read_bytes() for path in folder.glob("*.png")}) == first


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(CardError, match="is no converted model"):
        render_card(tmp_path)
    folder = results.write(tmp_path, verify=results.verify())
    (folder / "verify.json").write_text("{")
    with pytest.raises(CardError, match=r"verify.json is damaged"):
        render_card(folder)
    (folder / "verify.json").write_text("[]")
    with pytest.raises(CardError, match="expected an object, got list"):
        render_card(folder)
    (folder / "verify.json").write_text('{"exact": true}')
    with pytest.raises(CardError, match="lacks what the card shows"):
        render_card(folder)
    assert not (folder / "README.md").exists()
