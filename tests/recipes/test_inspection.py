import json

import pytest
import torch
from rich.console import Console
from tiny_runs import converted

from nsa_hf.errors import NsaError
from nsa_hf.recipes.inspection import by_distance, inspect_model, pool, record_gates, render_inspection, selection_map


@pytest.fixture(scope="module")
def nsa_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    return converted(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes, dense_layers=[1])


def test_what_is_written(nsa_dir):
    result = inspect_model(nsa_dir, ("mine.txt", "some words and " * 40), 200)
    assert json.loads((nsa_dir / "inspect.json").read_text()) == result
    assert result["layers"] == [0, 2]
    assert result["text"] == "mine.txt"
    # an untrained model selects only: gates are 0, 1, 0
    assert result["gates"] == [[0.0, 1.0, 0.0]] * 2
    maps = torch.tensor(result["map"])
    # 200 tokens are 13 blocks of 16
    assert maps.shape == (2, 2, 13, 13)
    assert torch.equal(maps, maps.tril())
    # the first block and the query's own are forced
    assert (maps[..., 0] == 1).all()
    assert (maps.diagonal(dim1=-2, dim2=-1) == 1).all()
    # every query has 4 blocks, or all there are
    expected = torch.tensor([min(4, block + 1) for block in range(13)], dtype=torch.float)
    assert torch.allclose(maps.sum(-1), expected.expand(2, 2, 13), atol=5e-3)
    for distance in result["distance"]:
        # blocks 4 to 12 choose two blocks a query and head: 8 blocks of 16 queries, one of 8
        assert distance["selections"] == (8 * 16 + 8) * 2 * 2
        assert sum(distance["share"]) == pytest.approx(1, abs=1e-3)
        assert distance["from_blocks"] == [1, 2, 4, 8]


def test_a_branch_that_is_not_there_has_no_gate(tiny_dense_dir, tmp_path):
    out = converted(tiny_dense_dir, tmp_path / "out", {"topk": 4, "block_size": 16, "local_blocks": 1})
    result = inspect_model(out, ("mine.txt", "some words and " * 40), 200)
    assert result["branches"] == ["selected", "window"]
    assert result["gates"] == [[1.0, 0.0]] * 3
    console = Console(record=True, width=200)
    console.print(render_inspection(result))
    text = console.export_text()
    assert "window" in text and "compressed" not in text


def test_a_map_counts_by_hand():
    selection = torch.tensor([[[0, -1]], [[0, -1]], [[0, 1]], [[1, -1]], [[0, 2]]])
    expected = torch.tensor([[1.0, 0, 0], [0.5, 1.0, 0], [1.0, 0, 1.0]])
    assert torch.equal(selection_map(selection, 3, 2), expected[None])


def test_distances_by_hand(tiny_nsa_model):
    config = tiny_nsa_model().config
    # queries of block 6 (tokens 96-111); blocks 0 and 6 are forced
    selection = torch.full((112, 1, 4), -1)
    selection[96:] = torch.tensor([0, 2, 5, 6])
    assert by_distance(selection, config) == {"from_blocks": [1, 2, 4], "share": [0.5, 0.0, 0.5], "selections": 32}


def test_nothing_free_gives_no_shares(tiny_nsa_model):
    found = by_distance(torch.full((64, 1, 4), -1), tiny_nsa_model().config)
    assert found["selections"] == 0
    assert set(found["share"]) == {None}


def test_gates_are_means_of_what_the_model_uses(tiny_nsa_model):
    model = tiny_nsa_model(nsa_gate="sigmoid")
    seen = []
    gate = model.model.layers[1].self_attn.nsa.gate
    handle = gate.register_forward_hook(lambda module, inputs, output: seen.append(output.sigmoid()))
    with torch.no_grad(), record_gates(model) as gates:
        model(torch.arange(90)[None])
    handle.remove()
    assert sorted(gates) == [0, 1, 2]
    assert gates[1] == pytest.approx(seen[0].mean((0, 1, 2)).tolist(), rel=1e-5)
    assert not any(len(module._forward_hooks) for module in model.modules())


def test_pooling_averages():
    matrix = torch.arange(25.0).view(5, 5)
    pooled = pool(matrix, 3)
    assert pooled.shape == (3, 3)
    assert pooled[0, 0] == pytest.approx(matrix[:2, :2].mean().item())
    assert pooled[2, 2] == 24
    assert pool(matrix, 5) is matrix


def test_the_table_has_a_row_per_layer(nsa_dir):
    console = Console(width=120, record=True)
    console.print(render_inspection(inspect_model(nsa_dir, ("x", "abc " * 60), 128)))
    text = console.export_text()
    assert "4-7" in text
    assert [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")] == ["0", "2"]


def test_wrong_input_is_named(nsa_dir, tiny_dense_dir, tmp_path):
    for arguments, message in [
        ((nsa_dir, ("short.txt", "abc"), 100), "too short: short.txt"),
        ((tiny_dense_dir, ("a", "b" * 200), 100), r"dense model \(llama\): convert it first"),
        ((tmp_path, ("a", "b" * 200), 100), "holds no model"),
    ]:
        with pytest.raises(NsaError, match=message):
            inspect_model(*arguments)
