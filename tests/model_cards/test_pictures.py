import card_results as results
import numpy as np
import pytest
from matplotlib.image import imread

from nsa_hf.model_cards.pictures import (
    draw_layers,
    draw_pictures,
    gate_lines,
    layer_bars,
    needle_maps,
    percent_label,
    perplexity_by_position,
    selection_maps,
    spread,
    training_curve,
)


def test_everything_that_was_measured_is_drawn(tmp_path):
    evaluation = results.evaluation()["suites"]
    names = draw_pictures(tmp_path, results.training(), results.verify(), results.inspection(), evaluation)
    assert names == ["training.png", "perplexity.png", "selection.png", "gates.png", "recall.png", "needle.png"]
    for name in names:
        picture = imread(tmp_path / name)
        assert picture.shape[0] > 300
        assert picture.shape[1] > 700
        # something is drawn, on white
        assert 0.005 < (picture[..., :3] < 0.97).any(-1).mean() < 0.8
        assert (picture[0, 0, :3] == 1).all()


def test_nothing_measured_nothing_drawn_and_old_pictures_go(tmp_path):
    draw_pictures(tmp_path, results.training(), None, None)
    assert draw_pictures(tmp_path, None, None, None) == []
    assert list(tmp_path.iterdir()) == []


def test_the_curve_shows_the_measured_values():
    training = results.training()
    left, right = training_curve(training).axes
    assert left.lines[0].get_ydata() == pytest.approx([row["ce"] for row in training["curve"]])
    assert right.lines[0].get_ydata() == pytest.approx([row["kl"] for row in training["curve"]])
    assert [line.get_ydata()[0] for line in right.lines[1:]] == [0.0315, 0.0161]
    rated = [{**row, "lr_backbone": 1e-5, "lr_nsa": 0.0} for row in training["curve"]]
    figure = training_curve({**training, "curve": rated})
    figure.draw_without_rendering()
    *_, middle, rates = figure.axes
    assert [(line.get_label(), line.get_ydata()[0]) for line in rates.lines] == [("backbone", 1e-5)]
    for axes in (middle, rates):  # no legend lies over a line
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0


def test_layers_are_bars_and_those_worth_leaving_dense_stand_out(tmp_path):
    rows = [{"layer": layer, "kl": 0.01 * layer, "share": 0.1} for layer in (1, 3, 5)]
    measured = {
        "by_layer": rows,
        "dense_layers": {"layers": [5]},
        "documents": [{"name": "a", "tokens": 4096}],
        "exact_up_to": 1024,
    }
    (axes,) = layer_bars(measured).axes
    assert [bar.get_height() for bar in axes.patches] == [0.01, 0.03, 0.05]
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx([1, 3, 5])
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2
    assert "positions 1,024 to 4,096" in axes.get_title(loc="left")
    draw_layers(tmp_path / "layers.png", measured)
    assert imread(tmp_path / "layers.png").shape[0] > 300


def test_differences_are_percent_of_dense():
    dense = [results.row(0, 1024, 10.0, None), results.row(1024, 2048, 8.0, None)]
    figure = perplexity_by_position(dense, [("sparse", "red", [10.0, 8.4]), ("other", "blue", [None, 7.6])], "text")
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines[:2]] == [[10.0, 8.0], [10.0, 8.4]]
    heights = [bar.get_height() for bar in right.patches]
    np.testing.assert_allclose(heights, [0, 5, np.nan, -5], atol=1e-9)
    assert [text.get_text() for text in right.texts] == ["0", "+5.0", "", "-5.0"]


def test_maps_show_some_layers_and_no_future():
    figure = selection_maps(results.inspection(layers=30, heads=8))
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == 6 * 4
    assert [axes.get_title() for axes in maps[:6]] == [f"layer {i}" for i in (0, 6, 12, 17, 23, 29)]
    shown = maps[0].images[0].get_array()
    assert shown.mask[0, 1]
    assert not shown.mask[1, 0]
    assert shown[31, 0] == 1


def test_one_layer_and_one_head_are_enough():
    selection_maps(results.inspection(layers=1, heads=1))
    gate_lines(results.inspection(layers=1, heads=1))
    training_curve(results.training(steps=1))


def test_gates_by_branch():
    inspection = results.inspection()
    left, right = gate_lines(inspection).axes
    assert left.lines[0].get_ydata().tolist() == [row[1] for row in inspection["gates"]]
    assert [line.get_label() for line in right.lines[:2]] == ["compressed", "window"]


def test_gates_without_a_compressed_branch():
    inspection = results.inspection()
    inspection |= {"branches": ["selected", "window"], "gates": [row[1:] for row in inspection["gates"]]}
    left, right = gate_lines(inspection).axes
    assert left.lines[0].get_ydata().tolist() == [row[0] for row in inspection["gates"]]
    assert right.lines[0].get_ydata().tolist() == [row[1] for row in inspection["gates"]]
    assert [line.get_label() for line in right.lines[:1]] == ["window"]


def test_labels_of_differences():
    assert [percent_label(v) for v in (12.34, -1.25, 0.123, -0.006, 0.004, float("nan"))] == [
        "+12.3",
        "-1.2",
        "+0.12",
        "-0.01",
        "0",
        "",
    ]


def test_spread():
    assert spread(3, 6) == [0, 1, 2]
    assert spread(30, 6) == [0, 6, 12, 17, 23, 29]


def test_needles_are_shown_where_they_lie():
    maps = [axes.images[0].get_array() for axes in needle_maps(results.needles()).axes[:4]]
    assert [axes.tolist() for axes in maps] == [[[1, 1]] * 3, [[1, 1], [1, 1], [1, 0]], [[1, 1]] * 3, [[1, 1]] * 3]
