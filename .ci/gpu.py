"""Everything that needs a CUDA GPU: the tests marked `gpu`, and when they are green the benchmarks. `make gpu` runs it.

    python .ci/gpu.py                       all of it
    python .ci/gpu.py tests decode          only these stages: tests, operation, decode, generate, training
    python .ci/gpu.py sanitize              every kernel under NVIDIA's compute-sanitizer, which CUDA's toolkit brings

Needs PyTorch, Transformers and pytest, and no installation: the package is imported from a tree of links.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from linktree import ROOT, make_tree

TREE = ROOT / "build" / "gpu"


def check_gpu() -> None:
    """Say what this runs on, or stop."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        build = f"PyTorch {torch.__version__}, built for " + (
            f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        )
        sys.exit(f"error: no CUDA GPU can be used here ({build}); `make test` needs none")
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Transformers {transformers.__version__}",
        flush=True,
    )


def run(*arguments: str, under: Sequence[str] = (), **variables: str) -> None:
    """`exit_code`; a failure ends everything."""
    if (code := exit_code(*arguments, under=under, **variables)) != 0:
        sys.exit(code)


def exit_code(*arguments: str, under: Sequence[str] = (), **variables: str) -> int:
    """Run a Python command in the repository's root with the package in sight.

    Args:
        under: a command that runs it.
        variables: more of the environment.
    """
    path = os.pathsep.join([str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path} | variables
    return subprocess.run([*under, sys.executable, *arguments], cwd=ROOT, env=environment).returncode


def side_by_side() -> list[str]:
    """Several test processes where pytest-xdist is there: most of the time is compiling, which takes a core each."""
    processes = min(8, (os.cpu_count() or 2) // 2)
    return ["-n", str(processes), "--dist", "worksteal"] if find_spec("xdist") and processes > 1 else []


def tests() -> None:
    # Only their files: others may import what is not installed here.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        sys.exit("error: no test in tests/ is marked `gpu`")
    run("-m", "pytest", "-m", "gpu", "--durations=5", *side_by_side(), *files)


def operation() -> None:
    """Training and prefill: whole passes and parts, every shape, 4k to 128k."""
    run("-m", "nsa_hf.recipes.benchmarks.operation")


def decode() -> None:
    """One step of decoding."""
    run("-m", "nsa_hf.recipes.benchmarks.decode")


def generate() -> None:
    """A whole model; each system in a process of its own: memory and compiled graphs are not the next one's, and where
    one fails the others are measured."""
    failed = []
    for phase, systems in (
        ("decode", ("dense-dynamic", "dense-cut", "dense-static", "dense-flex", "nsa")),
        ("first-token", ("dense-cudnn", "dense-flash", "nsa")),
    ):
        for system in systems:
            given = ("--phase", phase, "--systems", system)
            if exit_code("-m", "nsa_hf.recipes.benchmarks.generate", *given) != 0:
                failed.append(f"{phase} {system}")
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}")


def training() -> None:
    """A whole training step."""
    run("-m", "nsa_hf.recipes.benchmarks.training")


def sanitize() -> None:
    """No access outside of what was allocated, one allocation per tensor; no race in a program's shared memory."""
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        sys.exit("error: compute-sanitizer is not on the PATH: it comes with CUDA's toolkit")
    script = str(ROOT / ".ci" / "every_kernel.py")
    run(script)  # compiles them; by itself that is much faster
    for tool in ("memcheck", "racecheck"):
        watched = (sanitizer, "--tool", tool, "--error-exitcode", "1")
        run(script, under=watched, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


STAGES = {stage.__name__: stage for stage in (tests, operation, decode, generate, training)}
ON_DEMAND = {"sanitize": sanitize}


def main() -> None:
    chosen = sys.argv[1:] or list(STAGES)
    known = STAGES | ON_DEMAND
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"error: unknown stage {', '.join(unknown)}: choose of {', '.join(known)}")
    check_gpu()
    make_tree(TREE)
    for name in chosen:
        known[name]()


if __name__ == "__main__":
    main()
