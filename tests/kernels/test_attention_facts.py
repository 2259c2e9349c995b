"""Facts that follow from the specification and need no oracle: when a branch is dense attention, who can see whom."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from attention_inputs import TENSORS, Inputs, Shape, Sizes, make_inputs, one_branch
from oracle import compress_oracle, count_blocks, mean

from nsa_hf.kernels import nsa_attention

COMPRESSED, SELECTED, WINDOW = 0, 1, 2
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def dense(inputs: Inputs) -> torch.Tensor:
    """Causal attention over all keys by PyTorch, the queries being the last positions."""
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    queries, keys = q.shape[2], k.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, scale=inputs["scale"])
    return out.transpose(1, 2)


def with_mean_blocks(inputs: Inputs, sizes: Sizes) -> Inputs:
    """The same inputs with k_cmp and v_cmp the averages of k and v (of unpadded rows), gradients included."""
    blocks = {}
    for name in ("k", "v"):
        x = inputs[name]
        found = compress_oracle(x, mean, sizes.kernel_size, sizes.kernel_stride)
        count = 1 + max((slot for _, slot, _ in found), default=-1)
        rows = [[[found[b, i, h] for h in range(x.shape[2])] for i in range(count)] for b in range(x.shape[0])]
        blocks[f"{name}_cmp"] = torch.stack([torch.stack([torch.stack(block) for block in row]) for row in rows])
    return {**inputs, **blocks}


# ---- when a branch is dense attention


@pytest.mark.parametrize("tokens", [1, 4, 15, 16])
def test_selection_is_dense_up_to_topk_blocks(tokens: int) -> None:
    inputs = one_branch(make_inputs(Shape(queries=tokens, keys=tokens)), SELECTED)  # topk 4, blocks of 4
    torch.testing.assert_close(nsa_attention(**inputs), dense(inputs), **EXACT)


def test_selection_leaves_out_one_block_one_token_later() -> None:
    inputs = one_branch(make_inputs(Shape(queries=17, keys=17)), SELECTED)
    output, expected = nsa_attention(**inputs), dense(inputs)
    torch.testing.assert_close(output[:, :16], expected[:, :16], **EXACT)
    assert ((output[:, 16] - expected[:, 16]).abs() > 1e-4).all()


@pytest.mark.parametrize("tokens", [1, 29, 30, 61])
def test_selection_of_every_block_is_dense_at_any_length(tokens: int) -> None:
    sizes = replace(Sizes(), topk=-(-tokens // 4) + 3)
    inputs = one_branch(make_inputs(Shape(sizes, queries=tokens, keys=tokens, scale=0.7)), SELECTED)
    torch.testing.assert_close(nsa_attention(**inputs), dense(inputs), **EXACT)


def test_at_the_default_sizes() -> None:
    """No size given: 1,024 tokens are exact, at the next token 16 of 17 blocks are taken; the window is 512."""
    paper = Sizes(32, 16, 64, 16, 1, 2, 512)
    shape = Shape(paper, queries=1030, keys=1030, kv_heads=1, group=1)
    inputs = {name: x for name, x in make_inputs(shape).items() if name not in asdict(paper)}
    selected, selection = nsa_attention(**one_branch(inputs, SELECTED), return_selection=True)
    expected = dense(inputs)
    torch.testing.assert_close(selected[:, :1024], expected[:, :1024], **EXACT)
    assert ((selected - expected)[:, 1024:].abs() > 1e-6).all()
    assert (selection[0, :1024, 0] >= 0).sum(-1).tolist() == [p // 64 + 1 for p in range(1024)]
    assert all({0, 15, 16} <= set(row) and len(set(row)) == 16 for row in selection[0, 1024:, 0].tolist())
    window = nsa_attention(**one_branch(inputs, WINDOW))
    torch.testing.assert_close(window[:, :512], expected[:, :512], **EXACT)
    assert ((window - expected)[:, 512:].abs() > 1e-6).all()


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_window_is_dense_up_to_its_size(tokens: int) -> None:
    inputs = one_branch(make_inputs(Shape(queries=tokens, keys=tokens)), WINDOW)  # a window of 5
    torch.testing.assert_close(nsa_attention(**inputs), dense(inputs), **EXACT)


def test_scale_is_one_over_the_root_of_the_key_width() -> None:
    inputs = make_inputs(Shape(key_dim=5, value_dim=3))
    torch.testing.assert_close(nsa_attention(**inputs), nsa_attention(**{**inputs, "scale": 5**-0.5}), **EXACT)


def test_the_gates_weigh_the_three_branches() -> None:
    inputs = make_inputs(Shape(batch=2))
    parts = [inputs["gates"][..., c : c + 1] * nsa_attention(**one_branch(inputs, c)) for c in range(3)]
    torch.testing.assert_close(nsa_attention(**inputs), parts[0] + parts[1] + parts[2], **EXACT)


# ---- which tokens and blocks a query sees


def seen(inputs: Inputs, name: str) -> torch.Tensor:
    """Bool [T, length of inputs[name]]: whether query t's output moves with that entry of batch row 0."""
    x = inputs[name].detach().requires_grad_()
    output = nsa_attention(**{**inputs, name: x})
    # the values' gradient is a probability times a gate: never zero by chance
    rows = [torch.autograd.grad(output[0, t].sum(), x, retain_graph=True)[0][0] for t in range(output.shape[1])]
    return torch.stack(rows).flatten(2).abs().sum(-1) > 0


