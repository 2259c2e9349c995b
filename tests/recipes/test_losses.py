import pytest
import torch
import torch.nn.functional as F
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from nsa_hf.recipes.training.losses import IGNORED, LossModel, chunked_losses, loss_sums, output_logits


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
            teacher_side = {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head}
            total, nll, kl = chunked_losses(h, head, labels, parameters=[w], kl_weight=3.0, chunk=chunk, **teacher_side)
        else:
            nll, kl = whole_losses(h, teacher_hidden, w, teacher_weight, labels)
            total = nll + 3 * kl
        (2 * total).backward()
        results.append((total.detach(), nll.detach(), kl.detach(), h.grad, w.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=2e-6, atol=2e-7)


def test_chunks_never_hold_all_logits_and_are_computed_once():
    seen = []

    def head(x):
        seen.append(x.shape[0])
        return x @ weight.T

    hidden, _, weight, _, labels = example()
    hidden.requires_grad_()
    losses = chunked_losses(hidden, head, labels, chunk=5)
    assert losses.kl == 0
    losses.total.backward()
    assert max(seen) == 5
    assert sum(seen) == 26


def test_only_the_total_has_gradients():
    hidden, _, weight, _, labels = example()
    losses = chunked_losses(hidden.requires_grad_(), lambda x: x @ weight.T, labels, ce_weight=2.0)
    assert losses.total.requires_grad
    assert not losses.ce.requires_grad
    torch.testing.assert_close(losses.total, 2 * losses.ce)


def test_gradients_of_half_precision_survive_by_the_scale_of_the_loss():
    """As with fp16 autocast: the mean's gradient is below what fp16 can hold, the scaled one is not."""
    tokens, scale = 4096, 2.0**16
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, tokens, 8), torch.randn(31, 8) / 100
    labels = torch.randint(31, (1, tokens))
    grads = []
    for dtype in (torch.float16, torch.float32):
        h = hidden.to(dtype).requires_grad_()
        w = weight.to(dtype)
        (chunked_losses(h, lambda x, w=w: x @ w.T, labels).total * scale).backward()
        grads.append(h.grad.float())
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02 * float(grads[1].abs().mean()))


def test_labels_across_the_borders_of_packed_documents_count_nowhere():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()
    ids = torch.randint(64, (1, 12))
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    losses = LossModel(model, None, ce_weight=1.0, kl_weight=0.0)(ids, position_ids)
    logits = model(ids, position_ids=position_ids, use_cache=False).logits[0, :-1]
    counted = torch.tensor([place for place in range(11) if place != 4])
    torch.testing.assert_close(losses.ce, F.cross_entropy(logits[counted], ids[0, 1:][counted]))


def test_the_teacher_gets_no_gradient():
    hidden, teacher_hidden, weight, teacher_weight, labels = example()
    teacher_weight.requires_grad_()
    hidden.requires_grad_()
    teacher = lambda x: x @ teacher_weight.T  # noqa: E731
    losses = chunked_losses(hidden, lambda x: x @ weight.T, labels, teacher_hidden=teacher_hidden, teacher_head=teacher)
    losses.total.backward()
    assert teacher_weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_kl_of_equal_models_is_zero_and_has_no_gradient():
    hidden, _, weight, _, labels = example()
    hidden.requires_grad_()
    head = lambda x: x @ weight.T  # noqa: E731
    losses = chunked_losses(hidden, head, labels, teacher_hidden=hidden.detach(), teacher_head=head, ce_weight=0.0)
    losses.total.backward()
    assert losses.kl.abs() < 1e-6
    assert hidden.grad.abs().max() < 1e-6


def test_ignored_labels_alone_give_zero_not_nan():
    hidden, _, weight, _, labels = example()
    losses = chunked_losses(hidden, lambda x: x @ weight.T, torch.full_like(labels, IGNORED))
    assert losses.ce == 0
    assert losses.kl == 0


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
