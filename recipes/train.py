"""The way in to training for `accelerate launch` and `python -m`; the training itself is training/loop.py.

accelerate launch -m nsa_hf.recipes.train recipes/runs/demo.yaml model=build/nsa out=build/trained
"""

from __future__ import annotations

import sys

from nsa_hf.errors import NsaError

from .exit_codes import INTERRUPTED, WRONG_INPUT
from .terminal import report
from .training.config import load_run_config
from .training.loop import train


def main(arguments: list[str] | None = None) -> int:
    """`accelerate launch -m nsa_hf.recipes.train RUN.yaml [key=value ...]`."""
    path, *overrides = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        if not path:
            raise NsaError("give a run file: python -m nsa_hf.recipes.train RUN.yaml [key=value ...]")
        train(load_run_config(path, overrides))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not report(error):
            raise
        return WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
