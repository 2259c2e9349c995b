"""Compression: `kernel_size` tokens become one entry, a key and a value (eq. 7).

A compressor is a module that maps a block `[..., l, D]` to `[..., D]`; `compress` finds the blocks of a whole text and
hands them over. One compressor serves all KV heads of a layer, and keys and values have one each. All three kinds give
the block's average until they are trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .arguments import check_placement, check_tensor
from .operators import is_exporting
from .placement import Placement
from .sizes import check_int, n_blocks


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that what it corrects starts as it was."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class MeanCompressor(nn.Module):
    """The average of the block's tokens; no parameters."""

    def __init__(self, kernel_size: int, head_dim: int):
        super().__init__()
        self.kernel_size, self.head_dim = kernel_size, head_dim

    def forward(self, blocks: Tensor) -> Tensor:
        """`blocks [..., l, D]` to `[..., D]`, in the blocks' dtype.

        Raises:
            ValueError: blocks of another shape.
        """
        if blocks.dim() < 2 or blocks.shape[-2:] != (self.kernel_size, self.head_dim):
            raise ValueError(
                f"blocks must be [..., l, D] with l = {self.kernel_size} and D = {self.head_dim}, got "
                f"{list(blocks.shape)}"
            )
        return blocks.mean(-2)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, head_dim={self.head_dim}"


class LearnedCompressor(MeanCompressor):
    """The average plus a learned correction of the block after a position embedding; the correction starts at zero."""

    def __init__(self, kernel_size: int, head_dim: int):
        super().__init__(kernel_size, head_dim)
        self.position = nn.Parameter(torch.empty(kernel_size, head_dim))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws the position embedding `[l, D]`; the layers of the correction reset themselves."""
        nn.init.normal_(self.position, std=std)

    def correction(self, flat: Tensor) -> Tensor:
        """`[..., l*D]` to `[..., D]`."""
        raise NotImplementedError

    def forward(self, blocks: Tensor) -> Tensor:
        return super().forward(blocks) + self.correction((blocks + self.position).flatten(-2))


class LinearCompressor(LearnedCompressor):
    """One linear map of the block's `l*D` numbers, written as the average plus `map [D, l*D]`, which starts at zero."""

    def __init__(self, kernel_size: int, head_dim: int):
        super().__init__(kernel_size, head_dim)
        self.map = ZeroLinear(kernel_size * head_dim, head_dim, bias=False)

    def correction(self, flat: Tensor) -> Tensor:
        return self.map(flat)


class MLPCompressor(LearnedCompressor):
    """The average plus a two-layer MLP (the paper's phi): `up [hidden, l*D]` with bias, SiLU, `down [D, hidden]`."""

    def __init__(self, kernel_size: int, head_dim: int, hidden_dim: int):
        super().__init__(kernel_size, head_dim)
        self.up = nn.Linear(kernel_size * head_dim, hidden_dim)
        self.down = ZeroLinear(hidden_dim, head_dim, bias=False)

    def correction(self, flat: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(flat)))


COMPRESSORS = ("mean", "linear", "mlp")


def build_compressor(kind: str, kernel_size: int, head_dim: int, hidden_dim: int = 128) -> MeanCompressor:
    """A compressor of the given kind.

        >>> build_compressor("mlp", kernel_size=32, head_dim=64)(torch.randn(5, 32, 64)).shape
        torch.Size([5, 64])

    Args:
        kind: `mean`, `linear` or `mlp`.
        kernel_size: tokens of a block [l].
        head_dim: numbers of a key (for values: of a value).
        hidden_dim: width of the MLP; used by `mlp` only.

    Raises:
        TypeError: a size is not an int.
        ValueError: unknown kind, or a size is less than 1.
    """
    for name, size in (("kernel_size", kernel_size), ("head_dim", head_dim), ("hidden_dim", hidden_dim)):
        check_int(name, size, 1)
    if kind == "mean":
        return MeanCompressor(kernel_size, head_dim)
    if kind == "linear":
        return LinearCompressor(kernel_size, head_dim)
    if kind == "mlp":
        return MLPCompressor(kernel_size, head_dim, hidden_dim)
    raise ValueError(f"unknown compression {kind!r}: choose one of {', '.join(COMPRESSORS)}")


