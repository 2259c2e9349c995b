"""Where the examples keep what they convert: a folder for each model, that no example takes for another's.

source, out = source_and_folder("path/to/llama")      # in demo/examples/llama-nsa
if not is_converted(source, out):
    nsa_hf.convert(source, out)
"""

from __future__ import annotations

import os
from pathlib import Path

from nsa_hf.conversion import manifest
from nsa_hf.errors import NsaError

from .demo import fetch_source


def source_and_folder(
    model: str | None, out: Path | None = None, kind: str = "nsa", work: Path = Path("demo")
) -> tuple[str, Path]:
    """The dense model that an example converts, and the folder for what it makes of it.

    Args:
        model: a folder, a .gguf file or a Hub id; None or "": the demo's, which is fetched into `work`.
        out: the folder; None: of the model's name and `kind`, in `work`.
        kind: what is in it.
        work: the demo's folder.

    Returns:
        The Hub id, or the whole path, which is the same wherever a program is started; and the folder.
    """
    path = Path(model or fetch_source(work))
    source = os.path.abspath(path) if path.exists() else str(model)
    name = f"{Path(source).name}-{kind}" if model else kind
    return source, out or work / "examples" / name


def is_converted(source: str, out: Path) -> bool:
    """Whether a folder holds the conversion of a model.

    Raises:
        NsaError: it holds that of another model, or something else.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return False
    other = manifest.read(out)["source"]["name"]
    if Path(other).resolve() != Path(source).resolve():
        raise NsaError(f"{out} was converted from {other}, not from {source}: remove it, or give another folder")
    return True
