"""Where a dense model comes from: a folder of safetensors, a folder with a .gguf file (or that file), or a Hub id.

    source = open_source("path/or/id")
    source.config                        # the dense family's config
    for name, tensor in source.tensors(): ...
    for piece in source.pieces(names): ...   # the same, a few megabytes at a time
    source.load_model(torch.float32)     # Transformers' own dense model
    source.save_companions(out)          # tokenizer, chat template, generation config

Weights as PyTorch pickles, and models that bring their own code, are opened only where an option allows it.

Values are carried as Transformers loads them: a safetensors tensor in the dtype it is stored in, a GGUF file in float32
(gguf/source.py says why).
"""

from __future__ import annotations

from pathlib import Path

from nsa_hf.errors import NsaError, check_path

from ..files.model_folder import COMPANIONS, INDICES, TERMS, WEIGHTS, refuse_adapter, refuse_links_out
from .folder import SafetensorsSource
from .gguf.source import GgufSource
from .hub import download
from .source import Source

__all__ = ["Source", "open_source"]


def open_source(
    src: str | Path,
    revision: str | None = None,
    weights: bool = True,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    """Opens a dense model.

    Args:
        src: a local folder, a .gguf file, or a Hub id (`owner/name`), which is downloaded into the Hub's cache.
        revision: branch, tag or commit of a Hub id.
        weights: False downloads no weights of a Hub id; only `config` is then good for anything.
        allow_pickle: read `pytorch_model.bin` where there are no safetensors (with `weights_only`, see pickled.py).
        trust_remote_code: read the config, and load the dense model, by the code in its folder; the code of its
            tokenizer is a companion then.

    Raises:
        NsaError: it is not there, damaged, or of a kind that is not read.
    """
    path = check_path(src)
    if not str(src):
        raise NsaError("the source is empty: expected a model's folder, a .gguf file or a Hub id")
    if path.is_file() and path.suffix == ".gguf":
        refuse_adapter(path.parent)
        refuse_links_out(path.parent, TERMS)
        return GgufSource(str(src), path, None)
    if path.exists() and not path.is_dir():
        raise NsaError(f"{src} is a file: expected a model's folder, a .gguf file or a Hub id")
    commit = None
    if not path.exists():
        path, commit = download(str(src), revision, weights, allow_pickle)
    refuse_adapter(path)
    pickles = ("*.bin",) if allow_pickle else ()
    refuse_links_out(path, ("config.json", "README.md", *WEIGHTS, *INDICES, *pickles, *COMPANIONS))
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return GgufSource(str(src), files[0], commit)
        if files:
            raise NsaError(f"{src} holds {len(files)} .gguf files: name one, {' or '.join(f.name for f in files)}")
        raise NsaError(
            f"{src} has neither config.json nor a .gguf file: expected a model's folder (of a Hub "
            "repository of .gguf files, download the one you want and give its path)"
        )
    has_weights = weights or commit is None
    return SafetensorsSource(str(src), path, commit, has_weights, allow_pickle, trust_remote_code)