@pytest.mark.parametrize("window_size", [1, 5])
def test_the_window_holds_its_size_with_the_query_counted(window_size: int) -> None:
    inputs = one_branch(make_inputs(Shape(replace(Sizes(), window_size=window_size), queries=20, keys=20)), WINDOW)
    p, key = torch.arange(20)[:, None], torch.arange(20)
    assert torch.equal(seen(inputs, "v"), (key <= p) & (key > p - window_size))


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(6, 3, 6), Sizes(1, 1, 1)], ids=str)
def test_a_compressed_block_is_visible_from_its_last_token_on(sizes: Sizes) -> None:
    inputs = one_branch(make_inputs(Shape(sizes, queries=20, keys=20)), COMPRESSED)
    p, block = torch.arange(20)[:, None], torch.arange(inputs["v_cmp"].shape[1])
    assert torch.equal(seen(inputs, "v_cmp"), block * sizes.kernel_stride + sizes.kernel_size - 1 <= p)


def test_the_selected_tokens_are_those_of_the_selected_blocks() -> None:
    inputs = one_branch(make_inputs(Shape(kv_heads=1)), SELECTED)
    _, selection = nsa_attention(**inputs, return_selection=True)
    p, key = torch.arange(30)[:, None], torch.arange(30)
    in_selected = (selection[0, :, 0, :, None] == key // 4).any(1)
    assert torch.equal(seen(inputs, "v"), in_selected & (key <= p))


def test_each_branch_has_its_own_keys_and_values() -> None:
    reads = {COMPRESSED: {"k_cmp", "v_cmp"}, SELECTED: {"k", "v"}, WINDOW: {"k_win", "v_win"}}
    inputs = make_inputs(Shape(own_window=30))
    for branch, own in reads.items():
        moved = {name for name in TENSORS[1:] if name != "gates" and seen(one_branch(inputs, branch), name).any()}
        assert moved == own  # the pick of the blocks has no gradient: k_cmp moves the first branch alone


# ---- causality


@pytest.mark.parametrize("branch", [COMPRESSED, SELECTED, WINDOW])
@pytest.mark.parametrize("position", [0, 3, 4, 12, 29])
def test_a_changed_token_changes_nothing_before_it(position: int, branch: int) -> None:
    inputs = one_branch(make_inputs(Shape()), branch)
    before, picked_before = nsa_attention(**with_mean_blocks(inputs, Sizes()), return_selection=True)
    changed = {name: inputs[name].clone() for name in ("q", "k", "v")}
    for x in changed.values():
        x[:, position] = 3 * x[:, position] + 1
    after, picked_after = nsa_attention(**with_mean_blocks({**inputs, **changed}, Sizes()), return_selection=True)
    torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-14)
    assert torch.equal(picked_before[:, :position], picked_after[:, :position])
    # the compressed branch sees the change when the token's first block, from 2 on, is complete: 3 tokens later at most
    assert branch == COMPRESSED or (before[:, position] != after[:, position]).all()


