"""`nsa-hf eval OUT --suite ...`: one suite after another, into OUT/eval.json, which keeps those measured before.

    evaluate(Path("out"), ["ppl"], Settings(length=8192, documents=20))

A suite that fails leaves the results of the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Group

from nsa_hf.conversion.files.staging import write_json
from nsa_hf.errors import NsaError
from nsa_hf.model_cards.evaluation import FORMAT, suites_of

from ..training.folder import machine
from .harness import harness, render_harness
from .needle import needle, render_needle
from .perplexity import perplexity, render_perplexity
from .ruler import render_ruler, ruler
from .subject import Settings, Subject

NAME = "eval.json"
Result = dict[str, Any]

SUITES: dict[str, Callable[[Subject, Settings], Result]] = {
    "ppl": perplexity,
    "needle": needle,
    "ruler": ruler,
    "lm-eval": harness,
}
TABLES: dict[str, Callable[[Result, str], Iterator[Any]]] = {
    "ppl": render_perplexity,
    "needle": render_needle,
    "ruler": render_ruler,
    "lm-eval": render_harness,
}


def evaluate(
    out: Path,
    suites: Sequence[str] = ("ppl",),
    settings: Settings = Settings(),  # noqa: B008, it is frozen
    *,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Result:
    """Measures a sparse model and the same weights run dense, and writes `out`/eval.json after every suite.

    Args:
        out: the model's folder.
        suites: of SUITES, by name.
        settings: of all suites.
        device: where the model runs.
        dtype: float32, bfloat16 or float16.
        trust_remote_code: run the code that the tokenizer brings.

    Returns:
        What is in eval.json: `suites`, the results by name, of this call and of earlier ones, and the machine.

    Raises:
        NsaError: no model, an eval.json that is damaged, a suite that there is not, or one that failed.
    """
    check_suites(suites, settings)
    results = read_suites(out / NAME)
    subject = Subject.load(out, device, dtype, settings.rope_scaling, trust_remote_code)
    failed: dict[str, Exception] = {}
    for suite in suites:
        try:
            measured = SUITES[suite](subject, settings)
        except Exception as error:
            failed[suite] = error
            if len(suites) > 1:
                print(f"{suite} failed: {error}", file=sys.stderr)
            continue
        ran = {"dtype": dtype, "device": device, "rope_scaling": settings.rope_scaling, **machine()}
        results[suite] = {**measured, **ran}
        write_json(out / NAME, {"format": FORMAT, "suites": results})
        if suite == "needle":
            from nsa_hf.model_cards.pictures import draw_needles

            draw_needles(out, measured)
    if failed:
        raise_failed(failed, suites, out)
    return {"format": FORMAT, "suites": results}


def read_suites(path: Path) -> dict[str, Any]:
    """The results by suite; none where there is no file.

    Args:
        path: of eval.json.

    Raises:
        NsaError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return suites_of(content)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise NsaError(f"{path} is damaged ({error}): put it right, or move it away and measure again") from error


def check_suites(suites: Sequence[str], settings: Settings) -> None:
    """Whether all that the suites need is there, before the first of them runs; NsaError says what is not."""
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown or not suites:
        raise NsaError(f"--suite takes {', '.join(SUITES)}, several with commas, got {', '.join(unknown) or 'nothing'}")
    if "lm-eval" in suites and not settings.tasks:
        raise NsaError("the suite lm-eval needs --tasks, such as --tasks hellaswag,arc_easy")
    if "lm-eval" in suites and find_spec("lm_eval") is None:
        raise NsaError("the suite lm-eval needs its package: pip install 'nsa-hf[lm-eval]'")
    if "needle" in suites and find_spec("matplotlib") is None:
        raise NsaError("the suite needle draws a picture, which needs matplotlib: pip install 'nsa-hf[eval]'")


def raise_failed(failed: dict[str, Exception], suites: Sequence[str], out: Path) -> None:
    """Raises the error of the only suite, or one that names those of several that failed."""
    first = next(iter(failed.values()))
    if len(suites) == 1:
        raise first
    done = [suite for suite in suites if suite not in failed]
    kept = f"; {', '.join(done)} can be read in {out / NAME}" if done else ""
    named = "; ".join(f"{suite}: {error}" for suite, error in failed.items())
    raise NsaError(f"{len(failed)} of {len(suites)} suites failed{kept}. {named}") from first


def render(result: Result, suites: Sequence[str], out: Path) -> Group:
    """The tables of the suites that were asked for."""
    return Group(*(table for suite in suites for table in TABLES[suite](result["suites"][suite], str(out))))
