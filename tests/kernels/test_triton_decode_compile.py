"""Every decode kernel compiles ahead for each kind of card, within its shared memory. No GPU is needed."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import Sizes
from triton_ahead import PAPER, SHARED_MEMORY, compile_for

pytest.importorskip("triton")

KERNELS = {"compressed_kernel", "decode_select_kernel", "decode_selected_kernel", "decode_combine_kernel"}


def compile_step(
    monkeypatch: pytest.MonkeyPatch,
    card: int,
    group: int,
    queries: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    sizes: Sizes = PAPER,
    own_window: bool = False,
    capacity: int = 8192,
    index: torch.dtype | None = None,
) -> dict[str, int]:
    from nsa_hf.kernels.gpu import common as triton_common
    from nsa_hf.kernels.gpu.decode import scores as triton_decode_compressed
    from nsa_hf.kernels.gpu.decode import selected as triton_decode_selected
    from nsa_hf.kernels.gpu.decode.op import run_decode

    found = compile_for(monkeypatch, card, triton_common, triton_decode_compressed, triton_decode_selected)
    monkeypatch.setattr(triton_common, "overlaps", lambda device: card >= 90)
    kv_heads, (key_dim, value_dim) = 2, dims
    entries = (capacity - sizes.kernel_size) // sizes.kernel_stride + 1

    def empty(length: int, dim: int) -> torch.Tensor:
        return torch.empty(2, kv_heads, length, dim, dtype=dtype).transpose(1, 2)

    q = torch.empty(2, queries, kv_heads * group, key_dim, dtype=dtype)
    caches = [empty(capacity, key_dim), empty(capacity, value_dim), empty(entries, key_dim), empty(entries, value_dim)]
    window = caches[:2] if own_window else [None, None]
    lengths = torch.empty(2, dtype=torch.int32)
    gates = torch.empty(2, queries, kv_heads * group, 3)
    of_index = [None, None, None]
    if index is not None:
        caches[2:] = None, None
        of_index[:2] = q[..., : key_dim // 2].contiguous(), empty(capacity, key_dim // 2).to(index)
        if index == torch.int8:
            of_index[2] = torch.empty(2, kv_heads, capacity, dtype=torch.bfloat16).transpose(1, 2)
    run_decode(q, *caches, gates, *window, *of_index, None, lengths, list(vars(sizes).values()), 0.1)
    return found


@pytest.mark.parametrize(
    ("card", "group", "queries", "dims", "dtype"),
    [
        (86, 4, 1, (128, 128), torch.bfloat16),
        (90, 16, 1, (128, 128), torch.bfloat16),
        (90, 16, 16, (192, 128), torch.bfloat16),
        pytest.param(80, 16, 1, (128, 128), torch.float16, marks=pytest.mark.slow),
        pytest.param(89, 3, 16, (64, 64), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(100, 16, 4, (128, 128), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(86, 16, 16, (256, 256), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(86, 128, 1, (128, 128), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(86, 16, 16, (256, 256), torch.float32, marks=pytest.mark.slow),
        pytest.param(86, 5, 1, (80, 80), torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles_ahead(
    monkeypatch: pytest.MonkeyPatch, card: int, group: int, queries: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    found = compile_step(monkeypatch, card, group, queries, dims, dtype)
    assert set(found) == KERNELS
    assert all(shared <= SHARED_MEMORY[card] * 1024 for shared in found.values()), found


@pytest.mark.parametrize(
    ("card", "step", "keys"),
    [
        (90, (4, 1, (128, 128), torch.bfloat16), torch.int8),
        (86, (16, 16, (192, 128), torch.bfloat16), torch.bfloat16),
        (80, (3, 1, (64, 64), torch.float16), torch.int8),
        pytest.param(86, (1, 1, (256, 256), torch.float32), torch.float32, marks=pytest.mark.slow),
        pytest.param(100, (16, 4, (128, 128), torch.bfloat16), torch.int8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_index_compiles_ahead(monkeypatch: pytest.MonkeyPatch, card: int, step: tuple, keys: torch.dtype) -> None:
    """`step`: group, queries, dims and dtype, as above; `keys`: of the index."""
    found = compile_step(monkeypatch, card, *step, index=keys)
    assert set(found) == KERNELS - {"compressed_kernel"} | {"index_maxima_kernel"}
    assert all(shared <= SHARED_MEMORY[card] * 1024 for shared in found.values()), found


@pytest.mark.parametrize("sizes", [Sizes(2, 1, 256, 6, 2, 1, 300), Sizes(48, 16, 80, 250, 1, 1, 2000)], ids=str)
def test_other_sizes_and_own_window_keys_compile_ahead(monkeypatch: pytest.MonkeyPatch, sizes: Sizes) -> None:
    found = compile_step(monkeypatch, 86, 3, 2, (64, 64), torch.bfloat16, sizes, own_window=True, capacity=32768)
    assert set(found) == KERNELS
    assert all(shared <= SHARED_MEMORY[86] * 1024 for shared in found.values()), found


@pytest.mark.parametrize("chosen", [13, 256])
def test_more_blocks_than_are_looked_at_together_compile_ahead(monkeypatch: pytest.MonkeyPatch, chosen: int) -> None:
    sizes = Sizes(32, 16, 64, chosen + 3, 1, 2, 512)
    found = compile_step(monkeypatch, 90, 4, 1, (64, 64), torch.bfloat16, sizes, capacity=524288)
    assert set(found) == KERNELS
    assert all(shared <= SHARED_MEMORY[90] * 1024 for shared in found.values()), found
