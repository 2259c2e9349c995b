"""docs/measured.md holds what the CSV files in recipes/results hold, and nothing else.

`python tests/repo/test_measured.py` prints its tables, to be put there after a new measurement.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "results"
MEASURED = ROOT / "docs" / "measured.md"
SHAPES = ("64:4:128", "32:8:128", "16:8:128", "9:3:64", "64:4:192/128")
DECODED = SHAPES[:2]
SHORTEST, LONGEST = 8192, 131072
OPERATION, LENGTHS, SPARSE = "operation-h100-2026-11-27", (8192, 16384, 65536, 131072), ("nsa", "nsa-index")
# The runs of the decoding benchmark that the tables are of.
BY_LENGTH, FULL_CARD, FULLEST_CARD = "eeac3ac3", "8ea8ff7b", "dc590777"
PLAIN, OWN_WINDOW = "nsa", "nsa-independent"

Row = dict[str, str]


def rows_of(name: str, **wanted: object) -> list[Row]:
    """The rows of a CSV file in recipes/results whose columns have the wanted values."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == str(value) for key, value in wanted.items())]


def the_row(name: str, **wanted: object) -> Row:
    """The one row of a CSV file with these values."""
    (row,) = rows_of(name, **wanted)
    return row


def cut(number: float) -> str:
    """Two decimals, cut and not rounded: a ratio is never said to be more than it was."""
    return f"{int(number * 100) / 100:.2f}"


def table(columns: str, lines: list[list[object]]) -> str:
    """A Markdown table: the first column as text, the others to the right."""
    names = columns.split(", ")
    head = [names, ["---", *["---:"] * (len(names) - 1)]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [*head, *lines])


def operation(part: str) -> str:
    """One pass of the operation, blocks chosen as in the paper and by an index, beside PyTorch's attentions."""
    lines: list[list[object]] = []
    for shape in SHAPES:
        for tokens in LENGTHS:
            rows = rows_of(OPERATION, config=shape, tokens=tokens, inputs="random", part=part)
            found = {row["system"]: row for row in rows}
            times = {system: float(row["median_ms"]) for system, row in found.items()}
            line: list[object] = [shape, f"{tokens:,}", *(f"{times[system]:.2f}" for system in SPARSE)]
            for other in ("fa2", "cudnn"):
                line += [f"{times[other]:.2f}", *(cut(times[other] / times[system]) for system in SPARSE)]
            if part == "backward":
                line += [f"{int(found[system]['peak_mib']):,}" for system in (*SPARSE, "fa2", "cudnn")]
            lines.append(line)
    columns = "shape, tokens, NSA ms, by an index, FA-2 ms, times, by an index, cuDNN ms, times, by an index"
    return table(columns + (", NSA MiB, by an index, FA-2, cuDNN" if part == "backward" else ""), lines)


def operation_parts() -> str:
    """What the operation's parts take, and how much of that the card needs at least."""
    rows = rows_of(OPERATION, tokens=65536, inputs="random")
    parts = [row for row in rows if row["system"] in SPARSE and row["floor_ms"] and " + backward" not in row["part"]]
    cells = {(row["part"], row["config"]): row for row in parts}
    lines: list[list[object]] = []
    for name in dict.fromkeys(row["part"] for row in parts if row["part"] not in ("forward", "backward")):
        line: list[object] = [name]
        for shape in SHAPES:
            row = cells[name, shape]
            line += [f"{float(row['median_ms']):.2f}", f"{100 * float(row['share_of_card']):.0f} %"]
        lines.append(line)
    return table("part, " + ", ".join(f"{shape} ms, least" for shape in SHAPES), lines)


def short_texts() -> str:
    """Both passes where people start: as a share of FlashAttention-2's time, with the host and without."""
    lines: list[list[object]] = []
    for shape in SHAPES:
        rows = rows_of(OPERATION, config=shape, tokens=SHORTEST, inputs="random")
        times = {(row["system"], row["part"]): float(row["median_ms"]) for row in rows}
        both = {system: sum(times[system, part] for part in ("forward", "backward")) for system in (*SPARSE, "fa2")}
        line: list[object] = [shape]
        for system in SPARSE:
            own = times.get((system, "forward + backward, kernels"))
            line += [f"{both[system]:.2f}", f"{both[system] / both['fa2']:.2f}", f"{own:.2f}" if own else ""]
        lines.append([*line, f"{both['fa2']:.2f}"])
    systems = ", ".join(f"{name} ms, of FA-2's, kernels alone ms" for name in ("NSA", "by an index"))
    return table(f"shape, {systems}, FA-2 ms", lines)


