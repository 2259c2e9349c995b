"""What the tests of the Triton kernels share as a fixture."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from triton_cases import interpreter


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton's kernels are interpreted on the CPU."""
    with interpreter() as pool:
        yield pool
