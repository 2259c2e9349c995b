"""One family in one variant as Transformers' common tests want it: small configs, inputs, and a test class."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, MODEL_MAPPING_NAMES

import nsa_hf  # noqa: F401  (registers the sparse classes)
from nsa_hf.families import define_family, nsa_config_from_dense

# By Transformers' name: what the family's config needs beyond `SMALL`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
}
# The `nsa_*` fields that the variants differ in.
VARIANTS: dict[str, dict[str, Any]] = {
    f"{selector}-{kind}": {
        "nsa_selector": selector,
        "nsa_branch_kv": kind,
        "nsa_compression": "none" if (selector, kind) == ("channels", "shared") else "mlp",
    }
    for selector in ("channels", "compressed")
    for kind in ("shared", "independent")
}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {
    "nsa_kernel_size": 2,
    "nsa_kernel_stride": 1,
    "nsa_block_size": 2,
    "nsa_topk": 3,
    "nsa_init_blocks": 1,
    "nsa_local_blocks": 1,
    "nsa_window_size": 3,
    "nsa_compression_dim": 8,
    "nsa_gate_dim": 8,
}


class ModelTester:
    """What the common tests ask for: sizes, classes, configs and inputs.

    Args:
        family: of `FAMILIES`.
        variant: of `VARIANTS`, or `dense`.
    """

    batch_size, seq_length, is_training = 4, 9, True
    encoder_seq_length = key_length = seq_length

    def __init__(self, parent: unittest.TestCase | None, family: str, variant: str) -> None:
        self.parent, self.family, self.variant = parent, family, variant
        for name, value in self.fields.items():
            setattr(self, name, value)
        if variant == "dense":
            config = type(self.get_config())
            self.base_model_class, self.causal_lm_class = MODEL_MAPPING[config], MODEL_FOR_CAUSAL_LM_MAPPING[config]
        else:
            sparse = define_family(family)
            self.base_model_class, self.causal_lm_class = sparse.model_class, sparse.causal_lm_class
            # the tests know by these tables which classes have no loss
            MODEL_MAPPING_NAMES[sparse.config_class.model_type] = sparse.model_class.__name__
        self.config_class = type(self.get_config())
        self.head_classes = heads_of(self.config_class)

    @property
    def fields(self) -> dict[str, Any]:
        """The config's fields."""
        return {**SMALL, **FAMILIES[self.family]}

    def get_config(self) -> Any:
        """A small config."""
        dense = AutoConfig.for_model(self.family, **self.fields)
        if self.variant == "dense":
            return dense
        return nsa_config_from_dense(dense, **SIZES, **VARIANTS[self.variant])

    def prepare_config_and_inputs(self) -> tuple[Any, dict[str, Any]]:
        """A config, and rows of which some are padded on the left and some on the right."""
        ids = torch.randint(3, SMALL["vocab_size"], (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[1, :3] = mask[2, -2:] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}

    prepare_config_and_inputs_for_common = prepare_config_and_inputs


def heads_of(config_class: type) -> list[type]:
    """The classes of a family with other heads than the next token's, which the tests then know to give labels."""
    found = []
    for kind in ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING"):
        head = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING").get(config_class, None)
        if head is not None:
            getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")[config_class.model_type] = head.__name__
            found.append(head)
    return found


def make_test(family: str, variant: str) -> type[unittest.TestCase]:
    """The common tests of one family and variant, as a class for pytest."""
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_modeling_common import ModelTesterMixin

    tester = ModelTester(None, family, variant)
    classes = (tester.base_model_class, tester.causal_lm_class)

    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(self, family, variant)

    more = {
        "setUp": set_up,
        "all_model_classes": (*classes, *tester.head_classes),
        "all_generative_model_classes": classes[1:],
        "pipeline_model_mapping": {},
        "test_can_init_all_missing_weights_before_2023": True,
        "test_all_params_have_gradient": "moe" not in family,
        "_torch_compile_train_cls": classes[1],
    }
    return type("TestCommon", (ModelTesterMixin, GenerationTesterMixin, unittest.TestCase), more)
