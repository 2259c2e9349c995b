import csv
import json

import pytest

from nsa_hf.recipes.benchmarks.adaptation import main, told_settings


def row(start, end, *, kl, rise, error=0.001):
    return {
        "from": start,
        "to": end,
        "ppl_reference": 10.0,
        "ppl": 10.0 * (1 + rise),
        "rise": rise,
        "rise_error": error,
        "kl": kl,
        "same_top1": 0.98,
    }


def record(steps, **settings):
    """What training.json says of a run, as far as the table reads it."""
    return {
        "hardware": {"gpus": ["A GPU", "A GPU"], "cpu": "a CPU"},
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
        "processes": 1,
        "config": {"model": "m", "out": "o", "lr_backbone": 2e-5, "kl_weight": 1.0, "stages": [], **settings},
        "stages": [{"steps": steps, "tokens_per_step": 1000}],
        "curve": [{"seconds": 0.5, "tokens_per_second": 2000.0 + step} for step in range(steps)],
        "held_out": {
            "names": ["a", "b"],
            "before": [row(0, 1024, kl=0.0, rise=0.0), row(1024, 2048, kl=0.02, rise=0.01)],
            "after": [row(0, 1024, kl=0.001, rise=-0.0005), row(1024, 2048, kl=0.01, rise=0.002, error=None)],
            "after_own_dense": [row(0, 1024, kl=0.0, rise=0.0), row(1024, 2048, kl=0.01, rise=0.0)],
        },
    }


def test_a_run_gives_a_row_for_each_range_of_positions(tmp_path):
    folder = tmp_path / "adapt-3k"
    folder.mkdir()
    (folder / "training.json").write_text(json.dumps(record(3, lr_backbone=5e-5)))
    main(["--csv", str(tmp_path / "a.csv"), "--commit", "abc", str(folder)])
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [(r["run"], r["from"], r["to"], r["tokens"], r["documents"]) for r in rows] == [
        ("adapt-3k", "0", "1024", "3000", "2"),
        ("adapt-3k", "1024", "2048", "3000", "2"),
    ]
    assert rows[1]["rise_after_pct"] == "0.200"
    assert rows[1]["rise_after_error_pct"] == ""
    assert rows[1]["tokens_per_second"] == "2001"
    assert rows[1]["gpus"] == "A GPU"
    assert rows[1]["settings"] == "lr_backbone=5e-05"
    assert (rows[1]["memory_gib"], rows[1]["mfu"]) == ("", "")
    assert rows[1]["commit"] == "abc"


def test_all_settings_of_a_run_of_stages():
    stages = [{"tokens": 5, "selector_weight": 1.0}, {"tokens": 7, "lr_backbone": 2e-5}]
    config = {"model": "m", "held_out_documents": 64, "mixed_precision": "bf16", "tokens": 5, "stages": stages}
    assert told_settings(config) == (
        "held_out_documents=64 mixed_precision=bf16 | tokens=5 selector_weight=1.0 | tokens=7"
    )


def test_a_picture_of_a_series(tmp_path):
    for steps in (1, 3):
        (tmp_path / f"adapt-{steps}.json").write_text(json.dumps(record(steps)))
    runs = [str(tmp_path / f"adapt-{steps}.json") for steps in (1, 3)]
    main(["--csv", str(tmp_path / "a.csv"), "--picture", str(tmp_path / "a.png"), "--curve", "adapt-", *runs])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_folder_without_a_finished_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--csv", str(tmp_path / "a.csv"), str(tmp_path)])
    assert "no record of a finished run" in capsys.readouterr().err
