"""Random cases, as many as are asked for, each held against a slower or simpler way to the same numbers.

    make fuzz                                          # 10,000 cases
    python tests/fuzz.py --cases 500 --seed 7 --only steps

A case is right when its numbers are, without NaN, or when it is refused with an `NsaError` or `ValueError` where it may
be. Hypothesis draws the cases, the same ones for the same seed. `make test` runs 300 (tests/nsa_hf/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import torch
from attention_inputs import Shape, any_shape, any_sizes, make_inputs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from oracle import nsa_oracle
from tiny_families import sparse_of, tiny_dense
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from nsa_hf.errors import NsaError
from nsa_hf.kernels import nsa_attention
from nsa_hf.releases import CACHE

VOCABULARY, ROOM = 96, 72
# Norms and RoPE are float32 in a float64 model too: their rounding depends on how many rows there are.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Settings:
    """What decides a model but its random weights."""

    family: str
    fields: tuple[tuple[str, Any], ...]
    seed: int

    def make(self) -> PreTrainedModel:
        """The model, in float64, so that no two blocks change places by rounding."""
        dense = tiny_dense(self.family, self.seed)
        return sparse_of(dense, random=True, **dict(self.fields)).double()

    @property
    def independent(self) -> bool:
        return dict(self.fields)["nsa_branch_kv"] == "independent"


@st.composite
def any_model(draw: st.DrawFn) -> Settings:
    """A family, sizes that fit each other, and any choice of blocks, compression, gates and dense layers."""
    fields = {f"nsa_{name}": size for name, size in vars(draw(any_sizes())).items()}
    channels = draw(st.booleans())
    kinds = ["mean", "linear", "mlp"] + ["none"] * channels
    fields |= {
        "nsa_selector": "channels" if channels else "compressed",
        "nsa_selector_bits": draw(st.sampled_from([16, 8])) if channels else 16,
        "nsa_compression": draw(st.sampled_from(kinds)),
        "nsa_gate": draw(st.sampled_from(["residual", "sigmoid", "blend"])),
        "nsa_gate_blend": draw(st.sampled_from([0.0, 0.4, 1.0])),
        "nsa_dense_layers": draw(st.sampled_from([[], [0], [-1]])),
    }
    shared = fields["nsa_compression"] == "none" or draw(st.booleans())
    fields["nsa_branch_kv"] = "shared" if shared else "independent"
    family = draw(st.sampled_from(["llama", "qwen3", "gemma3_text", "stablelm"]))
    if family == "gemma3_text":
        fields["nsa_dense_layers"] = []  # its other layer has a window of its own
    return Settings(family, tuple(fields.items()), draw(st.integers(0, 3)))


def continued(x: torch.Tensor, tokens: int, random: torch.Generator) -> torch.Tensor:
    """So many new tokens for each row, int64 `[B, tokens]`, none that the row has: where a family leaves channels
    unturned, the same token in two blocks would make them tie, and rounding would decide."""
    new = []
    for row in x:
        order = torch.randperm(VOCABULARY - 3, generator=random) + 3
        new.append(order[~torch.isin(order, row)][:tokens])
    return torch.stack(new) if new else x[:, :0]


def text(rows: int, length: int, seed: int) -> torch.Tensor:
    return continued(torch.zeros(rows, 0, dtype=torch.long), length, torch.Generator().manual_seed(seed))


def mask_of(starts: list[int], ends: list[int], length: int) -> torch.Tensor:
    place = torch.arange(length)
    return ((place >= torch.tensor(starts)[:, None]) & (place < torch.tensor(ends)[:, None])).long()


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The same logits, all of them numbers."""
    assert got.shape == expected.shape and got.isfinite().all()
    if got.numel():
        difference = float((got - expected).norm() / expected.norm())
        assert difference < ROUNDING, f"logits differ by {difference:.1e} of their norm"


@given(shape=any_shape(), number=st.integers(0, 2**16), dtype=st.sampled_from([torch.float64, torch.float32]))
def operation(shape: Shape, number: int, dtype: torch.dtype) -> None:
    """The reference of the operation against the oracle, with NaN wherever nothing may be read."""
    inputs = make_inputs(shape, number, dtype)
    output, selection = nsa_attention(**inputs, backend="reference", return_selection=True)
    # of near-equals rounding may take another; what is computed with that selection is right all the same
    answer = nsa_oracle(**inputs, selection=None if dtype == torch.float64 else selection)
    assert torch.equal(selection, answer.selection)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(output.double(), answer.output, rtol=tolerance, atol=tolerance)


@st.composite
def rows(draw: st.DrawFn, right: bool = True) -> tuple[int, list[int], list[int]]:
    """A length, and where each row's tokens start and end in it; some rows may hold nothing."""
    length = draw(st.integers(1, 60))
    count = draw(st.integers(1, 3))
    starts = [draw(st.integers(0, length)) for _ in range(count)]
    ends = [draw(st.integers(start, length)) if right else length for start in starts]
    return length, starts, ends


