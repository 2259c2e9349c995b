"""Lay out `kernels/nsa` as a kernel that Hugging Face's `kernels` library loads from the Hub or from a folder.

    python .ci/hub_kernel.py build/hub-kernel        what `make hub-kernel` runs

The folder is a repository of type `kernel`, ready to be uploaded. `build/torch-cuda` and `build/torch-cpu` are what the
library calls a universal kernel's variants: the same Python, for whatever it runs on. Their `metadata.json` has a hash
of every file, and a name for the module and its operators that follows from the hashes: a process may hold several
versions. The library finds `__init__.py` beside `metadata.json`; older ones look in a folder of the kernel's name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels" / "nsa"
NAME = "nsa"
# The library's own number of an interface, a branch `v0` on the Hub; 0 says that it may still change.
VERSION = 0
# Triton compiles for the card: 8.0 and every newer one.
BACKENDS: dict[str, dict[str, object]] = {"cpu": {"type": "cpu"}, "cuda": {"type": "cuda", "archs": ["8.0+PTX"]}}

OLDER = '''"""The same names as one folder up, for versions of `kernels` that look here."""

import importlib.util
import json
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent.parent
_name = json.loads((_folder / "metadata.json").read_text(encoding="utf-8"))["id"]
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _folder / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
__all__ = sys.modules[_name].__all__
globals().update({name: getattr(sys.modules[_name], name) for name in __all__})
'''

CARD = """---
license: apache-2.0
library_name: kernels
tags:
- kernels
---

# Native Sparse Attention

The operation of [Native Sparse Attention](https://arxiv.org/abs/2502.11089), forward, backward and for decoding: Triton
kernels on NVIDIA GPUs (8.0 and newer), and its reference in PyTorch, which runs anywhere. Python 3.11, PyTorch 2.11 and
newer. It is `nsa_hf.kernels` of nsa-hf {version}.

    from kernels import get_kernel

    nsa = get_kernel("OWNER/nsa", version={kernel_version}, trust_remote_code=True)
    help(nsa.nsa_attention)
"""


def hashes(folder: Path) -> dict[str, str]:
    """Of every file below a folder: its path in it, to its SHA-256 in base 64."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def write_variant(folder: Path, backend: str) -> None:
    """The kernel's files for a backend, and `metadata.json` beside them."""
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / NAME).mkdir()
    (folder / NAME / "__init__.py").write_text(OLDER, encoding="utf-8")
    files = hashes(folder)
    contents = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    metadata = {
        "name": NAME,
        "id": f"_{NAME}_{backend}_{contents}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": BACKENDS[backend],
        "digest": {"algorithm": "sha256", "files": files},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def write_repository(folder: Path, version: str) -> None:
    """The whole repository, in a folder that is made anew.

    Args:
        folder: where; a folder that is there must be one that this wrote.
        version: of nsa-hf, for the card.
    """
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "build" / "torch-cpu" / "metadata.json").is_file():
            sys.exit(f"error: {folder} holds something else: name a folder that does not exist")
        shutil.rmtree(folder)
    for backend in BACKENDS:
        write_variant(folder / "build" / f"torch-{backend}", backend)
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "README.md").write_text(CARD.format(version=version, kernel_version=VERSION), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/hub_kernel.py FOLDER")
    import nsa_hf

    write_repository(Path(sys.argv[1]), nsa_hf.__version__)
    print(f"to publish it: hf upload OWNER/{NAME} {sys.argv[1]} --type kernel --revision v{VERSION}")
