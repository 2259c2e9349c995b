"""The compressors start as the average and learn; `compress` finds the blocks that the oracle finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import compress_oracle, count_blocks, mean

from nsa_hf.kernels import build_compressor, compress

KINDS = ["mean", "linear", "mlp"]
SIZE, STRIDE, DIM, HIDDEN = 4, 2, 5, 7
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def compressor_of(kind: str, random: bool = False, size: int = SIZE, dtype: torch.dtype = torch.float64):
    """A small compressor, at its start or with random parameters: at their start many mistakes are invisible."""
    torch.manual_seed(0)
    compressor = build_compressor(kind, size, DIM, HIDDEN).to(dtype)
    if random:
        for seed, parameter in enumerate(compressor.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=seed, dtype=dtype))
    return compressor


def check_blocks(compressed: torch.Tensor, expected: dict[tuple[int, int, int], torch.Tensor]) -> None:
    """Every block the oracle knows is there, and every other place is zero."""
    known = torch.zeros(compressed.shape[:3], dtype=torch.bool)
    for place, block in expected.items():
        torch.testing.assert_close(compressed[place], block, **EXACT)
        known[place] = True
    assert (compressed[~known] == 0).all()


# ---- one block


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "dim"), [(32, 64), (4, 5), (1, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_average(kind: str, size: int, dim: int, dtype: torch.dtype) -> None:
    blocks = normal(3, 2, size, dim, dtype=dtype)
    compressor = build_compressor(kind, size, dim, 16).to(dtype)
    output = compressor(blocks)
    assert output.shape == (3, 2, dim) and output.dtype == dtype
    expected = blocks.double().sum(-2) / size
    # one rounding to the dtype (another half a unit for weights of 1/l, if there are any), sums in fp32 at least
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed = torch.finfo(dtype).eps * expected.abs() + 4 * arithmetic * blocks.double().abs().sum(-2)
    assert ((output.double() - expected).abs() <= allowed).all()
    assert kind == "linear" or torch.equal(output, blocks.mean(-2))  # the MLP: the average plus exactly nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_alone_is_the_block_among_others(kind: str) -> None:
    compressor = compressor_of(kind, random=True)
    blocks = normal(2, 3, SIZE, DIM)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(compressor(blocks)[b, h], compressor(blocks[b, h]), **EXACT)


def test_linear_is_one_linear_map() -> None:
    """With a constant from the position embedding: what is between two blocks becomes what is between their entries."""
    compressor, x, y = compressor_of("linear", random=True), normal(SIZE, DIM), normal(SIZE, DIM, seed=9)
    between = 0.3 * compressor(x) + 0.7 * compressor(y)
    torch.testing.assert_close(compressor(0.3 * x + 0.7 * y), between, **EXACT)
    assert (compressor(torch.zeros(SIZE, DIM, dtype=x.dtype)) != 0).all()


def test_mlp_is_the_average_plus_a_network_of_the_block_and_its_positions() -> None:
    compressor, block = compressor_of("mlp", random=True), normal(SIZE, DIM)
    shift = compressor.position.detach().clone()
    moved = compressor(block + shift) - mean(block + shift)
    compressor.position.data *= 2
    learned = compressor(block) - mean(block)
    torch.testing.assert_close(learned, moved, **EXACT)
    half = 0.5 * learned + 0.5 * (compressor(-block) - mean(-block))
    zero = compressor(torch.zeros_like(block))
    assert (half - zero).abs().max() > 1e-3  # not a linear map


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_position_embedding(kind: str) -> None:
    compressor = compressor_of(kind, random=True)
    assert compressor.position.shape == (SIZE, DIM)
    block = normal(SIZE, DIM)
    assert (compressor(block) - compressor(block.flip(0))).abs().max() > 1e-3  # the order of the tokens matters


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("mean", 0),
        ("linear", SIZE * DIM + DIM * SIZE * DIM),
        ("mlp", SIZE * DIM + HIDDEN * SIZE * DIM + HIDDEN + DIM * HIDDEN),
    ],
)
def test_number_of_parameters(kind: str, numbers: int) -> None:
    """None of them knows of heads: one compressor serves all KV heads of a layer."""
    assert sum(x.numel() for x in compressor_of(kind).parameters()) == numbers


class WithParameters:
    """A compressor with its parameters replaced by others, for `gradcheck`."""

    def __init__(self, compressor: torch.nn.Module, parameters: tuple[torch.Tensor, ...]):
        names = [name for name, _ in compressor.named_parameters()]
        self.kernel_size, self.compressor = SIZE, compressor
        self.parameters = dict(zip(names, parameters, strict=True))

    def __call__(self, blocks: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.compressor, self.parameters, (blocks,))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gradients_reach_every_parameter_and_the_input(kind: str) -> None:
    compressor = compressor_of(kind, random=True)
    x = normal(1, 9, 2, DIM).requires_grad_()

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return compress(x, WithParameters(compressor, parameters), STRIDE)

    assert torch.autograd.gradcheck(call, (x, *compressor.parameters()))
    compress(x, compressor, STRIDE).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in compressor.parameters())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_nothing_is_stuck_at_the_start(kind: str) -> None:
    """What starts at zero learns in the first step, and whatever stands before it in the second."""
    compressor, x = compressor_of(kind), normal(1, 9, 2, DIM)
    compress(x, compressor, STRIDE).square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in compressor.parameters())
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter -= 0.1 * parameter.grad
    compressor.zero_grad()
    compress(x, compressor, STRIDE).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in compressor.parameters())


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"conv.*mean.*linear.*mlp"):
        build_compressor("conv", SIZE, DIM, HIDDEN)


# ---- whole texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 17])
def test_rows(kind: str, tokens: int) -> None:
    compressor, x = compressor_of(kind, random=True), normal(2, tokens, 3, DIM)
    compressed = compress(x, compressor, STRIDE)
    assert compressed.shape == (2, count_blocks(tokens, SIZE, STRIDE), 3, DIM)
    check_blocks(compressed, compress_oracle(x, compressor, SIZE, STRIDE))


NONE_COMPLETE = {
    "short": (2, 3, {}),
    "no tokens": (2, 0, {}),
    "no rows": (0, 9, {}),
    "padded": (2, 9, {"starts": int32(6, 9)}),
    "packed": (1, 6, {"cu_seqlens": int32(0, 2, 5, 6)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NONE_COMPLETE)
def test_without_a_complete_block_gradients_are_zero_and_not_absent(kind: str, name: str) -> None:
    """A parameter without a gradient is an error or a hang where several processes train (DDP)."""
    rows, tokens, bounds = NONE_COMPLETE[name]
    compressor, x = compressor_of(kind, random=True), normal(rows, tokens, 2, DIM).requires_grad_()
    compressed = compress(x, compressor, STRIDE, **bounds)
    assert compressed.dtype == x.dtype and compressed.shape[0] == rows and compressed.shape[2:] == (2, DIM)
    compressed.sum().backward()
    for leaf in (x, *compressor.parameters()):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()


X = normal(2, 9, 3, DIM)
WRONG: dict[str, tuple[tuple, dict, type[Exception], str]] = {
    "x is None": ((None, STRIDE), {}, TypeError, r"x must be a tensor, got NoneType"),
    "x is a list": (([1.0], STRIDE), {}, TypeError, r"x must be a tensor, got list"),
    "x of three dimensions": ((X[0], STRIDE), {}, ValueError, r"x.*\[B, S, H, D\].*9, 3, 5"),
    "x of integers": ((X.long(), STRIDE), {}, ValueError, r"x.*floating.*int64"),
    "another head dim": ((X[..., :1], STRIDE), {}, ValueError, r"blocks.*l = 4 and D = 5.*4, 1\]"),
    "no stride": ((X, 0), {}, ValueError, r"kernel_stride.*1.*0"),
    "stride is a float": ((X, 2.0), {}, TypeError, r"kernel_stride.*int.*2\.0"),
    "stride is a bool": ((X, True), {}, TypeError, r"kernel_stride.*int.*True"),
    "stride does not divide": ((X, 3), {}, ValueError, r"kernel_stride.*divide.*kernel_size.*3 and 4"),
    "starts of int64": ((X, STRIDE), {"starts": int32(0, 1).long()}, TypeError, r"starts.*int32.*int64"),
    "starts are a list": ((X, STRIDE), {"starts": [0, 1]}, TypeError, r"starts.*tensor.*list"),
    "starts negative": ((X, STRIDE), {"starts": int32(0, -1)}, ValueError, r"starts.*0 \.\. S = 9.*-1"),
    "starts elsewhere": ((X, STRIDE), {"starts": int32(0, 1).to("meta")}, ValueError, r"starts.*device.*cpu.*meta"),
    "lengths of one row": ((X, STRIDE), {"lengths": int32(9)}, ValueError, r"lengths.*\[2\].*\[1\]"),
    "lengths behind the text": ((X, STRIDE), {"lengths": int32(9, 10)}, ValueError, r"lengths.*9.*10"),
    "cu_seqlens of a batch": ((X, STRIDE), {"cu_seqlens": int32(0, 9)}, ValueError, r"cu_seqlens.*B = 1.*B = 2"),
    "cu_seqlens end early": ((X[:1], STRIDE), {"cu_seqlens": int32(0, 8)}, ValueError, r"cu_seqlens.*9.*0, 8"),
    "cu_seqlens with starts": (
        (X[:1], STRIDE),
        {"cu_seqlens": int32(0, 9), "starts": int32(3)},
        ValueError,
        r"cu_seqlens.*neither starts",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(kind: str, name: str) -> None:
    (x, stride), bounds, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        compress(x, compressor_of(kind), stride, **bounds)


@pytest.mark.parametrize("change", [{"kernel_size": 0}, {"head_dim": -1}, {"hidden_dim": 0}, {"head_dim": 2**70}])
def test_sizes_of_a_compressor_out_of_range(change: dict[str, int]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{name} must be at .*, got {value}"):
        build_compressor("mlp", **{"kernel_size": SIZE, "head_dim": DIM, **change})


@pytest.mark.parametrize("value", [None, 4.0, "4", True])
def test_sizes_of_a_compressor_are_integers(value: object) -> None:
    with pytest.raises(TypeError, match="head_dim must be an int"):
        build_compressor("linear", SIZE, value)  # type: ignore[arg-type]


def poisoned(x: torch.Tensor, starts: torch.Tensor | None, lengths: torch.Tensor | None) -> torch.Tensor:
    """NaN wherever a row holds nothing."""
    x = x.clone()
    for row in range(x.shape[0]):
        x[row, : 0 if starts is None else starts[row]] = float("nan")
        x[row, x.shape[1] if lengths is None else lengths[row] :] = float("nan")
    return x


PADDED = {
    "starts": {"starts": int32(0, 5, 16)},
    "lengths": {"lengths": int32(17, 6, 0)},
    "both": {"starts": int32(3, 0, 9), "lengths": int32(17, 8, 12)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", PADDED.values(), ids=PADDED.keys())
def test_padded_rows(kind: str, bounds: dict[str, torch.Tensor]) -> None:
    compressor = compressor_of(kind, random=True)
    x = poisoned(normal(3, 17, 2, DIM), bounds.get("starts"), bounds.get("lengths")).requires_grad_()
    compressed = compress(x, compressor, STRIDE, **bounds)
    assert compressed.shape == (3, count_blocks(17, SIZE, STRIDE), 2, DIM)
    check_blocks(compressed, compress_oracle(x, compressor, SIZE, STRIDE, **bounds))
    compressed.square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad[x.isnan()] == 0).all() and x.grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in compressor.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("borders", [(0, 17), (0, 4, 17), (0, 3, 10, 11, 17), (0, 2, 5), (0, 1, 2, 3)])
def test_packed_documents(kind: str, borders: tuple[int, ...]) -> None:
    compressor, x = compressor_of(kind, random=True), normal(1, borders[-1], 2, DIM)
    expected = compress_oracle(x, compressor, SIZE, STRIDE, cu_seqlens=int32(*borders))
    compressed = compress(x, compressor, STRIDE, cu_seqlens=int32(*borders))
    assert compressed.shape == (1, len(expected) // 2, 2, DIM)
    check_blocks(compressed, expected)


@given(
    stride=st.integers(1, 5),
    ratio=st.integers(1, 4),
    tokens=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_documents_are_rows_packed(stride: int, ratio: int, tokens: list[int], seed: int) -> None:
    """The same documents packed, left-padded and right-padded: the blocks are the same ones."""
    size = stride * ratio
    compressor = build_compressor("mean", size, DIM, HIDDEN)
    parts = [normal(1, count, 2, DIM, seed=seed + i) for i, count in enumerate(tokens)]
    borders = [sum(tokens[:i]) for i in range(len(tokens) + 1)]
    packed = compress(torch.cat(parts, 1), compressor, stride, cu_seqlens=int32(*borders))
    longest, none = max(tokens), float("nan")
    left = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 0, longest - x.shape[1], 0), value=none) for x in parts])
    right = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 0, 0, longest - x.shape[1]), value=none) for x in parts])
    left = compress(left, compressor, stride, starts=int32(*[longest - count for count in tokens]))
    right = compress(right, compressor, stride, lengths=int32(*tokens))
    first = 0
    for row, part in enumerate(parts):
        alone = compress(part, compressor, stride)
        count = alone.shape[1]
        check_blocks(alone, compress_oracle(part, mean, size, stride))
        torch.testing.assert_close(packed[:, first : first + count], alone, **EXACT)
        for padded in (left, right):
            torch.testing.assert_close(padded[row : row + 1, :count], alone, **EXACT)
            assert (padded[row, count:] == 0).all()
        first += count
    assert packed.shape[1] == first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, 5, 9])
def test_step_by_step_is_the_whole(kind: str, step: int) -> None:
    """As a cache does: the tokens that come are put behind the unfinished ones, and what is complete is compressed."""
    compressor, x = compressor_of(kind, random=True), normal(2, 23, 2, DIM)
    pieces: list[torch.Tensor] = []
    rest = x[:, :0]
    for first in range(0, 23, step):
        rest = torch.cat([rest, x[:, first : first + step]], dim=1)
        pieces.append(compress(rest, compressor, STRIDE))
        rest = rest[:, pieces[-1].shape[1] * STRIDE :]
    torch.testing.assert_close(torch.cat(pieces, dim=1), compress(x, compressor, STRIDE), **EXACT)


def test_blocks_do_not_look_beyond_themselves() -> None:
    x, compressor = normal(1, 12, 1, DIM).requires_grad_(), compressor_of("mlp", random=True)
    compressed = compress(x, compressor, STRIDE)
    for i in range(compressed.shape[1]):
        (grad,) = torch.autograd.grad(compressed[:, i].sum(), x, retain_graph=True)
        touched = (grad != 0).any(-1).flatten().nonzero().flatten().tolist()
        assert touched == list(range(i * STRIDE, i * STRIDE + SIZE))
