"""nsa_hf/modes.py: what a forward was run with belongs to it, to its recomputation and to its thread."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny_families import sparse_of, tiny_dense
from transformers import DynamicCache

from nsa_hf import NsaError
from nsa_hf.releases import CACHE

# Llama's layers hand all arguments on to their attention, those of StableLM do not.
FAMILIES = ["llama", "stablelm"]


def tokens(seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(seed))


def tiny(family: str = "llama", **options):
    return sparse_of(tiny_dense(family), random=True, **options)


def logits(model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x, use_cache=False).logits


def dense_logits(model, x: torch.Tensor) -> torch.Tensor:
    with model.dense_attention():
        return logits(model, x)


def in_a_thread(function, *args):
    """What a function returns in another thread, which begins and ends now."""
    returned: list = []
    thread = threading.Thread(target=lambda: returned.append(function(*args)))
    thread.start()
    thread.join()
    return returned[0]


def changed(**fields):
    """A context in which a model's config says something else."""

    @contextmanager
    def context(model):
        before = {name: getattr(model.config, name) for name in fields}
        for name, value in fields.items():
            setattr(model.config, name, value)
        yield
        for name, value in reversed(before.items()):
            setattr(model.config, name, value)

    return context


def dense(model):
    return model.dense_attention()


def as_it_is(model):
    return nullcontext()


# What a forward is run in, and what has changed when the backward pass comes.
BETWEEN = {
    "dense, then sparse": (dense, as_it_is),
    "sparse, then dense": (as_it_is, dense),
    "blend": (changed(nsa_gate_blend=0.2), changed(nsa_gate_blend=0.9)),
    "sizes": (as_it_is, changed(nsa_topk=2, nsa_window_size=12)),
    "weights": (as_it_is, changed(_attn_implementation="eager", output_attentions=True)),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recomputation_runs_as_its_forward_did(family, between, reentrant):
    (forward, backward), gradients = BETWEEN[between], []
    for checkpointing in (False, True):
        model = tiny(family, nsa_gate="blend", nsa_gate_blend=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with forward(model):
            loss = model(tokens(), labels=tokens(), use_cache=False).loss
        with backward(model):
            loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    trained = [name for name, gradient in gradients[0].items() if gradient is not None]
    assert trained == [name for name, gradient in gradients[1].items() if gradient is not None]
    assert any(".nsa." in name for name in trained) is (forward is not dense)
    for name in trained:
        torch.testing.assert_close(gradients[1][name], gradients[0][name])


@pytest.mark.parametrize("branch_kv", ["shared", "independent"])
def test_other_threads_run_as_they_would(branch_kv):
    model, x = tiny(nsa_branch_kv=branch_kv), tokens()
    sparse, dense = logits(model, x), dense_logits(model, x)
    assert (sparse - dense).abs().max() > 1e-2
    text = model.generate(x, max_new_tokens=4, do_sample=False)
    with model.dense_attention(), model.record_selection() as record:
        assert torch.equal(in_a_thread(logits, model, x), sparse) and not record
        generated = in_a_thread(lambda: model.generate(x, max_new_tokens=4, do_sample=False))
        assert torch.equal(generated, text)
        assert torch.equal(in_a_thread(dense_logits, model, x), dense), "a context of its own"
        assert torch.equal(logits(model, x), dense), "it ended in the other thread only"


@pytest.mark.parametrize("branch_kv", ["shared", "independent"])
def test_some_layers_run_dense(branch_kv):
    model, x = tiny(nsa_branch_kv=branch_kv), tokens()
    for layers in ([0], [-1], [0, 1]):
        other = type(model)(type(model.config)(**{**model.config.to_dict(), "nsa_dense_layers": layers})).eval()
        left_out = other.load_state_dict(model.state_dict(), strict=False).unexpected_keys
        assert left_out and all(".nsa." in name for name in left_out)
        with model.dense_attention(layers):
            assert torch.equal(logits(model, x), logits(other, x))
            with model.record_selection() as record:
                assert not torch.equal(in_a_thread(logits, model, x), logits(model, x)), "this thread's"
            assert record.keys() == {0, 1} - {layer % 2 for layer in layers}
    with model.dense_attention([0]), model.dense_attention([1]):
        assert torch.equal(logits(model, x), dense_logits(model, x))
    with pytest.raises(NsaError, match=r"^layers must be layers within -2 .. 1, got \[2\]"), model.dense_attention([2]):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads_in_one_layer_keep_their_arguments_apart(family):
    model, texts = tiny(family), [tokens(1), tokens(2)[:, :40]]
    alone = [dense_logits(model, texts[0]), logits(model, texts[1])]
    both = threading.Barrier(2, timeout=60)
    for layer in model.model.layers:
        # after the layer has its arguments, and before its attention has them
        layer.input_layernorm.register_forward_hook(lambda *_: (both.wait(), None)[1])
    together: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda: together.update({0: dense_logits(model, texts[0])})),
        threading.Thread(target=lambda: together.update({1: logits(model, texts[1])})),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])


