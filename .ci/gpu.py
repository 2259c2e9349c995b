"""Everything that needs a CUDA GPU: the tests marked `gpu`, and when they are green the benchmark. `make gpu` runs it.

    python .ci/gpu.py [pytest's own options]

Needs PyTorch, Transformers and pytest, and no installation: the package is imported from a tree of links.
"""

from __future__ import annotations

import os
import subprocess
import sys
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


def run(*arguments: str) -> None:
    """Run a Python command in the repository's root with the package in sight; a failure ends everything."""
    path = os.pathsep.join([str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode
    if code != 0:
        sys.exit(code)


def side_by_side() -> list[str]:
    """Several test processes where pytest-xdist is there: most of the time is compiling, which takes a core each."""
    processes = min(8, (os.cpu_count() or 2) // 2)
    return ["-n", str(processes), "--dist", "worksteal"] if find_spec("xdist") and processes > 1 else []


def main() -> None:
    check_gpu()
    make_tree(TREE)
    # Only their files: others may import what is not installed here.
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        sys.exit("error: no test in tests/ is marked `gpu`")
    run("-m", "pytest", "-m", "gpu", "--durations=5", *side_by_side(), *files, *sys.argv[1:])
    if (ROOT / "recipes" / "benchmark.py").exists():
        # Whole passes at two lengths; everything takes half an hour.
        run("-m", "nsa_hf.recipes.benchmark", "--tokens", "8192,65536", "--inputs", "random", "--no-parts")


if __name__ == "__main__":
    main()