def packed_block_starts(cu_seqlens: Tensor, kernel_size: int, kernel_stride: int) -> tuple[Tensor, Tensor]:
    """Where the entries of packed documents stand, in document order.

    Args:
        cu_seqlens: int32 `[documents + 1]`, the documents' borders.

    Returns:
        `block_start [N]` int64, the first token of each block, and `document_start [N]` int64, that of its document.
    """
    borders = cu_seqlens.long()
    length = borders.diff()
    count = torch.where(length < kernel_size, 0, (length - kernel_size) // kernel_stride + 1)
    document_start = borders[:-1].repeat_interleave(count)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    local = torch.arange(len(document_start), device=borders.device) - first
    return document_start + local * kernel_stride, document_start


def compress(
    x: Tensor,
    compressor: MeanCompressor,
    kernel_stride: int,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The compressed keys (or values) of a whole text, laid out as `nsa_attention` wants them.

        >>> keys = torch.randn(1, 256, 2, 16)  # [B, S, H, D]
        >>> compress(keys, build_compressor("mean", 32, 16), kernel_stride=16).shape
        torch.Size([1, 15, 2, 16])

    Args:
        x: `[B, S, H, D]`, keys after RoPE, or values.
        compressor: maps `[..., l, D]` to `[..., D]`.
        kernel_stride: tokens between two blocks' starts [d].
        starts: int32 `[B]`, first real position of each left-padded row; None = 0.
        lengths: int32 `[B]`, positions of each row that hold something; None = S.
        cu_seqlens: int32 `[documents + 1]` with B = 1; goes with neither `starts` nor `lengths`.

    Returns:
        `[B, N, H, D]`. Without `cu_seqlens`, `N = n_blocks(S)` and block `i` of row `b` covers
        `[starts[b] + i*d, starts[b] + i*d + l)`; those that are not complete are zero. Where there are none, the
        gradients of `x` and of the compressor's parameters are zero, not absent.

    Raises:
        TypeError, ValueError: an argument is wrong; says what was expected and what came.
    """
    check_tensor("x", x)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be [B, S, H, D] of floating-point numbers, got {list(x.shape)} of {x.dtype}")
    check_int("kernel_stride", kernel_stride, 1)
    size = compressor.kernel_size
    if size % kernel_stride:
        raise ValueError(f"kernel_stride must divide the compressor's kernel_size, got {kernel_stride} and {size}")
    check_placement(x, x.shape[0], x.shape[1], x.shape[1], Placement(starts, lengths, cu_seqlens))
    if cu_seqlens is not None:
        block_start, _ = packed_block_starts(cu_seqlens, size, kernel_stride)
        return compress_blocks(x, compressor, block_start[None])
    # in a graph of any length more than there may be, and at least two: it must not depend on whether there is one
    exporting = is_exporting() and starts is not None
    count = x.shape[1] // kernel_stride + 2 if exporting else n_blocks(x.shape[1], size, kernel_stride)
    if not exporting and count == 0:
        return compressor(x[:, :0, :, None].expand(-1, -1, -1, size, -1))
    if starts is None and lengths is None:
        # [B, N, H, D, l] -> [B, N, H, l, D], a view
        return compressor(x.unfold(1, size, kernel_stride).transpose(-1, -2))
    start = x.new_zeros(x.shape[0], dtype=torch.long) if starts is None else starts.long()
    end = torch.full_like(start, x.shape[1]) if lengths is None else lengths.long()
    block_start = start[:, None] + torch.arange(count, device=x.device) * kernel_stride
    return compress_blocks(x, compressor, block_start, complete=block_start + size <= end[:, None])


def compress_blocks(
    x: Tensor, compressor: MeanCompressor, block_start: Tensor, complete: Tensor | None = None
) -> Tensor:
    """The compressed entries of chosen blocks.

        >>> keys = torch.randn(1, 256, 2, 16)  # [B, S, H, D]
        >>> compress_blocks(keys, build_compressor("mean", 32, 16), torch.tensor([[0, 64]])).shape
        torch.Size([1, 2, 2, 16])

    Args:
        x: `[B, S, H, D]`.
        block_start: int64 `[B, N]`, first token of each block in its row.
        complete: bool `[B, N]`, False where the block must not be read (its entry is zero, without gradient).

    Returns:
        `[B, N, H, D]`.
    """
    size = compressor.kernel_size
    # [B, N, l]
    token = block_start[..., None] + torch.arange(size, device=x.device)
    row = torch.arange(x.shape[0], device=x.device)[:, None, None]
    if complete is None:
        return compressor(x[row, token].transpose(2, 3))
    # [B, N, l, H, D]: what stands in an incomplete block may be anything, NaN too, so it is replaced, not multiplied
    blocks = x[row, token.clamp(0, x.shape[1] - 1)].masked_fill(~complete[..., None, None, None], 0)
    if is_exporting():  # which understands how a number that varies is split when it stands last
        return compressor(blocks.permute(0, 3, 1, 2, 4)).transpose(1, 2).masked_fill(~complete[..., None, None], 0)
    return compressor(blocks.transpose(2, 3)).masked_fill(~complete[..., None, None], 0)
