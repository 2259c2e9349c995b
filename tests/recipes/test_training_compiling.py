import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training import compiling
from nsa_hf.recipes.training.compiling import compile_layers, decoder_layers, uncompiled
from nsa_hf.releases import checkpoint_activations


def counted(monkeypatch):
    """Runs of compiled graphs, which are noted instead of compiled."""
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(graph) or graph(*args)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile(call, backend=backend, **options))
    monkeypatch.setattr(compiling, "COMPILED", {})
    return ran


def test_alike_layers_share_a_graph_and_compute_the_same(tiny_nsa_model, monkeypatch):
    ran = counted(monkeypatch)
    model = tiny_nsa_model()
    ids = torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        compile_layers(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain)
    assert len(ran) == len(list(decoder_layers(model))) == model.config.num_hidden_layers
    assert len(set(ran)) == 1


def test_only_layers_run_uncompiled(tiny_nsa_model, monkeypatch):
    ran = counted(monkeypatch)
    model = tiny_nsa_model()
    compile_layers(model)
    other = torch.compile(lambda x: x.sin() + 1)
    ids = torch.randint(256, (1, 20))
    with uncompiled(), torch.no_grad():
        with uncompiled():
            pass
        model(ids)
        assert not ran
        other(torch.ones(3))
        assert len(ran) == 1
    model(ids)
    assert len(ran) > 1


def test_a_layer_is_compiled_and_not_its_checkpointing(tiny_nsa_model, monkeypatch):
    """In the releases that checkpoint a layer's forward, too: what is done around it is no part of a graph."""
    ran = counted(monkeypatch)
    ids = torch.randint(256, (1, 150), generator=torch.Generator().manual_seed(2))
    gradients = []
    for compiles in (False, True):
        model = tiny_nsa_model().train()
        checkpoint_activations(model, 1)
        if compiles:
            compile_layers(model)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
    operators = {str(node.target) for graph in ran for node in graph.graph.nodes}
    assert operators and not any("checkpoint" in operator for operator in operators)
    assert len(ran) == 2 * model.config.num_hidden_layers


def test_compiled_twice_is_compiled_once(tiny_nsa_model, monkeypatch):
    ran = counted(monkeypatch)
    model = tiny_nsa_model()
    compile_layers(model)
    compile_layers(model)
    with torch.no_grad():
        model(torch.randint(256, (1, 150)), use_cache=False)
    assert len(ran) == model.config.num_hidden_layers


def test_a_layer_whose_forward_is_its_own_is_refused(tiny_nsa_model):
    """As accelerate makes it, when a model is loaded with `device_map`."""
    model = tiny_nsa_model()
    add_hook_to_module(next(decoder_layers(model)), ModelHook())
    with pytest.raises(NsaError, match=r"NsaLlamaDecoderLayer has a forward of its own, .* load it without"):
        compile_layers(model)
