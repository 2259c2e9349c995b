"""What is measured and how: the model with its tokenizer, and the settings of all suites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from nsa_hf.conversion.files.loading import read_config
from nsa_hf.conversion.rope import parse_rope_scaling, scaled_config
from nsa_hf.errors import NsaError

from ..load import load_nsa_model, load_tokenizer

# The lengths of haystacks where none are given, as far as the model has positions for them.
LENGTHS = (4096, 8192, 16384, 32768)
# How the model is run for each figure; dense stands beside every sparse one.
WAYS = ("dense", "sparse")


@dataclass(frozen=True)
class Settings:
    """What the suites are measured with.

    Attributes:
        text: 'stdlib', a text file, a folder, or rows of texts: for perplexity and for haystacks.
        documents, length: of perplexity, how many texts and how many tokens of each.
        lengths: tokens of each haystack and RULER prompt; None takes those of LENGTHS that the model can hold.
        depths: how many places of a haystack the needle is put in.
        samples: prompts for each place, and for each RULER task and length.
        rope_scaling: of the model in this evaluation, such as "yarn:4".
        ruler_data: rows in RULER's own format to be read instead of made, a .jsonl or a folder of them.
        tasks: lm-eval's, by name.
        include_path: a folder with more of its tasks, in YAML.
        few_shot: examples before each question of lm-eval; None: as the task says.
        limit: questions of each of lm-eval's tasks, and rows of each file of `ruler_data`; None: all.
    """

    text: str = "stdlib"
    documents: int = 2
    length: int = 2048
    lengths: tuple[int, ...] | None = None
    depths: int = 10
    samples: int = 2
    rope_scaling: str | None = None
    ruler_data: Path | None = None
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    few_shot: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("documents", "depths", "samples"):
            if getattr(self, name) < 1:
                raise NsaError(f"--{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Subject:
    """The model that is measured, its tokenizer, and its folder."""

    model: Any
    tokenizer: Any
    out: Path

    @classmethod
    def load(
        cls, out: Path, device: str, dtype: str, rope_scaling: str | None = None, trust_remote_code: bool = False
    ) -> Subject:
        """Reads it from its folder.

        Args:
            out: the model's folder.
            device: where it runs.
            dtype: float32, bfloat16 or float16.
            rope_scaling: see `Settings`.
            trust_remote_code: run the code that the tokenizer brings.

        Raises:
            NsaError: no model or no tokenizer, or RoPE that cannot be scaled so.
        """
        scaling = parse_rope_scaling(rope_scaling)
        config = read_config(out) if scaling is None else scaled_config(read_config(out), scaling)
        model = load_nsa_model(out, device, dtype, config)
        # the likeliest token each time, without what the checkpoint asks for besides, such as a penalty for repetition
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        own = {name: getattr(model.generation_config, name) for name in tokens}
        model.generation_config = GenerationConfig(do_sample=False, **own)
        return cls(model, load_tokenizer(out, trust_remote_code), out)

    @contextmanager
    def run(self, way: str) -> Iterator[None]:
        """Within it the model runs as one of WAYS says."""
        with self.model.dense_attention() if way == "dense" else nullcontext():
            yield

    @property
    def positions(self) -> int | None:
        """How many tokens the model can hold; None where there is no bound."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def lengths(self, settings: Settings) -> list[int]:
        """The lengths of prompts, answers included, that are asked for or that the model can hold.

        Raises:
            NsaError: one that is asked for is beyond the model's positions.
        """
        most = self.positions
        if most is None:
            return list(settings.lengths or LENGTHS)
        if settings.lengths is None:
            return [length for length in LENGTHS if length <= most] or [most]
        self.check_lengths(settings.lengths, "shorter --lengths")
        return list(settings.lengths)

    def check_lengths(self, lengths: Sequence[int], option: str) -> None:
        """NsaError where the model has no positions for texts of `lengths`; `option` is what to give in their place."""
        most = self.positions
        if most is not None and (beyond := [length for length in lengths if length > most]):
            raise NsaError(
                f"the model has {most:,} positions, and lengths of {', '.join(f'{x:,}' for x in beyond)} were asked "
                f"for: give {option}, or --rope-scaling yarn:{-(-max(beyond) // most)}"
            )
