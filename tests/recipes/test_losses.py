import pytest
import torch
import torch.nn.functional as F
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from nsa_hf.recipes.training.losses import IGNORED, chunked_losses, loss_sums, output_logits


def example(batch=2, tokens=13, width=8, vocabulary=31):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(vocabulary, (batch, tokens), generator=generator)
    labels[0, 3] = labels[1, -1] = IGNORED
    return (
        draw(batch, tokens, width),
        draw(batch, tokens, width),
        draw(vocabulary, width),
        draw(vocabulary, width),
        labels,
    )


def whole_losses(hidden, teacher_hidden, weight, teacher_weight, labels):
    """The plain definition on whole logits."""
    log_student = (hidden @ weight.T).float().log_softmax(-1)
    teacher = (teacher_hidden @ teacher_weight.T).float().softmax(-1)
    counted = labels != IGNORED
    nll = -log_student.gather(-1, labels.clamp(min=0)[..., None])[..., 0][counted].mean()
    kl = (teacher * (teacher.log() - log_student)).sum(-1)[counted].mean()
    return nll, kl


@pytest.mark.parametrize("chunk", [1, 5, 26, 100])
def test_chunks_equal_the_whole_loss_and_its_gradient(chunk):
    hidden, teacher_hidden, weight, teacher_weight, labels = example()
    results = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            head, teacher_head = (lambda x, w=w: x @ w.T), (lambda x: x @ teacher_weight.T)
            nll, kl = chunked_losses(
                h, head, labels, teacher_hidden=teacher_hidden, teacher_head=teacher_head, chunk=chunk
            )
        else:
            nll, kl = whole_losses(h, teacher_hidden, w, teacher_weight, labels)
        (nll + 3 * kl).backward()
        results.append((nll.detach(), kl.detach(), h.grad, w.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=2e-6, atol=2e-7)


def test_chunks_never_hold_all_logits():
    seen = []

    def head(x):
        seen.append(x.shape[0])
        return x @ weight.T

    hidden, _, weight, _, labels = example()
    hidden.requires_grad_()
    nll, kl = chunked_losses(hidden, head, labels, chunk=5)
    assert kl == 0
    saved_in_forward = list(seen)
    nll.backward()
    assert max(seen) == 5
    # once forward, once again in the backward pass
    assert sum(saved_in_forward) == 26
    assert sum(seen) == 52


def test_the_teacher_gets_no_gradient():
    hidden, teacher_hidden, weight, teacher_weight, labels = example()
    teacher_weight.requires_grad_()
    hidden.requires_grad_()
    teacher = lambda x: x @ teacher_weight.T  # noqa: E731
    _, kl = chunked_losses(hidden, lambda x: x @ weight.T, labels, teacher_hidden=teacher_hidden, teacher_head=teacher)
    kl.backward()
    assert teacher_weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_kl_of_equal_models_is_zero_and_has_no_gradient():
    hidden, _, weight, _, labels = example()
    hidden.requires_grad_()
    head = lambda x: x @ weight.T  # noqa: E731
    _, kl = chunked_losses(hidden, head, labels, teacher_hidden=hidden.detach(), teacher_head=head)
    kl.backward()
    assert kl.abs() < 1e-6
    assert hidden.grad.abs().max() < 1e-6


def test_ignored_labels_alone_give_zero_not_nan():
    hidden, _, weight, _, labels = example()
    nll, kl = chunked_losses(hidden, lambda x: x @ weight.T, torch.full_like(labels, IGNORED))
    assert nll == 0
    assert kl == 0


def test_low_precision_logits_are_summed_in_fp32():
    logits = torch.randn(4, 100).bfloat16()
    labels = torch.tensor([1, 2, 3, 4])
    nll, kl = loss_sums(logits, logits, labels)
    assert nll.dtype == kl.dtype == torch.float32
    torch.testing.assert_close(nll, F.cross_entropy(logits.float(), labels, reduction="sum"))


def test_shapes_that_do_not_fit_are_refused():
    hidden, teacher_hidden, weight, _, labels = example()
    head = lambda x: x @ weight.T  # noqa: E731
    with pytest.raises(ValueError, match=r"hidden must be \[\*labels.shape, D\], got"):
        chunked_losses(hidden[:, 1:], head, labels)
    with pytest.raises(ValueError, match="go together"):
        chunked_losses(hidden, head, labels, teacher_hidden=teacher_hidden)
    with pytest.raises(ValueError, match=r"teacher_hidden must be"):
        chunked_losses(hidden, head, labels, teacher_hidden=teacher_hidden[:1], teacher_head=head)


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "build"),
    [
        (LlamaConfig(**SIZES, num_key_value_heads=1), LlamaForCausalLM),
        (GraniteConfig(**SIZES, num_key_value_heads=1, logits_scaling=8.0), GraniteForCausalLM),
    ],
)
def test_output_logits_equal_the_models_own(config, build):
    torch.manual_seed(0)
    model = build(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        ours = output_logits(model, model.base_model(ids).last_hidden_state)
        torch.testing.assert_close(ours, model(ids).logits, rtol=0, atol=0)