def training_steps() -> str:
    """A whole training step, sparse beside dense, and what its time goes into."""
    names = {"llama": "1B", "qwen3": "0.6B"}
    lines: list[list[object]] = []
    for row in rows_of("training-h100-2026-11-27"):
        line: list[object] = [f"{names[row['model'].partition(':')[0]]}, {row['config']}", f"{int(row['tokens']):,}"]
        line += [row["system"], f"{int(row['tokens_per_s']):,}", row["times_dense"], row["mfu"]]
        line.append(f"{int(row['peak_mib']):,}")
        lines.append([*line, *(row[part] for part in ("attention_ms", "products_ms", "optimizer_ms", "rest_ms"))])
    parts = "attention ms, products ms, optimizer ms, rest ms"
    return table(f"model, tokens, system, tokens a second, times dense, MFU, MiB, {parts}", lines)


def full_batch(shape: str, tokens: int, gib: int) -> int:
    """How many rows have so many GiB of keys and values in bfloat16."""
    _, kv_heads, dim = map(int, shape.split(":"))
    return (gib << 30) // (tokens * kv_heads * dim * 2 * 2)


def decoding_row(run: str, shape: str, tokens: int, batch: int, system: str = PLAIN) -> Row:
    return the_row(
        "decode-h100-2026-11-23", run_id=run, config=shape, tokens=tokens, batch=batch, queries=1, system=system
    )


def decoding_by_length() -> str:
    """4 GiB of keys and values, and a single row."""
    lines: list[list[object]] = []
    for tokens in (SHORTEST, 16384, 32768, 65536, LONGEST):
        line: list[object] = [f"{tokens:,}"]
        for shape in DECODED:
            for batch in (full_batch(shape, tokens, 4), 1):
                row = decoding_row(BY_LENGTH, shape, tokens, batch)
                line += [f"{float(row['median_ms']):.3f}", row["times_dense"]]
        lines.append([*line, row["ceiling"]])
    shapes = [f"{shape}{rows} ms, times" for shape in DECODED for rows in ("", " one row")]
    return table(f"tokens, {', '.join(shapes)}, by bytes", lines)


def decoding_full() -> str:
    """32 GiB of keys and values; the window shares them, or has its own."""
    lines: list[list[object]] = []
    for shape in DECODED:
        for system in (PLAIN, OWN_WINDOW):
            for tokens in (SHORTEST, LONGEST):
                row = decoding_row(FULL_CARD, shape, tokens, full_batch(shape, tokens, 32), system)
                time = f"{float(row['median_ms']):.3f}"
                lines.append([shape, system, f"{tokens:,}", row["batch"], time, row["times_dense"], row["ceiling"]])
    return table("shape, system, tokens, rows, ms, times dense, by bytes", lines)


def growth() -> str:
    """How much more a token costs at the longest length than at the shortest."""
    lines: list[list[object]] = []
    for label, run, gib, systems in (
        ("4 GiB", BY_LENGTH, 4, (PLAIN,)),
        ("32 GiB", FULL_CARD, 32, (PLAIN, OWN_WINDOW)),
        ("56 GiB", FULLEST_CARD, 56, (PLAIN, OWN_WINDOW)),
        ("one row", BY_LENGTH, 0, (PLAIN,)),
    ):
        for shape in DECODED:
            places = [(tokens, full_batch(shape, tokens, gib) or 1) for tokens in (SHORTEST, LONGEST)]
            for system in systems:
                ends = [decoding_row(run, shape, *place, system) for place in places]
                ours, paper, once = (ratio_a_row(ends, column) for column in ("median_ms", "bytes", "bytes_once"))
                dense = [fastest_dense(run, shape, *place) for place in places]
                line = [f"{label}, {shape}", system, f"{ours:.2f}", f"{ratio_a_row(dense, 'median_ms'):.2f}"]
                lines.append([*line, f"{paper:.2f}", f"{once:.2f}"])
    return table("keys and values, system, time, fastest dense, bytes by the paper, bytes as read", lines)


