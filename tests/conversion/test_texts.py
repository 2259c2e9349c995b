"""conversion/compare/texts.py"""

from __future__ import annotations

import hashlib
import platform

import pytest

from nsa_hf.conversion.compare.texts import HELD_OUT, held_out_texts, provenance, standard_library
from nsa_hf.errors import NsaError


def test_texts_are_the_interpreter_s_own_files_in_order_and_long():
    texts = held_out_texts()
    assert [name for name, _ in texts] == list(HELD_OUT)
    for name, text in texts:
        assert text == (standard_library() / name).read_text(encoding="utf-8")
        assert len(text) > 30_000, f"{name} is too short to show what sparsity does"


def test_absent_files_are_left_out_and_none_at_all_is_an_error():
    assert [name for name, _ in held_out_texts(["no_such_file.py", "tarfile.py"])] == ["tarfile.py"]
    with pytest.raises(NsaError, match=r"found none.*texts of your own"):
        held_out_texts(["no_such_file.py"])


def test_provenance_names_python_and_license_for_its_own_texts_only():
    own = held_out_texts(HELD_OUT[:1])
    record = provenance(own)
    assert (record["python"], record["license"]) == (platform.python_version(), "PSF-2.0")
    assert record["sha256"] == {own[0][0]: hashlib.sha256(own[0][1].encode()).hexdigest()}

    name = own[0][0]
    for texts in ([("mine.txt", "text")], [(name, own[0][1] + "x")], [*own, ("mine.txt", "text")]):
        assert provenance(texts)["origin"] == "given by the user"
        assert provenance(texts)["license"] is None
