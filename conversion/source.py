"""Where a dense model comes from: a folder of safetensors, a folder with a .gguf file (or that file), or a Hub id.

    source = open_source("path/or/id")
    source.config                        # the dense family's config
    for name, tensor in source.tensors(): ...
    for piece in source.pieces(names): ...   # the same, a few megabytes at a time
    source.load_model(torch.float32)     # Transformers' own dense model
    source.save_companions(out)          # tokenizer, chat template, generation config

Weights as PyTorch pickles, and models that bring code of their own, are opened only where that is asked for.

Values are carried as Transformers loads them: a safetensors tensor in the dtype it is stored in, a GGUF file in float32
(gguf_source.py says why).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from nsa_hf.registration import PREFIX

from .checkpoint import (
    DTYPES,
    CheckpointError,
    Piece,
    SafetensorsCheckpoint,
    TensorInfo,
    describe_file,
    pieces_of,
    read_json,
)
from .hub import download
from .loading import load_config, load_whole, reading
from .model_folder import COMPANIONS, INDICES, TERMS, WEIGHTS, copy_file, refuse_adapter, refuse_links_out
from .pickled import PickleCheckpoint
from .plain_yaml import LONGEST, load_plain

# Longer names of licenses are not taken over from a source's card.
LONGEST_LICENSE = 200
# What is no companion, whatever its name.
NEVER_COPIED = (".py", ".bin", ".pt", ".pth", ".safetensors", ".gguf")


class Source(ABC):
    """A dense model that can be converted.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        config: the dense family's config, its `dtype` set to that of the weights.
        revision: the Hub's commit, or None for local files.
    """

    kind: str

    def __init__(self, name: str, folder: Path, config: PreTrainedConfig, revision: str | None):
        self.name, self.folder, self.config, self.revision = name, folder, config, revision
        quantization = getattr(config, "quantization_config", None)
        if quantization:
            raise CheckpointError(
                f"{name} is quantised ({quantization}): expected plain weights, so dequantise it first"
            )

    @property
    @abstractmethod
    def table(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every stored tensor by name."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors as (name, CPU tensor), in the order of `table`."""

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`, read from the file itself in another way where `tensors` are what a loader made of it."""
        return self.tensors()

    def pieces(self, wanted: Container[str]) -> Iterator[Piece]:
        """The tensors in `wanted`, in the order of `table`, a few megabytes at a time."""
        for name, tensor in self.tensors():
            if name in wanted:
                yield from pieces_of(name, tensor)

    @abstractmethod
    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """Transformers' dense model of these weights on the CPU, in evaluation mode, with SDPA attention."""

    @abstractmethod
    def save_companions(self, out: Path) -> list[str]:
        """Writes tokenizer, chat template and generation config into `out`, where there are any; gives their names."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that the conversion reads."""

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """What the source says of itself, where it does: `license`, `model_name`."""

    def identity(self) -> dict:
        """Name, kind, revision, what the source says of itself, and `describe_file` of each file."""
        files = {path.relative_to(self.folder).as_posix(): describe_file(path) for path in sorted(self.files())}
        return {"name": self.name, "kind": self.kind, "revision": self.revision, **self.card(), "files": files}


class SafetensorsSource(Source):
    """A folder in Transformers' own layout."""

    kind = "safetensors"

    def __init__(
        self,
        name: str,
        folder: Path,
        revision: str | None,
        weights: bool = True,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ):
        with reading(folder / "config.json"):
            data = read_json(folder / "config.json")
            if not data.get("model_type"):
                raise ValueError("it names no model_type")
        # a folder of ours names our own code, and carries a tokenizer's that was trusted at conversion
        trusted = trust_remote_code or str(data["model_type"]).startswith(PREFIX)
        if not trusted:
            refuse_remote_code(name, data)
        self.tokenizer_code = tokenizer_code(folder)
        if self.tokenizer_code and not trusted:
            raise CheckpointError(
                f"{name} has a tokenizer that is defined by code of its own ({self.tokenizer_code[0]}), which is not "
                "taken unless trusted: read it, and give --trust-remote-code to carry it along"
            )
        config = load_config(folder, trust_remote_code)
        super().__init__(name, folder, config, revision)
        self.has_weights, self.trust_remote_code = weights, trust_remote_code
        if weights:
            self.checkpoint = _checkpoint(folder, allow_pickle)
            self.kind = "safetensors" if isinstance(self.checkpoint, SafetensorsCheckpoint) else "pickle"
        if config.dtype is None:
            # as Transformers' dtype="auto" has it
            floating = (info.dtype for info in self.table.values() if info.dtype.is_floating_point) if weights else ()
            config.dtype = next(iter(floating), torch.float32)
        if not config.dtype.is_floating_point or config.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{name}: its config says dtype {config.dtype}, and new parameters get that too: expected float32, "
                "bfloat16 or float16"
            )

    @property
    def table(self) -> dict[str, TensorInfo]:
        return self.checkpoint.table

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        with reading(self.folder):
            yield from self.checkpoint.tensors()

    def pieces(self, wanted: Container[str]) -> Iterator[Piece]:
        with reading(self.folder):
            yield from self.checkpoint.pieces(wanted)

    def load_model(self, dtype: torch.dtype) -> PreTrainedModel:
        with reading(self.folder):
            return load_whole(
                self.folder, dtype=dtype, attn_implementation="sdpa", trust_remote_code=self.trust_remote_code
            )

    def _companions(self) -> list[Path]:
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        code = {self.folder / name for name in self.tokenizer_code if name.endswith(".py")}
        return sorted(code | {path for path in found if path.suffix not in NEVER_COPIED})

    def save_companions(self, out: Path) -> list[str]:
        names = [path.relative_to(self.folder).as_posix() for path in self._companions()]
        for name in names:
            copy_file(self.folder, name, out)
        return names

    def files(self) -> list[Path]:
        return [self.folder / "config.json", *self.checkpoint.files, *self._companions()]

    def card(self) -> dict[str, Any]:
        path = self.folder / "README.md"
        try:
            with path.open(encoding="utf-8") as file:
                header = REGEX_YAML_BLOCK.search(file.read(LONGEST))
            about = load_plain(header.group(2)) if header else None
        except (OSError, ValueError):  # a card that cannot be read says nothing
            return {}
        said = about.get("license") if isinstance(about, dict) else None
        return {"license": said} if isinstance(said, str) and len(said) <= LONGEST_LICENSE else {}


def refuse_remote_code(name: str, config: dict[str, Any]) -> None:
    """Refuses a model that is defined by code in its own folder.

    Raises:
        CheckpointError: its config names such code.
    """
    named = config.get("auto_map") or {}
    code = [named[auto] for auto in ("AutoModelForCausalLM", "AutoModel", "AutoConfig") if auto in named]
    if code:
        raise CheckpointError(
            f"{name} is defined by code of its own ({code[0]}), which is not run unless trusted: read it, and give "
            f"--trust-remote-code if it computes what Transformers' own {config['model_type']} does; `nsa-hf verify` "
            "with the same option compares with what it computes"
        )


def tokenizer_code(folder: Path) -> list[str]:
    """The code that a folder's tokenizer is defined by: files in the folder, or classes in other repositories.

    Raises:
        CheckpointError: a file that is named is not there, or one that cannot be read.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    with reading(path):
        named = read_json(path).get("auto_map") or {}
        # the class, or the slow and the fast one; once without saying that they are a tokenizer's
        classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
        classes = [name for name in ([classes] if isinstance(classes, str) else classes or []) if name]
        found = [name for name in classes if "--" in name]
        modules = dict.fromkeys(f"{name.split('.')[0]}.py" for name in classes if name not in found)
        if modules:
            refuse_links_out(folder, ("*.py",))
        for module in modules:
            if Path(module).name != module:
                raise ValueError(f"{module} is not in this folder")
            found += [module, *(Path(file).name for file in get_relative_import_files(folder / module))]
    return list(dict.fromkeys(found))


def _checkpoint(folder: Path, allow_pickle: bool) -> SafetensorsCheckpoint | PickleCheckpoint:
    if (
        allow_pickle
        and not any(folder.glob("*.safetensors"))
        and not (folder / "model.safetensors.index.json").exists()
    ):
        return PickleCheckpoint(folder)
    return SafetensorsCheckpoint(folder)


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
        CheckpointError: it is not there, damaged, or of a kind that is not read.
    """
    from .gguf_source import GgufSource  # here: it imports this module

    if not str(src):
        raise CheckpointError("the source is empty: expected a model's folder, a .gguf file or a Hub id")
    path = Path(src).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        refuse_adapter(path.parent)
        refuse_links_out(path.parent, TERMS)
        return GgufSource(str(src), path, None)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{src} is a file: expected a model's folder, a .gguf file or a Hub id")
    commit = None
    if not path.exists():
        path, commit = download(str(src), revision, weights, allow_pickle)
    refuse_adapter(path)
    pickles = ("*.bin",) if allow_pickle else ()
    refuse_links_out(path, ("config.json", "README.md", *WEIGHTS, *INDICES, *pickles, *COMPANIONS))
    files = sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").is_file():
        if len(files) > 1:
            raise CheckpointError(
                f"{src} holds {len(files)} .gguf files: name one, {' or '.join(f.name for f in files)}"
            )
        return GgufSource(str(src), files[0], commit)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{src} has neither config.json nor a .gguf file: expected a model's folder (of a Hub "
            "repository of .gguf files, download the one you want and give its path)"
        )
    has_weights = weights or commit is None
    return SafetensorsSource(str(src), path, commit, has_weights, allow_pickle, trust_remote_code)
