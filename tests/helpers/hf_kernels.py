"""Hugging Face's `kernels` from PyPI, in a folder of its own.

It is not among the packages of the tests: where it is installed, Transformers looks for kernels on the Hub.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def install_kernels(folder: Path) -> None:
    """The newest one and none of its dependencies, into a folder; the test is skipped where PyPI cannot be reached."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    result = subprocess.run(
        [*command, "--target", str(folder), "kernels"], capture_output=True, text=True, timeout=300, cwd=folder.parent
    )
    if result.returncode:
        if re.search("connection|resolution|timed out", result.stderr, re.IGNORECASE):
            pytest.skip("PyPI cannot be reached")
        raise AssertionError(result.stderr)
