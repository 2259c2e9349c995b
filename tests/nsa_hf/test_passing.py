"""nsa_hf/passing.py: arguments that a layer keeps from its attention. (What such models compute: test_features.py.)"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_families import sparse_of, tiny_dense, tokens


class Stop(Exception):
    """Leaves a forward."""


def test_arguments_are_left_for_the_length_of_a_forward():
    model = sparse_of(tiny_dense("nemotron"))
    attention = next(model.attention_layers())
    names = []
    attention.register_forward_pre_hook(lambda *_: names.append(set(attention.passed_arguments.by_name)))
    with torch.no_grad():
        model(tokens())
    assert names == [{"nsa_segments", "nsa_mode"}]
    assert attention.passed_arguments.by_name == {}


def test_nothing_is_left_by_a_forward_that_fails():
    model = sparse_of(tiny_dense("nemotron"))
    attention = next(model.attention_layers())

    def stop(*_):
        raise Stop

    attention.o_proj.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(tokens())
    assert attention.passed_arguments.by_name == {}


def test_a_copy_is_left_nothing():
    attention = next(sparse_of(tiny_dense("nemotron")).attention_layers())
    attention.passed_arguments.by_name = {"nsa_mode": None}
    assert copy.deepcopy(attention).passed_arguments.by_name == {}
