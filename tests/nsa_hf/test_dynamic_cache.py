"""The cache: entries and index keys are extended, never recomputed, and follow what happens to keys and values."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from nsa_hf import NsaError
from nsa_hf.cache.dynamic import NsaDynamicLayer
from nsa_hf.entries import Compressors
from nsa_hf.index import Index
from nsa_hf.kernels import build_compressor, compress, n_blocks

SIZE, STRIDE, HEADS, DIM = 8, 4, 2, 6
INDEXES = [Index(((1, 3), (5, 6)), bits) for bits in (16, 8)]


class Counting(torch.nn.Module):
    """A compressor that counts the blocks it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.kernel_size, self.blocks = inner, inner.kernel_size, 0

    def forward(self, blocks):
        self.blocks += blocks.shape[1]
        return self.inner(blocks)


@pytest.fixture
def compressors():
    torch.manual_seed(0)
    parts = [build_compressor("mlp", SIZE, DIM, 5) for _ in range(2)]
    for compressor in parts:
        torch.nn.init.normal_(compressor.down.weight)
    return Compressors(*(Counting(compressor).requires_grad_(False) for compressor in parts), STRIDE)


def states(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, tokens, DIM), torch.randn(batch, HEADS, tokens, DIM)


def whole(layer: NsaDynamicLayer, compressors, starts=None):
    pairs = zip((layer.keys, layer.values), compressors[:2], strict=True)
    return [compress(x.transpose(1, 2), compressor.inner, STRIDE, starts=starts) for x, compressor in pairs]


@pytest.mark.parametrize("steps", [[50], [1] * 50, [7, 1, 1, 8, 3, 30], [8, 4, 4, 34]])
def test_extended_by_any_steps_equals_one_pass(steps, compressors):
    torch.manual_seed(1)
    layer = NsaDynamicLayer()
    for step in steps:
        layer.update(*states(2, step))
        entries = layer.extend(layer.keys, layer.values, compressors, None)
        assert entries[0].shape[1] == n_blocks(layer.get_seq_length(), SIZE, STRIDE)
    for got, expected in zip(entries, whole(layer, compressors), strict=True):
        torch.testing.assert_close(got, expected)
    assert compressors.keys.blocks == n_blocks(50, SIZE, STRIDE), "each block is compressed once"


@pytest.mark.parametrize("steps", [[50], [1] * 50, [7, 1, 1, 8, 3, 30]])
def test_padded_rows_complete_their_blocks_at_their_own_tokens(steps, compressors):
    torch.manual_seed(1)
    starts = torch.tensor([0, 3, 50, 21], dtype=torch.int32)
    layer = NsaDynamicLayer()
    for step in steps:
        layer.update(*states(4, step))
        entries = layer.extend(layer.keys, layer.values, compressors, starts)
    for got, expected in zip(entries, whole(layer, compressors, starts), strict=True):
        for row, start in enumerate(starts.tolist()):
            complete = n_blocks(50 - start, SIZE, STRIDE)
            torch.testing.assert_close(got[row, :complete], expected[row, :complete])


def test_tokens_that_came_another_way_are_caught_up_with(compressors):
    torch.manual_seed(1)
    layer = NsaDynamicLayer()
    layer.update(*states(1, 20))
    layer.extend(layer.keys, layer.values, compressors, None)
    layer.update(*states(1, 20))  # a dense forward: nothing is extended
    layer.update(*states(1, 1))
    torch.testing.assert_close(
        layer.extend(layer.keys, layer.values, compressors, None)[1], whole(layer, compressors)[1]
    )


@pytest.mark.parametrize("removed", [1, 5, 17, 33])
@pytest.mark.parametrize("starts", [None, [0, 9]])
def test_crop_keeps_only_blocks_still_complete(removed, starts, compressors):
    torch.manual_seed(1)
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    layer = NsaDynamicLayer()
    layer.update(*states(2, 41))
    layer.extend(layer.keys, layer.values, compressors, starts)
    layer.crop(-removed)
    assert layer.compressed_keys.shape[1] == n_blocks(41 - removed, SIZE, STRIDE)
    layer.update(*states(2, removed + 6))
    entries = layer.extend(layer.keys, layer.values, compressors, starts)
    for got, expected in zip(entries, whole(layer, compressors, starts), strict=True):
        for row in range(2):
            complete = n_blocks(47 - (0 if starts is None else int(starts[row])), SIZE, STRIDE)
            torch.testing.assert_close(got[row, :complete], expected[row, :complete])


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
        lambda layer: layer.batch_repeat_interleave(3),
        lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    ],
)
def test_changes_of_the_batch_cover_the_compressed_entries(change, compressors):
    torch.manual_seed(1)
    layer = NsaDynamicLayer()
    layer.update(*states(3, 30))
    layer.extend(layer.keys, layer.values, compressors, None)
    change(layer)
    layer.update(*states(layer.keys.shape[0], 5))
    for got, expected in zip(
        layer.extend(layer.keys, layer.values, compressors, None), whole(layer, compressors), strict=True
    ):
        torch.testing.assert_close(got, expected)


