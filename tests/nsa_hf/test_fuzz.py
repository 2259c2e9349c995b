"""300 cases of tests/fuzz.py, which `make fuzz` runs 10,000 of."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "fuzz.py"


def loaded():
    spec = importlib.util.spec_from_file_location("nsa_fuzz", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = loaded()


@pytest.mark.parametrize("check", fuzz.PROPERTIES, ids=lambda check: check.__name__)
def test_random_cases(check):
    fuzz.run(check, round(300 * fuzz.PROPERTIES[check]), start=1)
