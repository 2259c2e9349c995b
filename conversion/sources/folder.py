"""A folder as Transformers writes it: safetensors, or pickles where they are allowed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from torch import Tensor
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from nsa_hf.errors import NsaError, check_name
from nsa_hf.heads import auto_class
from nsa_hf.registration import PREFIX

from ..files.checkpoint import DTYPES, INDEX, SafetensorsCheckpoint
from ..files.loading import load_config, load_whole, reading
from ..files.model_folder import COMPANIONS, copy_file, refuse_links_out
from ..files.pieces import Piece, TensorInfo
from ..files.plain_json import read_json
from ..files.plain_yaml import LONGEST, load_plain
from .pickled import PickleCheckpoint
from .source import Source

# Longer names of licenses are not taken over from a source's card.
LONGEST_LICENSE = 200
# Files that are never copied, whatever their names.
NEVER_COPIED = (".py", ".bin", ".pt", ".pth", ".safetensors", ".gguf")


class SafetensorsSource(Source):
    """A folder as Transformers writes it.

    Args:
        name: as the user gave it.
        folder: holds config.json and the weights.
        revision: the Hub's commit, or None for local files.
        weights: False where the folder holds no weights, only `config` is then good for anything.
        allow_pickle: read pickles where there are no safetensors.
        trust_remote_code: read the config, and load the model, by the code in the folder.

    Attributes:
        tokenizer_code: the code that the tokenizer is defined by, see `tokenizer_code`.
        has_weights: whether the weights are there.
        checkpoint: the weights, where they are there.

    Raises:
        NsaError: something is missing or damaged, or needs code or pickles that are not allowed.
    """

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
        # a converted model's folder names our own code, and its tokenizer's code was trusted at conversion
        trusted = trust_remote_code or str(data["model_type"]).startswith(PREFIX)
        if not trusted:
            refuse_remote_code(name, data)
        self.tokenizer_code = tokenizer_code(folder)
        if self.tokenizer_code and not trusted:
            raise NsaError(
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
            # that of the first weights, as with Transformers' dtype="auto"
            floating = (info.dtype for info in self.table.values() if info.dtype.is_floating_point) if weights else ()
            config.dtype = next(iter(floating), torch.float32)
        if not config.dtype.is_floating_point or config.dtype not in DTYPES.values():
            raise NsaError(
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
                self.folder,
                auto_class(self.config),
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=self.trust_remote_code,
            )

    def _companions(self) -> list[Path]:
        """The files that travel with the model, see `save_companions`."""
        named = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        code = {self.folder / name for name in self.tokenizer_code if name.endswith(".py")}
        return sorted(check_name(path) for path in code | named if path in code or path.suffix not in NEVER_COPIED)

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
        except (OSError, ValueError):  # a card that cannot be read is as none
            return {}
        license_name = about.get("license") if isinstance(about, dict) else None
        has_license = isinstance(license_name, str) and len(license_name) <= LONGEST_LICENSE
        return {"license": license_name} if has_license else {}


def refuse_remote_code(name: str, config: dict[str, Any]) -> None:
    """Refuses a model that is defined by code in its own folder.

    Args:
        name: of the model, for the message.
        config: what its config.json holds.

    Raises:
        NsaError: its config names such code.
    """
    auto_map = config.get("auto_map") or {}
    code = [auto_map[auto] for auto in ("AutoModelForCausalLM", "AutoModel", "AutoConfig") if auto in auto_map]
    if code:
        raise NsaError(
            f"{name} is defined by code of its own ({code[0]}), which is not run unless trusted: read it, and give "
            f"--trust-remote-code if it computes what Transformers' own {config['model_type']} does; `nsa-hf verify` "
            "with the same option compares with what it computes"
        )


def tokenizer_code(folder: Path) -> list[str]:
    """The code that a folder's tokenizer is defined by.

    Returns:
        Names of files in the folder, and of classes in other repositories of the Hub (with "--" in them); empty for
        Transformers' own tokenizers.

    Raises:
        NsaError: a file is named that is not there or cannot be read.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    with reading(path):
        auto_map = read_json(path).get("auto_map") or {}
        # one class, or the slow and the fast one; old files have them without the key AutoTokenizer
        classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        classes = [name for name in ([classes] if isinstance(classes, str) else classes or []) if name]
        code = [name for name in classes if "--" in name]
        modules = dict.fromkeys(f"{name.split('.')[0]}.py" for name in classes if name not in code)
        if modules:
            refuse_links_out(folder, ("*.py",))
        for module in modules:
            if Path(module).name != module:
                raise ValueError(f"{module} is not in this folder")
            code += [module, *(Path(file).name for file in get_relative_import_files(folder / module))]
    return list(dict.fromkeys(code))


def _checkpoint(folder: Path, allow_pickle: bool) -> SafetensorsCheckpoint | PickleCheckpoint:
    """A folder's weights: safetensors, or pickles where they are allowed and there is nothing else."""
    has_safetensors = any(folder.glob("*.safetensors")) or (folder / INDEX).exists()
    return PickleCheckpoint(folder) if allow_pickle and not has_safetensors else SafetensorsCheckpoint(folder)