@given(made=any_model(), placed=rows(), number=st.integers(0, 2**16), dense=st.booleans())
def padded(made: Settings, placed: tuple, number: int, dense: bool) -> None:
    """Rows padded on either side, with a mask only, against each row alone."""
    model, (length, starts, ends) = made.make(), placed
    x = text(len(starts), length, number)
    with torch.no_grad(), model.dense_attention([0] if dense else []):
        got = model(x, attention_mask=mask_of(starts, ends, length)).logits
        assert got.isfinite().all()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if start < end:
                assert_same(got[row, start:end], model(x[row : row + 1, start:end]).logits[0])


@given(
    made=any_model(),
    tokens=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    number=st.integers(0, 2**16),
    by_borders=st.booleans(),
)
def packed(made: Settings, tokens: list[int], number: int, by_borders: bool) -> None:
    """Packed documents, by borders or by position ids that restart, against each document alone."""
    model = made.make()
    borders = torch.tensor([0, *tokens]).cumsum(0)
    x = torch.cat([text(1, count, number + place) for place, count in enumerate(tokens)], 1)
    positions = torch.cat([torch.arange(count) for count in tokens])[None]
    given = {"cu_seq_lens_q": borders.int()} if by_borders else {"position_ids": positions}
    with torch.no_grad():
        got = model(x, use_cache=False, **given).logits
        alone = [model(x[:, a:b]).logits for a, b in pairwise(borders.tolist())]
    assert_same(got, torch.cat(alone, 1))


STEP = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 30)),
    st.tuples(st.just("feed"), st.just(1)),
    st.tuples(st.sampled_from(["crop", "reorder", "repeat", "select", "copy", "reset"]), st.integers(1, 12)),
)
OF_A_STATIC_CACHE = ("feed", "crop", "reorder", "copy", "reset")
# What the caches of layers that are not sparse cannot do in Transformers 5.17: a static one be cropped, others emptied.
LACKING = {} if hasattr(StaticLayer, "crop") else {"static": "crop", "dynamic": "reset", "configured": "reset"}


@given(
    made=any_model(),
    kind=st.sampled_from(["dynamic", "configured", "static"]),
    starts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    padded=st.booleans(),
    recorded=st.booleans(),
    script=st.lists(STEP, min_size=1, max_size=8),
    number=st.integers(0, 2**16),
)
def steps(
    made: Settings, kind: str, starts: list[int], padded: bool, recorded: bool, script: list, number: int
) -> None:
    """A text fed to a cache in steps, with everything that is done to caches between, against one pass of each row."""
    model, random = made.make(), torch.Generator().manual_seed(number)
    starts = starts if padded else [0] * len(starts)
    has_others = made.family == "gemma3_text" or dict(made.fields)["nsa_dense_layers"]
    cache = StaticCache(model.config, max_cache_len=ROOM) if kind == "static" else DynamicCache()
    if kind == "configured":
        cache = DynamicCache(config=model.config)
    x = torch.zeros(len(starts), 0, dtype=torch.long)
    for name, count in script:
        if kind == "static" and name not in OF_A_STATIC_CACHE:
            continue
        if has_others and LACKING.get(kind) == name:
            continue
        if name == "feed":
            new = continued(x, min(count, ROOM - x.shape[1]), random)
            if not new.numel():
                continue
            x = torch.cat([x, new], 1)
            length = x.shape[1]
            given = {"attention_mask": mask_of(starts, [length] * len(x), length)} if padded else {}
            try:
                with torch.no_grad():
                    got = model(new, **{CACHE: cache}, use_cache=True, **given).logits
            except NsaError as error:
                if LACKING and "this cache was cropped" in str(error):
                    return  # said when the window is read: there its own layers crop themselves
                raise
            compare_with_rows_alone(model, x, starts, got)
            if recorded and kind != "static":
                cache.activate_past_recording()
            continue
        if not x.shape[1]:
            continue
        try:
            cache, x, starts = changed(cache, x, starts, name, count)
        except (RuntimeError, ValueError):
            # what a window has let go of does not come back, unless it was recorded in time
            if name == "crop" and (made.family == "gemma3_text" or (made.independent and kind != "static")):
                return
            raise


def compare_with_rows_alone(model: PreTrainedModel, x: torch.Tensor, starts: list[int], got: torch.Tensor) -> None:
    """The logits of the last tokens against one pass of each row without its padding."""
    assert got.isfinite().all()
    new = got.shape[1]
    for row, start in enumerate(starts):
        if start < x.shape[1]:
            with torch.no_grad():
                alone = model(x[row : row + 1, start:], use_cache=False).logits[0, -new:]
            assert_same(got[row, new - len(alone) :], alone)


