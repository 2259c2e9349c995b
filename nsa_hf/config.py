"""A sparse model's config: the rules of the `nsa_*` fields, and the way from a dense config and back.

The fields themselves: fields.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from nsa_hf.kernels import Sizes

from .channels import slowest_channels
from .errors import NotPlain, NsaError
from .fields import NSA_FIELDS, NSA_FORMAT, NsaFields, named_fields
from .recommend import Choice, chosen_fields, recommend
from .remote_code import SavedConfig

CHOICES = {name: member.metadata["choices"] for name, member in NSA_FIELDS.items() if member.metadata["choices"]}
NOT_YET = {"nsa_rope_order": "pre"}
# Fields that name a config's own classes and files: not copied from a dense config to a sparse one, or back. The last
# is the folder that it was read from, where TRL's trainers look for a reference model.
OWN_TO_A_CONFIG = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path")


class NsaConfigMixin(NsaFields, SavedConfig):
    """In front of a dense family's config: the fields of Native Sparse Attention, and their rules.

    Attributes:
        dense_class: the family's config class.
        names_with_heads: of the family's models with a head, the dense class's name to the sparse one's; the causal
            language model's first.
    """

    dense_class: ClassVar[type[PreTrainedConfig]]
    names_with_heads: ClassVar[Mapping[str, str]]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.check_nsa()
        if self.nsa_selector == "channels" and self.nsa_selector_channels is None:
            self.nsa_selector_channels = slowest_channels(self.to_dense_config(), self.nsa_selector_dim)
        if self.nsa_selector_channels is not None:
            self.nsa_selector_dim = max(map(len, self.nsa_selector_channels))

    @classmethod
    def from_dense_config(cls, dense_config: PreTrainedConfig, **nsa_fields: Any) -> Self:
        """The sparse config of a dense one of the same family: see `chosen_from_dense`."""
        return cls.chosen_from_dense(dense_config, nsa_fields)[0]

    @classmethod
    def chosen_from_dense(
        cls, dense_config: PreTrainedConfig, nsa_fields: Mapping[str, Any]
    ) -> tuple[Self, dict[str, Choice]]:
        """The sparse config of a dense one of the same family, and what was chosen for it.

        Args:
            dense_config: of `dense_class`.
            nsa_fields: `nsa_*` fields, with or without the prefix; what is not given is chosen as recommended, see
                recommend.py.

        Returns:
            The config, and the choices by name.

        Raises:
            NsaError: a field is unknown or breaks a rule, or no layer has full attention.
        """
        nsa_fields = named_fields(nsa_fields)
        fields = {name: value for name, value in dense_config.to_dict().items() if name not in OWN_TO_A_CONFIG}
        if covers_every_position(dense_config):
            # such a window hides nothing, and caches would be cut to it
            fields["sliding_window"] = None
        names = [
            cls.names_with_heads[name] for name in dense_config.architectures or [] if name in cls.names_with_heads
        ]
        fields["architectures"] = names[:1] or list(cls.names_with_heads.values())[:1]
        choices = recommend(dense_config, nsa_fields)
        config = cls(**fields, **{**nsa_fields, **chosen_fields(choices)})
        config.check_kinds()
        return config, choices

    def with_fields(self, **nsa_fields: Any) -> Self:
        """The same config with other `nsa_*` fields. With another selector or number of channels, these are found anew.

        Raises:
            NsaError: a field breaks a rule, or the family's rotation is none of which channels can be found.
        """
        index: dict[str, Any] = {}
        if {"nsa_selector", "nsa_selector_dim"} & nsa_fields.keys():
            index["nsa_selector_channels"] = None
        if nsa_fields.get("nsa_selector") == "compressed":
            index |= {"nsa_selector_dim": None, "nsa_selector_bits": 16}
        return type(self)(**{**self.to_dict(), **index, **nsa_fields})  # type: ignore[attr-defined]

    def to_dense_config(self) -> PreTrainedConfig:
        """The dense config of this one: the same without the `nsa_*` fields."""
        fields: dict[str, Any] = self.to_dict()  # type: ignore[attr-defined]
        fields = {name: value for name, value in fields.items() if name not in (*NSA_FIELDS, *OWN_TO_A_CONFIG)}
        own = self.architectures or []  # type: ignore[attr-defined]
        names = [dense for dense, sparse in self.names_with_heads.items() if sparse in own]
        return self.dense_class(**fields, architectures=names[:1] or list(self.names_with_heads)[:1])

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

    @property
    def nsa_exact_tokens(self) -> int:
        """The tokens up to which a converted model is the dense one: none where its gates do not start dense."""
        paper = self.nsa_gate == "sigmoid" or (self.nsa_gate == "blend" and self.nsa_gate_blend > 0)
        return 0 if paper else self.nsa_sizes.exact_tokens

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
        # what is saved again has all fields of this format
        self.nsa_format = NSA_FORMAT
        try:
            self.nsa_sizes.check("nsa_")
        except (TypeError, ValueError) as error:
            raise NsaError(str(error)) from None
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise NsaError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
            if getattr(self, name) == NOT_YET.get(name):
                raise NsaError(f"{name}={getattr(self, name)!r} is not supported yet: use {choices[0]!r}")
        self.check_selector()
        for name in ("nsa_compression_dim", "nsa_gate_dim"):
            value = getattr(self, name)
            if not is_int(value) or value < 1:
                raise NsaError(f"{name} must be an int of at least 1, got {value!r}")
        if (
            isinstance(self.nsa_gate_blend, bool)
            or not isinstance(self.nsa_gate_blend, int | float)
            or not 0 <= self.nsa_gate_blend <= 1
        ):
            raise NsaError(f"nsa_gate_blend must be between 0 and 1, got {self.nsa_gate_blend!r}")
        self.nsa_dense_layers = self.checked_layers(self.nsa_dense_layers or [])

    def check_selector(self) -> None:
        """Checks how blocks are scored.

        Raises:
            NsaError: a field breaks a rule.
        """
        if self.nsa_compression == "none":
            for name, wanted in (("nsa_selector", "channels"), ("nsa_branch_kv", "shared")):
                if getattr(self, name) != wanted:
                    raise NsaError(
                        f"nsa_compression='none' needs {name}={wanted!r}, got {getattr(self, name)!r}: "
                        "choose another compression, or that"
                    )
        if not isinstance(self.nsa_selector_bits, int) or self.nsa_selector_bits not in (16, 8):
            raise NsaError(
                "nsa_selector_bits must be 16 (the index's keys as the model's) or 8 (with a scale for each token and "
                f"head), got {self.nsa_selector_bits!r}"
            )
        count, channels = self.nsa_selector_dim, self.nsa_selector_channels
        if count is not None and not (is_int(count) and 1 <= count <= 256):
            raise NsaError(
                f"nsa_selector_dim must be an int within 1 .. 256, or None for half of a head, got {count!r}"
            )
        if channels is not None:
            layers = self.num_hidden_layers  # type: ignore[attr-defined]
            good = isinstance(channels, list) and len(channels) == layers
            if not good or not all(
                isinstance(layer, list) and all(is_int(one) and one >= 0 for one in layer) for layer in channels
            ):
                raise NsaError(
                    f"nsa_selector_channels must be a list of channels for each of {layers} layers, got {channels!r}"
                )
            longest = max(map(len, channels), default=0)
            if any(layer != sorted(set(layer)) for layer in channels) or longest > 256:
                raise NsaError(
                    f"nsa_selector_channels must be ascending, each once, at most 256 in a layer, got {channels!r}"
                )
            if count not in (None, longest):
                raise NsaError(
                    f"nsa_selector_dim is {count}, and nsa_selector_channels has {longest} channels: give one of them"
                )
        if self.nsa_selector == "compressed":
            for name, unused in (
                ("nsa_selector_dim", None),
                ("nsa_selector_channels", None),
                ("nsa_selector_bits", 16),
            ):
                if getattr(self, name) != unused:
                    raise NsaError(
                        f"{name} is of an index, and nsa_selector is 'compressed': leave it out, or choose 'channels'"
                    )

    def check_kinds(self) -> None:
        """Checks that some layer can be made sparse, by the kinds of the layers.

        Raises:
            NotPlain: no layer has full attention.
        """
        kinds = getattr(self, "layer_types", None)
        if kinds and "full_attention" not in kinds:
            slides = "sliding_window: " if "sliding_attention" in kinds else ""
            raise NotPlain(f"{slides}no layer has full attention ({', '.join(sorted(set(kinds)))}): nothing to convert")

    def checked_layers(self, layers: list[int], name: str = "nsa_dense_layers") -> list[int]:
        """The numbers of layers in ascending order, each once; negative ones count from the end.

        Args:
            layers: the numbers.
            name: what they were given as, for the message.

        Raises:
            NsaError: there is no such layer.
        """
        count = self.num_hidden_layers  # type: ignore[attr-defined]
        if not isinstance(layers, list | tuple | set) or not all(
            is_int(layer) and -count <= layer < count for layer in layers
        ):
            raise NsaError(f"{name} must be layers within {-count} .. {count - 1}, got {layers!r}")
        return sorted({layer % count for layer in layers})

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, because the kinds of layers are Transformers' own: its release 5.17 renames those of custom code."""
        return False

    def validate_output_attentions(self) -> None:
        """Allows `output_attentions` with both implementations; Transformers refuses it for all but `eager`."""


def covers_every_position(config: PreTrainedConfig) -> bool:
    """Whether one sliding window of all layers is as long as the longest text (as in Phi-4-mini)."""
    window, longest = (getattr(config, name, None) for name in ("sliding_window", "max_position_embeddings"))
    return not getattr(config, "layer_types", None) and bool(window and longest and window >= longest)


def is_int(value: object) -> bool:
    """Whether it is an int, which a bool is to Python and not here."""
    return isinstance(value, int) and not isinstance(value, bool)