def test_contexts_may_end_in_any_order():
    model, x = tiny(), tokens()
    sparse, dense = logits(model, x), dense_logits(model, x)

    def steps():
        with model.dense_attention():
            yield
            yield

    first, second = steps(), steps()
    next(first), next(second)
    first.close()
    assert torch.equal(logits(model, x), dense), "the second is open yet"
    in_a_thread(second.close)
    assert torch.equal(logits(model, x), sparse), "wherever it was ended"
    with pytest.raises(RuntimeError), model.dense_attention(), model.dense_attention():
        raise RuntimeError
    assert torch.equal(logits(model, x), sparse)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_in_no_context(copied, tmp_path):
    model, x = tiny("stablelm"), tokens()
    sparse = logits(model, x)
    with model.dense_attention():
        clone = copied(model)
        assert torch.equal(logits(clone, x), sparse)
        model.save_pretrained(tmp_path)
    assert torch.equal(dense_logits(clone, x), dense_logits(model, x))
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), x), sparse)


def test_replicas_of_data_parallel_run_as_the_thread_that_made_them():
    model, x = tiny(), tokens()
    with model.dense_attention():
        replica = model.model._replicate_for_data_parallel()
        hidden, expected = in_a_thread(replica, x)[0], model.model(x)[0]
        assert torch.equal(hidden, expected) and not torch.equal(in_a_thread(model.model, x)[0], expected)


def test_compiled_code_looks_at_what_is_open_in_its_thread():
    model, x = sparse_of(tiny_dense("stablelm", num_hidden_layers=1), random=True), tokens()
    sparse, dense = logits(model, x), dense_logits(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, x), sparse)
    for _ in range(2):
        torch.testing.assert_close(dense_logits(compiled, x), dense)
        with model.dense_attention():
            torch.testing.assert_close(in_a_thread(logits, compiled, x), sparse)
    with model.dense_attention([0]):
        torch.testing.assert_close(logits(compiled, x), dense)
    with model.record_selection() as record:
        torch.testing.assert_close(logits(compiled, x), sparse)
    assert record.keys() == {0} and record[0].shape == (2, 60, 2, 3)
    torch.testing.assert_close(logits(compiled, x), sparse)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_records_nothing(reentrant):
    model, x, other = tiny().train(), tokens(1), tokens(2)
    with model.record_selection() as outer, model.record_selection() as record:
        model(other)
        expected = record[1]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with model.record_selection() as record:
        loss = model(x, labels=x, use_cache=False).loss
        assert not torch.equal(record[1], expected)
        model(other, use_cache=False)
        loss.backward()
        assert torch.equal(record[1], expected), "the last forward's"
    assert torch.equal(outer[1], expected), "a context around another one has them too"


def test_of_what_was_attended_with_each_context_keeps_its_own():
    model, x = tiny().train(), tokens()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with model.record_attention() as whole, model.record_attention(lambda attended: attended.key[:, :, 7]) as kept:
        model(x, labels=x, use_cache=False).loss.backward()
    assert whole.keys() == kept.keys() == {0, 1}
    assert all(torch.equal(kept[layer], whole[layer].key[:, :, 7]) for layer in kept)
    with pytest.raises(NsaError, match=r"takes a function of .*, got \[0\]"), model.record_attention([0]):
        pass


def test_gradient_checkpointing_keeps_no_cache():
    """Transformers' layers drop it then: a filled one is refused, and none is made where none was given."""
    model, x, cache = tiny().train(), tokens(), DynamicCache()
    with torch.no_grad():
        model(x[:, :40], use_cache=True, **{CACHE: cache})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(NsaError, match="In training with gradient checkpointing it hands none over: give no cache"):
        model(x[:, 40:], **{CACHE: cache})
    # a family that makes one all the same
    model = tiny("nemotron_h").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model(x, labels=x)
    out.loss.backward()
    assert out.get(CACHE) is None
