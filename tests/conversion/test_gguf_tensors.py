"""conversion/sources/gguf/tensors.py: read here, a file is what Transformers' loader makes of it."""

from __future__ import annotations

import pytest
from gguf_file import ARCHITECTURES, write_gguf, write_gguf_of
from packaging.version import Version

from nsa_hf.conversion import convert, verify
from nsa_hf.conversion.files.pieces import same_bits
from nsa_hf.conversion.sources import open_source
from nsa_hf.conversion.sources.gguf import source as gguf_source
from nsa_hf.errors import NsaError
from nsa_hf.releases import INSTALLED


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_read_here_it_is_what_transformers_loads(model_type, tmp_path):
    source = open_source(write_gguf_of(model_type, tmp_path / "tiny.gguf"))
    try:
        loaded, stored = dict(source.tensors()), dict(source.stored())
    except NsaError as error:
        # a family's quantised types that an older Transformers does not know
        if "not supported yet" not in str(error) or Version("5.23") <= INSTALLED:
            raise
        return
    assert loaded.keys() == stored.keys()
    assert all(same_bits(tensor, stored[name]) for name, tensor in loaded.items())
    rope = source.config.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == 12345.0


def test_a_loader_that_loses_something_is_found(tiny_sizes, tmp_path, monkeypatch):
    load_whole = gguf_source.load_whole

    def lossy(*args, **kwargs):
        model = load_whole(*args, **kwargs)
        model.model.norm.weight.data[5] = 1
        return model

    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_source, "load_whole", lossy)
    result = verify(path, convert(path, tmp_path / "out", **tiny_sizes), length=64, documents=1)
    assert (result["exact"], result["tensors"]["changed"]) == (False, ["model.norm.weight"])