def changed(cache: Any, x: torch.Tensor, starts: list[int], name: str, count: int) -> tuple:
    """A cache after `name`, and the tokens and starts of the rows that it then holds."""
    rows = list(range(len(x)))
    if name == "crop":
        count = min(count, x.shape[1] - 1)
        cache.crop(-count)
        return cache, x[:, : x.shape[1] - count], starts
    if name == "copy":
        return copy.deepcopy(cache), x, starts
    if name == "reset":
        cache.reset()
        return cache, x[:, :0], starts
    if name == "reorder":
        rows = [(row * count + 1) % len(x) for row in rows]
        cache.reorder_cache(torch.tensor(rows))
    elif name == "repeat" and len(x) * 2 <= 6:
        rows = [row for row in rows for _ in range(2)]
        cache.batch_repeat_interleave(2)
    elif name == "select":
        rows = sorted({row % len(x) for row in (count, count // 2)})
        cache.batch_select_indices(torch.tensor(rows))
    return cache, x[rows], [starts[row] for row in rows]


ODD = st.sampled_from(
    [-1, 0, 1, 2, 3, 8, 1 << 40, 0.5, float("nan"), True, None, "8", "mean", "channels", [], [0], [[0]]]
)
FIELDS = ["kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks", "window_size"]
FIELDS += ["selector", "selector_dim", "selector_bits", "selector_channels", "compression", "compression_dim"]
FIELDS += ["rope_order", "branch_kv", "gate", "gate_dim", "gate_blend", "dense_layers", "format"]


@given(fields=st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=3), number=st.integers(0, 2**16))
def config(fields: dict[str, Any], number: int) -> None:
    """Fields of any value: refused in the config, or the model computes numbers."""
    huge = any(type(value) is int and value > 256 for name, value in fields.items() if name.endswith("_dim"))
    try:
        dense = tiny_dense("llama")
        if huge:
            return  # a width, rightly taken: such a matrix does not fit
        model = sparse_of(dense, random=True, **{f"nsa_{name}": value for name, value in fields.items()})
    except ValueError:
        return
    with torch.no_grad():
        assert model(text(1, 40, number)).logits.isfinite().all()


@st.composite
def any_inputs(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Masks, positions and borders of any shape and kind beside a text."""
    count, length = draw(st.integers(0, 3)), draw(st.integers(0, 12))
    shapes = st.one_of(st.just((count, length)), st.lists(st.integers(0, 13), min_size=0, max_size=4).map(tuple))
    numbers = st.sampled_from([torch.long, torch.bool, torch.float32, torch.int32])
    found = {"input_ids": torch.full((count, length), draw(st.integers(3, 9)))}
    for name, highest in (("attention_mask", 1), ("position_ids", 20), ("cu_seq_lens_q", 12)):
        if draw(st.booleans()):
            shape, generator = draw(shapes), torch.Generator().manual_seed(draw(st.integers(0, 9)))
            found[name] = torch.randint(0, highest + 1, shape, generator=generator).to(draw(numbers))
    return found


@given(made=any_model(), given=any_inputs(), kind=st.sampled_from(["none", "dynamic", "static"]))
def inputs(made: Settings, given: dict[str, torch.Tensor], kind: str) -> None:
    """Inputs of any shape: refused with a clear error, or the model computes numbers."""
    model = made.make()
    caches: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(model.config, max_cache_len=ROOM),
    }
    try:
        with torch.no_grad():
            logits = model(**given, **{CACHE: caches[kind]()}, use_cache=kind != "none").logits
    except ValueError:
        return
    assert logits.isfinite().all()


# Each property, and its share of the cases.
PROPERTIES = {operation: 0.3, steps: 0.3, padded: 0.15, packed: 0.1, inputs: 0.1, config: 0.05}


def run(check: Callable[[], None], cases: int, start: int, smallest: bool = False) -> None:
    """Runs so many cases of a property, the same ones for the same `start`.

    Raises:
        AssertionError, or whatever a case raised, with the case in its notes; the smallest that fails, where that is
            asked for.
    """
    kept = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, *([Phase.shrink] if smallest else [])],
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed(start)(kept(check))()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of all properties together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[check.__name__ for check in PROPERTIES])
    parser.add_argument("--smallest", action="store_true", help="make a case that fails as small as possible (minutes)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for check, share in PROPERTIES.items():
        if chosen.only not in (None, check.__name__):
            continue
        cases, began = max(1, round(chosen.cases * (1 if chosen.only else share))), time.monotonic()
        try:
            run(check, cases, chosen.seed, chosen.smallest)
            outcome = "right"
        except Exception as error:
            outcome, failed = (
                f"WRONG: {type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", [])),
                1,
            )
        print(f"{check.__name__}: {cases} cases in {time.monotonic() - began:.0f} s: {outcome}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