@pytest.mark.parametrize("branch", [COMPRESSED, SELECTED, WINDOW])
@pytest.mark.parametrize("position", [1, 4, 13, 29])
def test_no_gradient_from_before_a_token(position: int, branch: int) -> None:
    inputs = one_branch(make_inputs(Shape()), branch)
    leaves = {name: inputs[name].requires_grad_() for name in ("q", "k", "v")}
    output = nsa_attention(**with_mean_blocks({**inputs, **leaves}, Sizes()))
    early = torch.autograd.grad(output[:, :position].sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    assert all(grad is None or (grad[:, position:] == 0).all() for grad in early)
    (late,) = torch.autograd.grad(output.sum(), leaves["v"])
    assert (late[:, :26] != 0).any(-1).all() if branch == WINDOW else (late != 0).any()


# ---- documents and rows


def part(inputs: Inputs, row: int, first: int, end: int, first_block: int) -> Inputs:
    """One document or padded row as a batch of its own: its tokens, its blocks, and its queries that were asked."""
    keys = int(inputs["lengths"][row]) if "lengths" in inputs else inputs["k"].shape[1]
    asked_from = keys - inputs["q"].shape[1]
    skip, stop = max(first - asked_from, 0), end - asked_from
    blocks = count_blocks(end - first, inputs["kernel_size"], inputs["kernel_stride"])
    own = {name: x for name, x in inputs.items() if name not in (*TENSORS, "starts", "lengths", "cu_seqlens")}
    for name in ("q", "gates"):
        own[name] = inputs[name][row : row + 1, skip:stop]
    for name in ("k", "v"):
        own[name] = inputs[name][row : row + 1, first:end]
    for name in ("k_cmp", "v_cmp"):
        own[name] = inputs[name][row : row + 1, first_block : first_block + blocks]
    return own


def test_packed_documents_are_separate() -> None:
    inputs = make_inputs(Shape(cu_seqlens=(0, 2, 15, 19, 30)))
    output, selection = nsa_attention(**inputs, return_selection=True)
    first_block = 0
    for first, end in [(0, 2), (2, 15), (15, 19), (19, 30)]:
        own = part(inputs, 0, first, end, first_block)
        first_block += own["k_cmp"].shape[1]
        alone, picked = nsa_attention(**own, return_selection=True)
        torch.testing.assert_close(output[:, first:end], alone, **EXACT)
        assert torch.equal(selection[:, first:end], picked)
    assert first_block == inputs["k_cmp"].shape[1]


@pytest.mark.parametrize("branch", [COMPRESSED, SELECTED, WINDOW])
def test_no_gradient_crosses_a_document(branch: int) -> None:
    inputs = one_branch(make_inputs(Shape(cu_seqlens=(0, 13, 30))), branch)
    names = ("k", "v", "k_cmp", "v_cmp")
    leaves = {name: inputs[name].requires_grad_() for name in names}
    output = nsa_attention(**{**inputs, **leaves})
    for own, others, blocks in [(slice(0, 13), slice(13, 30), slice(5, None)), (slice(13, 30), slice(0, 13), slice(5))]:
        grads = torch.autograd.grad(output[:, own].sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            assert grad is None or (grad[:, blocks if "cmp" in name else others] == 0).all()


def test_a_padded_row_is_the_row_without_its_padding() -> None:
    shape = Shape(batch=3, queries=12, starts=(0, 7, 13), lengths=(30, 30, 18))
    inputs = make_inputs(shape)
    output, selection = nsa_attention(**inputs, return_selection=True)
    assert shape.starts is not None and shape.lengths is not None
    for row, (first, end) in enumerate(zip(shape.starts, shape.lengths, strict=True)):
        alone, picked = nsa_attention(**part(inputs, row, first, end, 0), return_selection=True)
        asked = alone.shape[1]
        assert asked == min(12, end - first)
        torch.testing.assert_close(output[row : row + 1, -asked:], alone, **EXACT)
        assert torch.equal(selection[row : row + 1, -asked:], picked)


@pytest.mark.parametrize("queries", [1, 2, 16, 29])
def test_the_last_queries_are_the_tail_of_all_of_them(queries: int) -> None:
    inputs = make_inputs(Shape(batch=2))
    whole, picked = nsa_attention(**inputs, return_selection=True)
    tail = {**inputs, "q": inputs["q"][:, -queries:], "gates": inputs["gates"][:, -queries:]}
    output, selection = nsa_attention(**tail, return_selection=True)
    torch.testing.assert_close(output, whole[:, -queries:], **EXACT)
    assert torch.equal(selection, picked[:, -queries:])


def test_lengths_and_starts_that_say_nothing_change_nothing() -> None:
    inputs = make_inputs(Shape(batch=2, queries=9))
    full = {"starts": torch.zeros(2, dtype=torch.int32), "lengths": torch.full((2,), 30, dtype=torch.int32)}
    torch.testing.assert_close(nsa_attention(**{**inputs, **full}), nsa_attention(**inputs), **EXACT)


def test_one_document_is_a_plain_row() -> None:
    inputs = make_inputs(Shape())
    packed = {**inputs, "cu_seqlens": torch.tensor([0, 30], dtype=torch.int32)}
    torch.testing.assert_close(nsa_attention(**packed), nsa_attention(**inputs), **EXACT)
