"""Type-check the package: mypy over a tree of links, with the messages naming the files where they really are.

python .ci/typecheck.py [mypy's own options]
"""

from __future__ import annotations

import re
import subprocess
import sys

from linktree import ROOT, make_tree, package_dir

TREE = ROOT / "build" / "typecheck"


def real_paths(text: str) -> str:
    """`nsa_hf/kernels/sizes.py:3: error` to `kernels/nsa/sizes.py:3: error`, children before parents."""
    for name, folder in reversed(package_dir().items()):
        inside = re.escape(name.replace(".", "/") + "/")
        text = re.sub(rf"^{inside}", f"{folder.as_posix()}/", text, flags=re.MULTILINE)
    return text


def without_overloads(text: str) -> str:
    """Leave out the list of every signature that PyTorch's functions have."""
    overload = re.compile(r": note: (Possible overload variants?:| {4}def )")
    return "".join(line for line in text.splitlines(keepends=True) if not overload.search(line))


def main() -> int:
    make_tree(TREE)
    command = [sys.executable, "-m", "mypy", f"--config-file={ROOT / 'pyproject.toml'}", *sys.argv[1:]]
    command.append(f"--cache-dir={ROOT / '.mypy_cache'}")
    # Started in the tree, where `nsa_hf` is the whole package; in the root it would be that folder alone.
    result = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
    print(without_overloads(real_paths(result.stdout)), end="")
    print(real_paths(result.stderr), end="", file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