def fastest_dense(run: str, shape: str, tokens: int, batch: int) -> Row:
    rows = rows_of("decode-h100-2026-11-23", run_id=run, config=shape, tokens=tokens, batch=batch, queries=1)
    return min((row for row in rows if not row["system"].startswith("nsa")), key=lambda row: float(row["median_ms"]))


def ratio_a_row(ends: list[Row], column: str) -> float:
    first, last = (float(row[column]) / int(row["batch"]) for row in ends)
    return last / first


def index_decoding() -> str:
    """Steps where blocks are chosen by an index, whose keys have 16 or 8 bits."""
    lines: list[list[object]] = []
    for shape in (*DECODED, "9:3:64"):
        for tokens in (SHORTEST, 65536, LONGEST):
            line: list[object] = [shape, f"{tokens:,}"]
            for batch in (full_batch(shape, tokens, 4), 1):
                for system in ("nsa-index", "nsa-index8"):
                    row = the_row(
                        "decode-index-h100-2026-11-26", config=shape, tokens=tokens, batch=batch, system=system
                    )
                    line += [f"{float(row['median_ms']):.3f}", row["times_dense"]]
            lines.append(line)
    columns = [f"{bits} bits{rows} ms, times" for rows in ("", " one row") for bits in (16, 8)]
    return table(f"shape, tokens, {', '.join(columns)}", lines)


def first_token() -> str:
    """A whole model's time to the first token."""
    lines: list[list[object]] = []
    for row in rows_of("generate-h100-2026-11-23", phase="first-token"):
        seconds = f"{float(row['median_ms']) / 1000:.2f}"
        lines.append(
            [row["system"], f"{int(row['tokens']):,}", seconds, row["times_dense"], f"{int(row['peak_mib']):,}"]
        )
    return table("system, tokens, s, times dense, MiB", lines)


def whole_model_steps() -> str:
    """A whole model's steps, each system's latest run."""
    latest = {row["system"]: row for row in rows_of("generate-h100-2026-11-23", phase="decode")}
    lines: list[list[object]] = [
        [name, f"{float(row['median_ms']):.1f}", f"{float(row['tokens_per_s']):.1f}", row["times_dense"], row["commit"]]
        for name, row in sorted(latest.items(), key=lambda item: float(item[1]["median_ms"]))
    ]
    return table("system, ms a step, tokens a second, times dense, commit", lines)


ADAPTED = "adaptation-smollm2-h100-2026-11-26"
MORE = "adaptation-more-h100-2026-11-27"
PAPER = "adaptation-paper-h100-2026-11-27"
SERIES = ("adapt-1m", "adapt-3m", "adapt-10m", "adapt-30m")


def signed(percent: str) -> str:
    return f"{float(percent):+.2f}"


def span(row: Row) -> str:
    return f"{int(row['from']):,}-{int(row['to']):,}"


def plus_minus(row: Row) -> str:
    """A run's rise at the end, per cent, with its standard error."""
    return f"{signed(row['rise_after_pct'])} ± {float(row['rise_after_error_pct']):.2f}"


def series() -> list[list[Row]]:
    """The rows of the default recipe by range of positions: after 1M, 3M, 10M and 30M tokens."""
    return [list(of_range) for of_range in zip(*(rows_of(ADAPTED, run=run) for run in SERIES), strict=True)]


def adapted() -> str:
    """The default recipe: the rise of perplexity over dense by tokens of training, and that of the control."""
    control = rows_of(MORE, run="dense-30m")
    lines: list[list[object]] = []
    for of_range, dense in zip(series(), control, strict=True):
        first = of_range[0]
        rises = [signed(first["rise_before_pct"]), *map(plus_minus, of_range), plus_minus(dense)]
        lines.append([span(first), first["ppl_dense"], *rises])
    return table("positions, dense, untrained, 1M, 3M, 10M, 30M, dense after 30M", lines)


