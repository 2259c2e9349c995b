"""A converted model behind Transformers' OpenAI-compatible server: `nsa-hf serve OUT --port 8000`.

It is `transformers serve` in a process that knows the sparse classes; every option of that command can be given.
"""

from __future__ import annotations

from pathlib import Path

import nsa_hf  # noqa: F401 - registers the model classes
from nsa_hf.conversion.loading import read_config
from nsa_hf.errors import NsaError
from nsa_hf.generation import PAGED


def serve(out: Path, arguments: list[str]) -> None:
    """Serves until it is interrupted.

    Args:
        out: the converted model's folder; requests name it as their model.
        arguments: further options of `transformers serve`, such as `--host`, `--port`, `--device`, `--dtype`.

    Raises:
        NsaError: no model is there, the server's packages are missing, or continuous batching is asked for.
    """
    from transformers.utils.import_utils import is_serve_available

    if not (out / "config.json").is_file():
        raise NsaError(f"no converted model in {out}: expected a folder with config.json")
    read_config(out)
    if "--continuous-batching" in arguments:
        raise NsaError(PAGED)
    if not is_serve_available():
        raise NsaError("the server needs more packages: pip install 'nsa-hf[serve]'")
    from transformers.cli.transformers import app

    app(["serve", str(out), *arguments], prog_name="nsa-hf")
