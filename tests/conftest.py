"""Fixtures that several test files share: a tiny random Llama, dense on disk and sparse in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_LLAMA, TINY_SIZES, byte_tokenizer, randomize_nsa, tiny_dense_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def gpu_memory_given_back(request: pytest.FixtureRequest):
    """Several processes test on one GPU: none keeps what its last test had."""
    yield
    if request.node.get_closest_marker("gpu") is not None:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def tiny_config_kwargs() -> dict:
    """Fields of a tiny `LlamaConfig`; the vocabulary is the 256 bytes."""
    return dict(TINY_LLAMA)


@pytest.fixture(scope="session")
def tiny_sizes() -> dict:
    """`nsa_*` sizes at which a hundred tokens cross every border."""
    return dict(TINY_SIZES)


@pytest.fixture(scope="session")
def tiny_dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny dense Llama with tokenizer, chat template and generation config."""
    folder = tmp_path_factory.mktemp("tiny_dense")
    tiny_dense_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_nsa_model():
    """Makes tiny sparse models: `tiny_nsa_model(random=True, **nsa_fields)`, backbone as in `tiny_dense_model`."""
    import nsa_hf

    def make(random: bool = True, **nsa_fields):
        dense = tiny_dense_model()
        torch.manual_seed(0)
        config = nsa_hf.nsa_config_from_dense(dense.config, **{**TINY_SIZES, **nsa_fields})
        model = nsa_hf.NsaLlamaForCausalLM(config).eval()
        missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
        assert not unexpected and all(".nsa." in name for name in missing)
        if random:
            randomize_nsa(model)
        return model

    return make
