"""conversion/choices.py: what was chosen, in a plan, in the manifest and in lines; and what `convert` makes of it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from tiny_families import SIZES, tiny_dense
from tiny_models import tiny_dense_model

import nsa_hf
from nsa_hf.conversion import convert, manifest, plan, render_plan, verify
from nsa_hf.conversion.choices import lines_of
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.errors import NsaError
from nsa_hf.families import initial_nsa_state

LENGTH = 65_536
KEY_VALUE = 2 * 2 * 8 * 4  # bytes of a key and a value of two heads of 8, float32
NAMES = ["selector", "compression", "blocks", "dense_layers"]


@pytest.fixture(scope="module")
def converted(tiny_dense_dir, tmp_path_factory):
    """Nothing was asked for."""
    return convert(tiny_dense_dir, tmp_path_factory.mktemp("chosen") / "out")


def test_the_plan_the_manifest_and_the_config_say_the_same(converted, tiny_dense_dir):
    choices = manifest.read(converted)["choices"]
    assert choices == plan(tiny_dense_dir)["choices"] and list(choices) == NAMES
    config = json.loads((converted / "config.json").read_text())
    options = {name: value for record in choices.values() for name, value in record["options"].items()}
    assert options == {
        "nsa_selector": "channels",
        "nsa_selector_dim": 4,
        "nsa_selector_bits": 8,
        "nsa_compression": "none",
        "nsa_topk": 16,
        "nsa_block_size": 64,
        "nsa_dense_layers": [],
    }
    assert options.items() <= config.items()
    assert not any(record["given"] for record in choices.values())
    # what was asked for is told apart from what was chosen
    assert manifest.read(converted)["options"] == {"dtype": None, "max_shard_size": "2GB", "seed": 0}


def test_the_result_is_exact_and_has_no_compressor(converted, tiny_dense_dir):
    assert verify(tiny_dense_dir, converted, length=1100, documents=1)["exact"] is True
    new = {name.split(".nsa.")[1] for name in SafetensorsCheckpoint(converted).table if ".nsa." in name}
    assert new == {"gate.up.weight", "gate.up.bias", "gate.down.weight", "gate.down.bias"}


def test_lines_say_what_and_why(converted):
    lines = list(lines_of(manifest.read(converted)["choices"]))
    nearer = "starts much nearer to the dense model than compressed keys"
    assert lines == [
        f"blocks are scored by: channels, 4 of each head in 8 bits ({nearer})",
        "compressed branch: none (blocks are chosen without it: nothing to keep, read and train)",
        "selected blocks: 16 of 64 tokens (the paper's)",
        "layers left dense: none (leaving the first ones dense gains little)",
    ]


def test_16_bits_where_they_are_asked_for(tiny_dense_dir):
    record = plan(tiny_dense_dir, selector_bits=16)["choices"]["selector"]
    assert record["which"] == "channels, 4 of each head"
    assert record["why"] == "nsa_selector_bits=16 is for blocks that an index scores"
    asked = plan(tiny_dense_dir, selector="channels", selector_dim=2)["choices"]["selector"]
    assert asked["which"] == "channels, 2 of each head in 8 bits"


def test_costs_by_hand(tiny_dense_dir):
    def costs(**options):
        choices = plan(tiny_dense_dir, **options)["choices"]
        assert {record["cost"]["length"] for record in choices.values()} == {LENGTH}
        return {name: record["cost"] for name, record in choices.items()}

    channels = costs(dense_layers=[0], selector_bits=16)
    # two sparse layers; an index is half of the keys, a quarter of keys and values
    assert channels["selector"]["read_bytes"] == channels["selector"]["kept_bytes"] == 2 * LENGTH * KEY_VALUE // 4
    # half of a head's 8 channels, a byte each and a scale of two
    assert costs()["selector"]["kept_bytes"] == 3 * LENGTH * 2 * (4 + 2)
    assert channels["compression"]["kept_bytes"] == channels["compression"]["read_bytes"] == 0
    assert channels["blocks"]["read_bytes"] == 2 * 1024 * KEY_VALUE
    assert channels["dense_layers"]["read_bytes"] == LENGTH * KEY_VALUE
    paper = costs(selector="compressed")
    assert paper["selector"] == {"length": LENGTH, "kept_bytes": 0, "read_bytes": 0}
    assert paper["compression"]["kept_bytes"] == paper["compression"]["read_bytes"] == 3 * 4095 * KEY_VALUE
    assert costs(dense_layers=[0, 1, 2])["dense_layers"]["read_bytes"] == 3 * LENGTH * KEY_VALUE


@pytest.mark.parametrize(
    "options", [{}, {"selector_bits": 16}, {"selector": "compressed"}, {"selector_dim": 2}, {"dense_layers": [1]}]
)
def test_costs_of_choices_are_those_of_the_cache(options, tiny_dense_dir):
    said = plan(tiny_dense_dir, **options, lengths=[LENGTH])
    (cache,) = said["kv_cache"]
    costs = [record["cost"] for record in said["choices"].values()]
    assert sum(cost["kept_bytes"] for cost in costs) == cache["nsa_bytes"] - cache["dense_bytes"]
    sparse = sum(layer["becomes"] == "nsa" for layer in said["layers"])
    window = sparse * 512 * KEY_VALUE
    assert sum(cost["read_bytes"] for cost in costs) + window == cache["nsa_read_bytes"]


def test_asked_for_by_name_it_is_the_papers_and_what_the_class_has_by_itself(tiny_dense_dir, tmp_path):
    out = convert(tiny_dense_dir, tmp_path / "out", selector="compressed")
    config = nsa_hf.NsaLlamaConfig.from_pretrained(out)
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("nsa_")}
    assert nsa_hf.NsaLlamaConfig(**fields).to_dict() == config.to_dict()
    written = dict(SafetensorsCheckpoint(out).tensors())
    initial = dict(initial_nsa_state(nsa_hf.NsaLlamaConfig(**fields)))
    assert {name for name in written if ".nsa." in name} == initial.keys()
    assert all(written[name].equal(value) for name, value in initial.items())
    assert {"compress_k", "compress_v", "gate"} == {name.split(".nsa.")[1].split(".")[0] for name in initial}
    choices = manifest.read(out)["choices"]
    assert choices["selector"]["given"] and choices["selector"]["why"] == "asked for"
    assert choices["compression"]["which"] == "mlp"


def test_a_family_whose_channels_cannot_be_found(tmp_path):
    tiny_dense("ctrl").save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="nsa_selector is compressed: which channels RoPE turns slowest could not"):
        out = convert(tmp_path / "dense", tmp_path / "out")
    record = manifest.read(out)["choices"]["selector"]
    assert (record["which"], record["given"]) == ("compressed", False)
    assert "could not be found, so blocks are chosen as in the paper: " in record["why"]
    with pytest.raises(NsaError, match="is not turned together with one other channel"):
        convert(tmp_path / "dense", tmp_path / "other", selector="channels")
    assert not (tmp_path / "other").exists()


def test_a_scaled_source_is_looked_at_as_it_is_scaled(tmp_path, monkeypatch):
    tiny_dense_model().save_pretrained(tmp_path / "dense")
    seen = []
    look = nsa_hf.recommend.slowest_channels
    monkeypatch.setattr(
        "nsa_hf.recommend.slowest_channels", lambda config, count: seen.append(config) or look(config, count)
    )
    plan(tmp_path / "dense", rope_scaling="yarn:4")
    assert [config.rope_parameters["rope_type"] for config in seen] == ["yarn"], "once, and scaled"


def test_a_plan_shows_choices_reasons_and_costs(tiny_dense_dir):
    console = Console(file=io.StringIO(), width=120)
    console.print(render_plan(plan(tiny_dense_dir, kernel_size=16)))
    console.print(render_plan(plan(tiny_dense_dir)))
    text = " ".join(console.file.getvalue().replace("│", " ").split())
    for part in ("compressed branch", "belongs to the paper's way", "channels, 4 of each head", "16 of 64 tokens"):
        assert part in text
    assert "reads 2.36 MB per token" in text and "SmolLM2-135M" in text


def test_a_manifest_without_choices_loads(converted, tmp_path):
    record = json.loads((converted / "manifest.json").read_text())
    del record["choices"]
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    assert "choices" not in manifest.read(tmp_path)
    for wrong in ([], {"selector": "channels"}, {"selector": {"what": "x", "which": "y"}}):
        (tmp_path / "manifest.json").write_text(json.dumps({**record, "choices": wrong}))
        with pytest.raises(NsaError, match="is damaged"):
            manifest.read(tmp_path)


def test_training_keeps_what_was_chosen(converted):
    record = manifest.read(converted)
    trained = manifest.build_trained(converted, converted, record, [], {"steps": 1, "fingerprint": {"a": 1}})
    assert trained["choices"] == record["choices"]


def test_sizes_of_the_tests_mean_the_papers_way_by_name(tiny_sizes):
    assert tiny_sizes["nsa_selector"] == SIZES["nsa_selector"] == "compressed"
