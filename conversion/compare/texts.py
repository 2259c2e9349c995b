"""Real long texts that are on every machine: source files of Python's standard library, which training leaves out.

    from nsa_hf.conversion.compare.texts import held_out_texts
    for name, text in held_out_texts(): ...

Python and its standard library are under the PSF License Version 2. Nothing is copied into this repository: the files
of the running interpreter are read, so figures measured on them belong to one Python version (`provenance` records it).
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from nsa_hf.errors import NsaError

# Long, of different kinds (numbers, archives, command lines, tests, addresses, statistics), in every Python from 3.11
# on. Training data leaves them out by name; the first ones are what `verify` reads.
HELD_OUT = (
    "_pydecimal.py",
    "tarfile.py",
    "argparse.py",
    "doctest.py",
    "ipaddress.py",
    "statistics.py",
    "mailbox.py",
    "difflib.py",
)


def standard_library() -> Path:
    """The folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def held_out_texts(names: Sequence[str] = HELD_OUT) -> list[tuple[str, str]]:
    """The held-out texts as (file name, text).

    Args:
        names: of files, in the order that is wanted; those that this Python lacks are left out.

    Raises:
        NsaError: none of them is there.
    """
    folder = standard_library()
    texts = [(name, (folder / name).read_text(encoding="utf-8")) for name in names if (folder / name).is_file()]
    if not texts:
        raise NsaError(
            f"expected the standard library's source files ({', '.join(names)}) in {folder}, found none: "
            "this Python comes without them, so give texts of your own"
        )
    return texts


def provenance(texts: Sequence[tuple[str, str]]) -> dict:
    """What the texts are, for the record of a result: origin, Python version, license, and each text's sha256.

    Args:
        texts: (name, text) pairs.
    """
    names = {name for name, _ in texts if name in HELD_OUT}
    standard = len(names) == len(texts) and texts == held_out_texts([name for name, _ in texts])
    return {
        "origin": "the Python standard library's source, held out from training" if standard else "given by the user",
        "python": platform.python_version() if standard else None,
        "license": "PSF-2.0" if standard else None,
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts},
    }
