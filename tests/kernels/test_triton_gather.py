"""The counting sort of the picks, and the items they are shared out among, interpreted on the CPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from triton_cases import CASES as ATTENTION
from triton_cases import compare

from nsa_hf.kernels import Placement, Sizes

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from nsa_hf.kernels.gpu.gather import find_item  # noqa: E402

SIZES = Sizes(4, 2, 4, 6, 1, 2, 4)
# queries, KV heads, rows, sizes, bytes of partial results at once, and where the documents begin, where there are some
CASES = {
    "tiles of 128, the last one not full": (450, 2, 1, SIZES, 1 << 30, None),
    "two chunks of two rows": (200, 1, 2, SIZES, 4 * 4 * 128, None),
    "packed": (150, 1, 1, SIZES, 1 << 30, (0, 3, 70, 150)),
    "large blocks, in parts": (300, 1, 1, Sizes(4, 2, 80, 3, 1, 1, 4), 1 << 30, None),
    "many slots": (400, 1, 1, Sizes(4, 2, 4, 60, 1, 2, 4), 1 << 30, None),
}


def draw_selection(relative: torch.Tensor, kv_heads: int, sizes: Sizes) -> torch.Tensor:
    """`[B, T, Hk, topk]`: of each query the first and the local blocks, and others at random, ascending."""
    random = torch.Generator().manual_seed(0)
    blocks = int(relative.max()) // sizes.block_size + 1
    own = (relative // sizes.block_size)[:, :, None, None]
    number = torch.arange(blocks)
    score = torch.rand(*relative.shape, kv_heads, blocks, generator=random)
    score[(number < sizes.init_blocks) | (number > own - sizes.local_blocks).expand_as(score)] = 2
    score[(number > own).expand_as(score)] = -1
    score, chosen = score.topk(min(sizes.topk, blocks), -1)
    found = chosen.masked_fill(score < 0, blocks).sort(-1).values
    found = torch.nn.functional.pad(found, (0, sizes.topk - found.shape[-1]), value=blocks)
    return found.masked_fill(found == blocks, -1).to(torch.int32)


def gathered(name: str) -> tuple:
    """What the kernels find, and what each (lane, part) should hold."""
    from nsa_hf.kernels.gpu import gather
    from nsa_hf.kernels.gpu.layout import Layout, find_layout

    tokens, kv_heads, rows, sizes, budget, documents = CASES[name]
    q = torch.zeros(rows, tokens, kv_heads, 16)
    placement = Placement(None, None, None if documents is None else torch.tensor(documents, dtype=torch.int32))
    layout = Layout.of(*find_layout(q, q, q, tokens, sizes, placement), sizes.block_size, 32, documents is not None)
    selection = draw_selection(layout.relative, kv_heads, sizes)
    parts, a_block = layout.part_first.shape[1], layout.parts_a_block
    slots = gather.count_slots(sizes, a_block, tokens)
    chunks = gather.cut_queries(rows, tokens, kv_heads, parts, slots, 4, budget)
    usual, gather.MOST_TILES = gather.MOST_TILES, 4
    try:
        found = gather.gather_queries(selection, layout, sizes, chunks)
    finally:
        gather.MOST_TILES = usual

    expected = [[[] for _ in range(parts)] for _ in range(chunks.lanes)]
    for row in range(rows):
        for token in range(tokens):
            past = int(layout.relative[row, token]) // sizes.block_size - sizes.local_blocks
            for head in range(kv_heads):
                lane = (token // chunks.tokens * rows + row) * kv_heads + head
                for place, block in enumerate(selection[row, token, head].tolist()):
                    for piece in range(a_block) if 0 <= block <= past else ():
                        part = int(layout.part_base[row, token]) + block * a_block + piece
                        expected[lane][part].append(token * slots + place * a_block + piece)
    return found.order.tolist(), found.offsets.tolist(), chunks, expected


@pytest.mark.parametrize("name", CASES)
def test_the_picks_of_a_part_in_the_order_of_the_queries(process: ProcessPoolExecutor, name: str) -> None:
    order, offsets, chunks, expected = process.submit(gathered, name).result()
    assert (chunks.count > 1) == (name == "two chunks of two rows")
    assert len(order) == chunks.picks and len(offsets) == chunks.lanes
    begin = 0
    for lane, (borders, lists) in enumerate(zip(offsets, expected, strict=True)):
        assert borders[0] == begin
        assert [order[a:b] for a, b in zip(borders[:-1], borders[1:], strict=True)] == lists
        first = lane // (chunks.lanes // chunks.count) * chunks.tokens
        begin += (min(first + chunks.tokens, CASES[name][0]) - first) * chunks.slots


@triton.jit
def items_kernel(offsets, out, PARTS, STEPS, MOST: tl.constexpr):
    """`out [items, 3]`: what `find_item` says."""
    part, first, last = find_item(offsets, tl.program_id(0), PARTS, STEPS, MOST)
    out += 3 * tl.program_id(0)
    tl.store(out, part)
    tl.store(out + 1, first)
    tl.store(out + 2, last)


def items_of(counts: list[int], most: int) -> list[tuple[int, int, int]]:
    """Part and picks of every item that is launched."""
    from nsa_hf.kernels.gpu.gather import Chunks, Gather, item_steps

    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32) + 7
    items = Gather(offsets, offsets, Chunks(1, sum(counts), 1, len(counts), 1, sum(counts))).items(most)
    found = torch.empty(items, 3, dtype=torch.int32)
    items_kernel[(items,)](offsets, found, len(counts), item_steps(len(counts)), MOST=most)
    return [tuple(x) for x in found.tolist()]


@pytest.mark.parametrize("counts", [[5, 0, 0, 8, 1, 12, 0], [0, 0], [9], [0, 4], [3, 3, 3, 3], [2, 0, 7] * 13])
def test_items_hold_every_pick_once(process: ProcessPoolExecutor, counts: list[int]) -> None:
    items = [item for item in process.submit(items_of, counts, 4).result() if item[1] < item[2]]
    borders = torch.tensor([0, *counts]).cumsum(0) + 7
    assert [x for _, first, last in items for x in range(first, last)] == list(range(7, 7 + sum(counts)))
    for part, first, last in items:
        assert borders[part] <= first and last <= borders[part + 1] and last - first <= 4
    # as few as there can be
    assert len(items) == sum(-(-count // 4) for count in counts)


def with_small_items() -> tuple[dict[str, float], float]:
    """Output and gradients where most parts have several items."""
    from nsa_hf.kernels.gpu import selected

    usual, selected.picks_a_tile = selected.picks_a_tile, lambda rows, group: 3
    try:
        return compare(ATTENTION["groups of three"])
    finally:
        selected.picks_a_tile = usual


def in_narrow_tiles() -> tuple[dict[str, float], float]:
    """Output and gradients where heads of the selected branch are in two tiles though one would hold them."""
    from nsa_hf.kernels.gpu import selected

    usual = selected.gather_tiles
    selected.gather_tiles = lambda *args, **named: {**usual(*args, **named), "WIDEST": 16}
    try:
        return compare(replace(ATTENTION["wide keys"], value_dim=31))
    finally:
        selected.gather_tiles = usual


def test_heads_in_two_tiles_though_one_would_hold_them(process: ProcessPoolExecutor) -> None:
    errors, same = process.submit(in_narrow_tiles).result()
    assert same == 1
    assert all(error <= 5e-6 for error in errors.values()), errors


def test_slots_are_of_few_kinds() -> None:
    from nsa_hf.kernels.gpu.gather import count_slots

    sizes = Sizes()
    slots = [count_slots(sizes, 1, blocks * sizes.block_size) for blocks in range(1, 20)]
    assert slots == [0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 14, 14, 14, 14, 14]


def test_several_items_of_a_part(process: ProcessPoolExecutor) -> None:
    errors, same = process.submit(with_small_items).result()
    assert same == 1
    assert all(error <= 5e-6 for error in errors.values()), errors


def place_documents(lengths: list[int]) -> list[tuple]:
    """Of each document its tokens' places, first entry and parts, as the layout has them and as they are."""
    from nsa_hf.kernels.gpu.layout import Layout, find_layout

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    sizes, tokens = Sizes(kernel_size=4, kernel_stride=2, block_size=4), int(ends[-1])
    q = torch.zeros(1, tokens, 1, 16)
    layout = Layout.of(*find_layout(q, q, q, tokens, sizes, Placement(None, None, ends)), 4, 32, True)
    found, entries = [], 0
    for number, length in enumerate(lengths):
        first = int(ends[number])
        here = slice(first, first + length)
        parts = (layout.part_base[0, here] + layout.relative[0, here] // 4).long()
        got = (layout.relative[0, here], layout.compressed[0][0, here], layout.part_first[0][parts])
        got += (layout.part_end[0][parts],)
        place = torch.arange(length, dtype=torch.int32)
        begin = first + place // 4 * 4
        is_so = (place, torch.full_like(place, entries), begin, (begin + 4).clamp(max=first + length))
        found.append((got, is_so))
        entries += 0 if length < 4 else (length - 4) // 2 + 1
    return found


def test_many_documents_some_of_them_empty(process: ProcessPoolExecutor) -> None:
    lengths = [0, 9, 0, 0, 1, 5, 3, 2, 4, 0] * 28  # 280: more than are numbered at once
    for got, expected in process.submit(place_documents, lengths).result():
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