def indexed(layer: NsaDynamicLayer, index: Index, *steps: int, batch: int = 2) -> NsaDynamicLayer:
    """The layer with as many more tokens."""
    for step in steps:
        layer.extend_index(layer.update(*states(batch, step))[0], index)
    return layer


def assert_index_of_one_pass(layer: NsaDynamicLayer, index: Index) -> None:
    expected = index.keys(layer.keys)
    assert layer.index_keys.dtype == (torch.int8 if index.bits == 8 else layer.keys.dtype)
    assert torch.equal(layer.index_keys, expected.keys)
    assert layer.index_scales is expected.scales is None or torch.equal(layer.index_scales, expected.scales)


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_the_index_by_any_steps_is_that_of_one_pass(index):
    torch.manual_seed(1)
    assert_index_of_one_pass(indexed(NsaDynamicLayer(), index, 7, 1, 1, 30, 8), index)
    # in memory of its own, not a part of the keys
    layer = indexed(NsaDynamicLayer(), Index(((0, 4),)), 20)
    assert layer.index_keys.untyped_storage().nbytes() == layer.index_keys.nbytes
    plain = DynamicLayer()
    plain.update(*states(2, 20))
    layer = NsaDynamicLayer.adopt(plain)
    layer.update(*states(2, 3))  # a dense forward: nothing is extended
    assert_index_of_one_pass(indexed(layer, index, 1), index)


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_the_index_follows_what_happens_to_the_keys(index):
    torch.manual_seed(1)
    layer = indexed(NsaDynamicLayer(), index, 30, batch=3)
    for change, rows in (
        (lambda: layer.crop(-11), 3),
        (lambda: layer.reorder_cache(torch.tensor([2, 0, 0])), 3),
        (lambda: layer.batch_repeat_interleave(2), 6),
        (lambda: layer.batch_select_indices(torch.tensor([5, 1])), 2),
    ):
        change()
        assert_index_of_one_pass(layer, index)
        assert_index_of_one_pass(indexed(layer, index, 4, batch=rows), index)
    layer.update(*states(2, 9))
    layer.crop(-2)  # tokens that the index has not yet
    copied = copy.deepcopy(layer)
    for one in (layer, copied):
        assert_index_of_one_pass(indexed(one, index, 5), index)
    copied.reset()
    assert copied.index is copied.index_keys is copied.index_scales is None
    assert_index_of_one_pass(indexed(copied, index, 12), index)
    assert_index_of_one_pass(indexed(layer, index, 5), index)


def test_reset_forgets_everything(compressors):
    layer = NsaDynamicLayer()
    layer.update(*states(1, 30))
    layer.extend(layer.keys, layer.values, compressors, None)
    layer.reset()
    assert layer.compressed_keys is None and layer.compressed_values is None and layer.compressed_length == 0


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_an_offloaded_layer_moves_its_entries_and_its_index_too(index, compressors, monkeypatch):
    torch.manual_seed(1)
    layer, moved = NsaDynamicLayer(), []
    expected = NsaDynamicLayer()
    real_to = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        if kwargs.get("non_blocking"):
            moved.append((args[0], tensor.shape))
        return real_to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    for step in (20, 1, 1, 9):
        given = states(2, step)
        moved.clear()
        layer.prefetch()
        held = [getattr(layer, name).shape for name in layer.EXTRA if getattr(layer, name) is not None]
        assert all((layer.device, shape) in moved for shape in held)
        # as an offloaded `Cache.update` does: the layer is sent away before its entries are extended
        held = layer.update(*given)
        layer.offload()
        moved.clear()
        got = (*layer.extend(*held, compressors, None), *layer.extend_index(held[0], index))
        got = [states for states in got if states is not None]
        assert moved == [("cpu", states.shape) for states in got] and len(got) == (4 if index.bits == 8 else 3)
        held = expected.update(*given)
        same = (*expected.extend(*held, compressors, None), *expected.extend_index(held[0], index))
        assert all(torch.equal(*pair) for pair in zip(got, filter(torch.is_tensor, same), strict=True))


def test_a_packed_cache_cannot_be_continued():
    layer = NsaDynamicLayer()
    layer.update(*states(1, 5))
    layer.packed = True
    with pytest.raises(NsaError, match="packed documents"):
        layer.update(*states(1, 1))
