"""The commands of `nsa-hf`. Each reads its options and calls one function, which Python programs can call too.

PyTorch and Transformers are imported by the command that runs, so that `--help` and completion do not wait for them.
The order of these imports is that of the commands in `nsa-hf --help`.
"""

from . import converting, training, using
from .app import app

__all__ = ["app", "converting", "training", "using"]
