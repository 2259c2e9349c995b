"""The `nsa_*` fields of a model's config, and their rules."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from nsa_hf.kernels import COMPRESSORS, Sizes

from .errors import NotPlain, NsaError
from .remote_code import SavedConfig

# Written into configs; older formats load, newer ones are refused.
NSA_FORMAT = 1

CHOICES = {
    "nsa_compression": COMPRESSORS,
    "nsa_rope_order": ("post", "pre"),
    "nsa_branch_kv": ("shared", "independent"),
    "nsa_gate": ("residual", "sigmoid", "blend"),
}
NOT_YET = {"nsa_rope_order": "pre"}


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class NsaConfigMixin(SavedConfig):
    """The fields that Native Sparse Attention adds to a dense family's config; the paper's letters in brackets."""

    nsa_kernel_size: int = option(32, "tokens of a compression block [l]")
    nsa_kernel_stride: int = option(16, "tokens between two compression blocks' starts [d]")
    nsa_block_size: int = option(64, "tokens of a selection block [l']")
    nsa_topk: int = option(16, "selected blocks per query, the forced ones counted [n]")
    nsa_init_blocks: int = option(1, "blocks at the start of the text that are always selected")
    nsa_local_blocks: int = option(2, "the query's own block and those just before it, always selected")
    nsa_window_size: int = option(512, "tokens of the sliding window, the query's own counted [w]")
    nsa_compression: str = option("mlp", "how a block becomes one key and one value: mean, linear or mlp")
    nsa_compression_dim: int = option(128, "width of the compression MLP")
    nsa_rope_order: str = option("post", "keys are compressed after RoPE (post) or before (pre)")
    nsa_branch_kv: str = option("shared", "one K and V for all branches (shared) or one each (independent)")
    nsa_gate: str = option("residual", "residual and blend start exactly dense; sigmoid is the paper's")
    nsa_gate_dim: int = option(64, "width of the gate's MLP")
    nsa_gate_blend: float = option(0.0, "with nsa_gate=blend: the share of the paper's gates, from 0 (dense) to 1")
    nsa_dense_layers: list[int] | None = option(None, "layers that keep dense attention; negative counts from the end")
    nsa_format: int = option(NSA_FORMAT, "version of this set of fields")

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.check_nsa()

    @property
    def nsa_sizes(self) -> Sizes:
        """The seven sizes, as the operation takes them."""
        # written out: `torch.compile` traces this
        return Sizes(
            kernel_size=self.nsa_kernel_size,
            kernel_stride=self.nsa_kernel_stride,
            block_size=self.nsa_block_size,
            topk=self.nsa_topk,
            init_blocks=self.nsa_init_blocks,
            local_blocks=self.nsa_local_blocks,
            window_size=self.nsa_window_size,
        )

    def is_nsa_layer(self, layer: int) -> bool:
        """Whether layer `layer` (counted from 0) has sparse attention: full attention, and not among the dense ones."""
        layer_types = getattr(self, "layer_types", None)
        full = not layer_types or layer_types[layer] == "full_attention"
        return full and layer not in (self.nsa_dense_layers or ())

    def check_nsa(self) -> None:
        """Brings the fields into their final form.

        Raises:
            NsaError: a field breaks a rule; names the field, the value and the rule.
        """
        if not isinstance(self.nsa_format, int) or self.nsa_format > NSA_FORMAT:
            raise NsaError(
                f"nsa_format is {self.nsa_format!r}, and this nsa_hf reads formats up to {NSA_FORMAT}: "
                "the checkpoint was written by a newer one, so update with `pip install -U nsa-hf`"
            )
        try:
            self.nsa_sizes.check("nsa_")
        except (TypeError, ValueError) as error:
            raise NsaError(str(error)) from None
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise NsaError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
            if getattr(self, name) == NOT_YET.get(name):
                raise NsaError(f"{name}={getattr(self, name)!r} is not supported yet: use {choices[0]!r}")
        for name in ("nsa_compression_dim", "nsa_gate_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise NsaError(f"{name} must be an int of at least 1, got {value!r}")
        if not 0 <= self.nsa_gate_blend <= 1:
            raise NsaError(f"nsa_gate_blend must be between 0 and 1, got {self.nsa_gate_blend!r}")
        self.nsa_dense_layers = self.checked_layers(self.nsa_dense_layers or [])

    def check_kinds(self) -> None:
        """Whether there is something to make sparse.

        Raises:
            NotPlain: no layer has full attention.
        """
        kinds = getattr(self, "layer_types", None)
        if kinds and "full_attention" not in kinds:
            slides = "sliding_window: " if "sliding_attention" in kinds else ""
            raise NotPlain(f"{slides}no layer has full attention ({', '.join(sorted(set(kinds)))}): nothing to convert")

    def checked_layers(self, layers: list[int]) -> list[int]:
        count = self.num_hidden_layers  # type: ignore[attr-defined]
        if isinstance(layers, str) or not all(isinstance(layer, int) and -count <= layer < count for layer in layers):
            raise NsaError(f"nsa_dense_layers must be layers within {-count} .. {count - 1}, got {layers!r}")
        return sorted({layer % count for layer in layers})

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: Transformers 5.17 renames kinds of layers in custom code, and these are its own family's."""
        return False

    def validate_output_attentions(self) -> None:
        """Both implementations of NSA return weights (the selected branch's, from the reference)."""


NSA_FIELDS = {member.name: member for member in fields(NsaConfigMixin)}