def adapted_kl() -> str:
    """The same runs' KL to dense."""
    control = rows_of(MORE, run="dense-30m")
    lines: list[list[object]] = []
    for of_range, dense in zip(series(), control, strict=True):
        kl = [of_range[0]["kl_before"], *(row["kl_after"] for row in (*of_range, dense))]
        lines.append([span(dense), *(f"{float(each):.4f}" for each in kl)])
    return table("positions, untrained, 1M, 3M, 10M, 30M, dense after 30M", lines)


def ablations() -> str:
    """One difference each at 5M tokens."""
    lines: list[list[object]] = []
    left_out = {*SERIES, "dense-30m", "one-gpu-8-windows", "lora-10m", "adapt-10m-again"}
    for run, name in dict.fromkeys((row["run"], file) for file in (ADAPTED, MORE) for row in rows_of(file)):
        if run in left_out:
            continue
        rows = rows_of(name, run=run)
        rises = [signed(row["rise_after_pct"]) for row in rows]
        lines.append([run, *rises, f"{float(rows[-1]['kl_after']):.4f}", f"{int(rows[0]['tokens_per_second']):,}"])
    spans = ", ".join(f"rise % {span(row).replace(',', '')}" for row in rows)
    return table(f"run, {spans}, KL at the last, tokens a second", lines)


def processes() -> str:
    """The default recipe on several GPUs, beside one."""
    one = rows_of(ADAPTED, run="base")[0]
    runs = {row["run"]: row for row in (one, *rows_of("adaptation-processes-h100-2026-11-26"))}
    lines: list[list[object]] = []
    for run, row in runs.items():
        speed = int(row["tokens_per_second"])
        times = cut(speed / int(one["tokens_per_second"]))
        lines.append([run, row["processes"], f"{speed:,}", times, row["memory_gib"], row["mfu"]])
    return table("run, GPUs, tokens a second, times one, GiB a GPU, MFU", lines)


def one_run(name: str, run: str) -> str:
    """What one run has brought: over its teacher, and over its own new weights run dense."""
    lines: list[list[object]] = []
    for row in rows_of(name, run=run):
        own = 100 * (float(row["ppl_after"]) / float(row["ppl_own_dense"]) - 1)
        kl = [f"{float(row[when]):.4f}" for when in ("kl_before", "kl_after")]
        rises = [signed(row["rise_before_pct"]), plus_minus(row), f"{own:+.2f}"]
        lines.append([span(row), row["ppl_dense"], *rises, *kl])
    return table(
        "positions, dense, rise % untrained, trained, over its weights run dense, KL untrained, trained", lines
    )


def last_stages() -> str:
    """The whole NSA by how its last stage is trained."""
    lines: list[list[object]] = []
    for run in ("paper-6m", "paper-6m-selector-0.1", "paper-6m-selector-1", "paper-6m-slow"):
        rows = rows_of(PAPER, run=run)
        lines.append([run, *(signed(row["rise_after_pct"]) for row in rows), f"{float(rows[-1]['kl_after']):.4f}"])
    return table(f"run, {', '.join(f'rise % {span(row)}'.replace(',', '') for row in rows)}, KL at the last", lines)


def finer() -> str:
    """Shorter entries and more blocks: the rise where they tell, before and after 6M tokens."""
    lines: list[list[object]] = []
    for name, run in (
        ("entries of 32 tokens each 16, 16 blocks", "paper-6m-selector-1"),
        ("16 each 8", "paper-6m-16-8"),
        ("8 each 8", "paper-6m-8-8"),
        ("32 each 16, 24 blocks", "paper-6m-topk24"),
    ):
        rows = rows_of(PAPER, run=run)[-2:]
        rises = [cell for row in rows for cell in (signed(row["rise_before_pct"]), plus_minus(row))]
        lines.append([name, *rises, *(f"{float(rows[-1][f'kl_{when}']):.4f}" for when in ("before", "after"))])
    spans = [f"{span(row).replace(',', '')} {when}" for row in rows for when in ("untrained", "trained")]
    return table(f"selection, {', '.join(f'rise % {each}' for each in spans)}, KL untrained, KL trained", lines)


