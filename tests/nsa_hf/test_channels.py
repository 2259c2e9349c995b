"""nsa_hf/channels.py: which channels turn slowest, seen in the family's own attention."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_families import tiny_config
from transformers import LlamaConfig

from nsa_hf.channels import HEADS, queries_at, slowest_channels, slowest_of, small_model
from nsa_hf.errors import NotPlain

HALVES, NEIGHBOURS, FIRST_HALF, UNTURNED = [2, 3, 6, 7], [4, 5, 6, 7], [2, 3, 4, 5], [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", [HALVES, HALVES]),
        ("gemma3_text", [HALVES, HALVES]),
        ("qwen3", [HALVES, HALVES]),
        ("mixtral", [HALVES, HALVES]),
        # its norm of queries comes behind the rotation
        ("nanochat", [HALVES, HALVES]),
        # neighbouring channels are turned together
        ("cohere", [NEIGHBOURS, NEIGHBOURS]),
        # in float32 whatever they are given
        ("ernie4_5", [NEIGHBOURS, NEIGHBOURS]),
        # half of the channels are turned: 0 with 2 and 1 with 3, or 0 with 1 and 2 with 3
        ("stablelm", [FIRST_HALF, FIRST_HALF]),
        ("glm4", [NEIGHBOURS, NEIGHBOURS]),
        ("helium", [NEIGHBOURS, NEIGHBOURS]),
        # layers that turn nothing, and layers without attention
        ("exaone4", [HALVES, UNTURNED]),
        ("lfm2_moe", [[], HALVES]),
    ],
)
def test_the_slowest_channels_of_a_family(model_type, expected):
    assert slowest_channels(tiny_config(model_type), 4) == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "yarn", "rope_theta": 1e7, "factor": 8.0, "original_max_position_embeddings": 4096},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_a_large_model_costs_little_and_scaling_keeps_the_order(rope):
    config = LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=2,
        max_position_embeddings=32768,
        rope_parameters=rope,
    )
    state = torch.random.get_rng_state()
    expected = [*range(48, 64), *range(112, 128)]
    assert slowest_channels(config, 32) == [expected, expected]
    assert slowest_channels(config, 1) == [[63], [63]]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model_type", "expected", "never_made"),
    [
        ("qwen3_next", [[], FIRST_HALF], ("linear_attn", "experts")),
        ("nemotron_h", [[], [], UNTURNED, []], ("in_proj", "experts")),
        ("bamba", [[], NEIGHBOURS], ("mamba",)),
        ("granitemoehybrid", [[], UNTURNED], ("mamba", "experts")),
        ("mixtral", [HALVES, HALVES], ("experts", "gate")),
        # its state-space part comes before its attention, in the same layer
        ("falcon_h1", [HALVES, HALVES], ("feed_forward",)),
    ],
)
def test_only_what_leads_to_queries_is_made_and_run(model_type, expected, never_made):
    config = tiny_config(model_type)
    assert slowest_channels(config, 4) == expected
    with torch.no_grad():
        model, dim = small_model(config)
        found = queries_at(model, torch.randn(3, 1, HEADS * dim, dtype=torch.float64), 5)
    assert [layer in found for layer in range(config.num_hidden_layers)] == [bool(channels) for channels in expected]
    made = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    named = [name for name, _ in model.named_parameters()]
    for part in never_made:
        assert any(part in name for name in named) and not any(part in name for name in made)


def test_where_a_model_is_built_does_not_matter():
    config = tiny_config("llama")
    with torch.device("meta"):
        assert slowest_channels(config, 4) == [HALVES, HALVES]
    with ThreadPoolExecutor(4) as pool:
        families = ["llama", "cohere", "stablelm", "llama"] * 3
        found = list(pool.map(lambda name: slowest_channels(tiny_config(name), 4)[0], families))
    assert found == [HALVES, NEIGHBOURS, FIRST_HALF, HALVES] * 3


def test_positions_that_are_added_turn_nothing_and_are_refused():
    with pytest.raises(NotPlain, match="is not turned together with one other channel"):
        slowest_channels(tiny_config("ctrl"), 4)


def rotation(angles: list[float], positions: int) -> torch.Tensor:
    blocks = [torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) for _ in angles]
    for block, angle in zip(blocks, angles, strict=True):
        turn = torch.tensor(angle * positions, dtype=torch.float64)
        block *= torch.tensor([[turn.cos(), turn.sin()], [turn.sin(), turn.cos()]], dtype=torch.float64)
    return torch.block_diag(*blocks)


def test_slow_and_fast_channels_are_ordered_by_how_far_they_turn():
    angles = [1.0, 1e-7, 3e-4, 2e-7, 0.0, 3e-4]
    near, far = rotation(angles, 1), rotation(angles, 64)
    order = [8, 9, 2, 3, 6, 7, 4, 5, 10, 11, 0, 1]
    for count in range(1, 13):
        assert slowest_of(near, far, count) == sorted(order[:count])
