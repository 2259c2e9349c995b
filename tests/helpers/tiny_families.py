"""Every causal language model of Transformers, tiny and with random weights, biases and norms too."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import torch
from tiny_models import randomize_nsa
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nsa_hf.conversion import convert, export_dense, plan
from nsa_hf.conversion.files.checkpoint import SafetensorsCheckpoint
from nsa_hf.conversion.files.pieces import same_bits
from nsa_hf.errors import NotPlain
from nsa_hf.families import define_family, family_of, nsa_config_from_dense
from nsa_hf.recipes.training.losses import output_logits
from nsa_hf.releases import CACHE

# What the tests found of every family.
TABLE = Path(__file__).resolve().parents[2] / "recipes" / "results" / "families.csv"
VOCABULARY = 96
# With the paper's way of choosing blocks, as in tiny_models.py.
SIZES = {
    "nsa_selector": "compressed",
    "nsa_kernel_size": 4,
    "nsa_kernel_stride": 2,
    "nsa_block_size": 8,
    "nsa_topk": 3,
    "nsa_init_blocks": 1,
    "nsa_local_blocks": 1,
    "nsa_window_size": 6,
    "nsa_compression_dim": 8,
    "nsa_gate_dim": 8,
}
EXACT, LENGTH = 24, 60
# Rounding: dense and sparse add the same numbers in another order. 4e-6 was the most seen, with logits up to 7.
ROUNDING = 5e-5
# Set where a family's config has the field, whatever it calls it otherwise.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
BOTH_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
# What some families need besides; the rest is right for all.
OWN = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "sliding_window": 24,
        "rope_parameters": {"full_attention": ROPE | {"mrope_section": [2, 1, 1]}, "sliding_attention": ROPE},
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64, "mamba_d_head": 8, "mamba_d_state": 8},
    "granitemoehybrid": MAMBA | BOTH_KINDS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layer_types": None},
    "jetmoe": {"kv_channels": 8, "num_attention_heads": 4},
    "laguna": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [2, 4],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"layer_types": None, "sliding_window": 24, "num_hidden_layers": 3},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A family's config with the fields of `SMALL` that it has; kinds of layers one of each that its default has."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    fields = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    layer_types = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if "sliding_attention" in layer_types or getattr(default, "use_sliding_window", None):
        fields["sliding_window"] = 24
    if len(layer_types) > 1:
        fields |= {"layer_types": layer_types, "num_hidden_layers": len(layer_types)}
    fields = {**fields, **OWN.get(model_type, {}), **changes}
    return kind(**{name: value for name, value in fields.items() if value is not None or name != "layer_types"})


def tiny_dense(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A dense model with random weights in which every parameter matters."""
    config = tiny_config(model_type, **changes)
    return randomized(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY` letters, made here."""
    letters = (string.digits + string.ascii_letters + " " + string.punctuation)[: VOCABULARY - 4]
    vocabulary = {letter: index for index, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    core = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draws every parameter anew: matrices so that nothing dies out, vectors (norms, biases) around what they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data.add_(0.2 * noise)
        else:
            parameter.data.copy_(noise * (1.0 if "embed" in name else 1.2 / parameter.shape[-1] ** 0.5))
    return model.eval()


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def sparse_of(dense: PreTrainedModel, random: bool = False, **options) -> PreTrainedModel:
    """The converted model: the dense weights, and new parameters as a conversion makes them, or random."""
    config = nsa_config_from_dense(dense.config, **{**SIZES, **options})
    torch.manual_seed(1)
    model = family_of(config).causal_lm_class(config).eval()
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and missing and all(".nsa." in name for name in missing)
    if random:
        randomize_nsa(model)
    return model


def refusal(model_type: str) -> str | None:
    """Why a family's tiny model is not converted; None where it is."""
    try:
        define_family(model_type)
        config = nsa_config_from_dense(tiny_config(model_type), **SIZES)
        with torch.device("meta"):
            family_of(config).causal_lm_class(config)
    except NotPlain as reason:
        return str(reason)
    return None


def check_converted_and_exported(dense: PreTrainedModel, folder: Path, **saving) -> None:
    """As stored, and back: every tensor bit for bit, experts and fused projections as the source stores them."""
    dense.save_pretrained(folder / "dense", **saving)
    convert(folder / "dense", folder / "nsa", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(folder / "nsa")
    with torch.no_grad():
        difference = (model(tokens()).logits - dense(tokens()).logits).abs()[:, :EXACT]
        hidden = model.base_model(tokens(), use_cache=False).last_hidden_state
        assert (output_logits(model, hidden) - model(tokens()).logits).abs().max() < ROUNDING, "training's logits"
    assert difference.max() < ROUNDING
    check_plan(plan(folder / "dense", lengths=[LENGTH], **SIZES), model)
    report = export_dense(folder / "nsa", folder / "back")
    assert not report["trained"] and report["as_in_source"] == report["tensors"] and report["dropped"] > 0
    before, after = SafetensorsCheckpoint(folder / "dense"), SafetensorsCheckpoint(folder / "back")
    assert before.table.keys() == after.table.keys()
    assert all(same_bits(before.read(name), after.read(name)) for name in before.table)
    configs = [AutoConfig.from_pretrained(folder / name).to_dict() for name in ("dense", "back")]
    assert configs[0] | {"_name_or_path": ""} == configs[1] | {"_name_or_path": ""}


def check_plan(said: dict, model: PreTrainedModel) -> None:
    """What `plan` says of parameters and of the cache is what the model has."""
    new = {name: parameter.numel() for name, parameter in model.named_parameters() if ".nsa." in name}
    assert said["parameters"]["added"] == sum(new.values())
    assert [layer["layer"] for layer in said["layers"] if layer["becomes"] == "nsa"] == sorted(
        {int(re.search(r"\.(\d+)\.", name)[1]) for name in new}
    )
    with torch.no_grad():
        cache = model(tokens(1), use_cache=True)[CACHE]
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
    assert said["kv_cache"][0]["dense_bytes"] == kept