def scratch() -> str:
    """Four models from scratch: held-out perplexity by position, and speed."""
    lines: list[list[object]] = []
    for run in ("scratch-dense-100m", "scratch-paper-100m", "scratch-index-100m", "scratch-rest-100m"):
        rows = rows_of("scratch-h100-2026-11-27", run=run)
        lines.append([run, *(row["ppl_after"] for row in rows), f"{int(rows[0]['tokens_per_second']):,}"])
    return table(f"run, {', '.join(span(row).replace(',', '') for row in rows)}, tokens a second", lines)


def answers() -> str:
    """Needles: the means over depths."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows_of("answers-h100-2026-11-27", suite="needle"):
        groups.setdefault((row["model"], row["task"], int(row["tokens"])), []).append(row)
    lines: list[list[object]] = []
    for (model, task, tokens), rows in groups.items():
        mean = lambda key, rows=rows: sum(float(row[key]) for row in rows) / len(rows)  # noqa: E731
        prompts = sum(int(row["prompts"]) for row in rows)
        nats = [f"{mean(f'{way}_nll'):.3f}" for way in ("dense", "sparse")]
        found = [f"{mean(way):.1%}" for way in ("dense", "sparse")]
        lines.append([f"{model}, {task}", f"{tokens:,}", prompts, *found, *nats])
    return table("model and needles, tokens, prompts, found dense, found sparse, nats dense, nats sparse", lines)


TABLES = {
    "adapted": adapted,
    "adapted, KL": adapted_kl,
    "ablations": ablations,
    "processes": processes,
    "longer": lambda: one_run("adaptation-long-h100-2026-11-27", "long-20m"),
    "Gemma 3": lambda: one_run("adaptation-gemma3-h100-2026-11-27", "gemma-10m"),
    "the whole NSA": lambda: one_run(PAPER, "paper-20m"),
    "the whole NSA, last stages": last_stages,
    "the whole NSA, finer": finer,
    "from scratch": scratch,
    "answers": answers,
    "forward": lambda: operation("forward"),
    "backward": lambda: operation("backward"),
    "parts": operation_parts,
    "short texts": short_texts,
    "training steps": training_steps,
    "decoding by length": decoding_by_length,
    "decoding, 32 GiB": decoding_full,
    "growth": growth,
    "index, decoding": index_decoding,
    "first token": first_token,
    "steps of a whole model": whole_model_steps,
}


def test_every_table_is_the_csv_files() -> None:
    text = MEASURED.read_text()
    for name, make in TABLES.items():
        assert make() in text, f"{name}: docs/measured.md has another table than `python {Path(__file__).name}` prints"
    rows = sum(make().count("\n") + 1 for make in TABLES.values())
    assert len(re.findall(r"^\|", text, flags=re.MULTILINE)) == rows, "a table that no CSV file shows"


def test_the_text_says_what_the_csv_files_say() -> None:
    text = " ".join(MEASURED.read_text().split())
    results = Counter(row["result"] for row in rows_of("families"))
    assert f"{results['exact']} of {results.total()} families" in text
    compiled = the_row("generate-h100-2026-11-23", system="nsa", run_id="91a23d45")
    assert f"off by {compiled['compiled_error']} of their norm" in text
    assert f"{compiled['one_bit_error']} by one other last bit" in text


@pytest.mark.parametrize("system", SPARSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_from_where_on_it_is_the_fastest(shape: str, system: str) -> None:
    assert "From 16,384 tokens on both passes together are the fastest" in MEASURED.read_text()
    for tokens in LENGTHS[1:]:
        rows = rows_of(OPERATION, config=shape, tokens=tokens, inputs="random")
        both = Counter[str]()
        for row in rows:
            both[row["system"]] += float(row["median_ms"]) if row["part"] in ("forward", "backward") else 0
        assert both[system] < min(both["fa2"], both["cudnn"])


def test_every_file_of_results_is_named() -> None:
    text = MEASURED.read_text()
    names = {path.name for path in RESULTS.iterdir()}
    assert {name for name in names if f"../recipes/results/{name})" not in text} == set()


def test_the_readme_repeats_figures_only() -> None:
    """Its table of what is reached: every number stands in docs/measured.md too."""
    reached = (ROOT / "README.md").read_text().partition("## What it reaches\n")[2].partition("\n## ")[0]
    numbers = re.findall(r"\d+\.\d+", reached)
    assert len(numbers) > 8
    assert [number for number in numbers if number not in MEASURED.read_text()] == []


if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n")
