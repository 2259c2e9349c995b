"""The picture of architecture.md: one query's way through the three branches, of a real forward pass.

    python docs/draw.py                  writes docs/query.svg
    python docs/draw.py elsewhere.png    the same elsewhere, in the format that the name says

The text is 96 random tokens and the sizes are small, so that everything can be drawn. The selection is what the
operation returns; the probabilities of the entries are their softmax, as the operation takes it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from nsa_hf.kernels import MeanCompressor, Sizes, compress, nsa_attention

OUT = Path(__file__).parent / "query.svg"
SIZES = Sizes(kernel_size=8, kernel_stride=4, block_size=8, topk=5, init_blocks=1, local_blocks=2, window_size=20)
TOKENS, DIM = 96, 16
COMPRESSED, SELECTED, WINDOW, EMPTY, INK = "#4878cf", "#d65f5f", "#6acc65", "#f2f2f2", "#333333"


@dataclass(frozen=True)
class Way:
    """What the last query of the text sees.

    Attributes:
        probabilities: `[N]`, of the compressed entries.
        blocks: the selected blocks, ascending.
    """

    probabilities: Tensor
    blocks: list[int]


def last_query(seed: int = 6) -> Way:
    """One forward pass over random keys; the selection is what `nsa_attention` returns."""
    generator = torch.Generator().manual_seed(seed)
    # neighbours alike, as keys of a text are
    k = torch.randn(1, TOKENS // 6, 1, DIM, generator=generator).repeat_interleave(6, 1)
    k = k + 0.3 * torch.randn(1, TOKENS, 1, DIM, generator=generator)
    q = 0.6 * k.roll(40, 1) + 0.4 * k.roll(70, 1)
    k_cmp = compress(k, MeanCompressor(SIZES.kernel_size, DIM), SIZES.kernel_stride)
    gates = torch.ones(1, TOKENS, 1, 3)
    _, selection = nsa_attention(q, k, k, k_cmp, k_cmp, gates, return_selection=True, **SIZES.by_name())
    probabilities = (k_cmp[0, :, 0] @ q[0, -1, 0] / DIM**0.5).softmax(0)
    return Way(probabilities, [int(block) for block in selection[0, -1, 0] if block >= 0])


def strip(axis: Axes, bottom: float, colour: str, tokens: set[int], blocks: bool = False) -> None:
    """The tokens of the text in a row, those in `tokens` coloured; with the borders of the blocks."""
    for token in range(TOKENS):
        face = colour if token in tokens else EMPTY
        axis.add_patch(Rectangle((token, bottom), 1, 1.6, facecolor=face, edgecolor="white", linewidth=0.4))
    for first in range(0, TOKENS, SIZES.block_size) if blocks else ():
        axis.add_patch(
            Rectangle((first, bottom), SIZES.block_size, 1.6, facecolor="none", edgecolor=INK, linewidth=0.8)
        )


def label(axis: Axes, height: float, title: str, text: str, colour: str = INK) -> None:
    axis.text(-2, height + 0.9, title, ha="right", va="center", fontsize=10, fontweight="bold", color=colour)
    axis.text(-2, height - 0.6, text, ha="right", va="center", fontsize=7.5, color=INK, linespacing=1.3)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=colour, linewidth=1))


def draw(way: Way) -> Figure:
    """The picture: the text above, one branch below the other, the gated sum at the right."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axis = figure.add_subplot()
    axis.set(xlim=(-27, TOKENS + 24), ylim=(-1, 28))
    axis.axis("off")

    strip(axis, 25, "#cccccc", set(range(TOKENS)), blocks=True)
    axis.add_patch(Rectangle((TOKENS - 1, 25), 1, 1.6, facecolor=INK))
    label(axis, 25.3, "the text", f"{TOKENS} keys and values,\nblocks of {SIZES.block_size}")
    axis.text(TOKENS + 1, 25.8, "the query", fontsize=9, va="center")

    entries, most = len(way.probabilities), float(way.probabilities.max())
    for entry, share in enumerate(way.probabilities.tolist()):
        first = entry * SIZES.kernel_stride
        low = 19.5 + 1.1 * (entry % 2)
        axis.add_patch(
            Rectangle(
                (first, low),
                SIZES.kernel_size,
                0.9,
                facecolor=COMPRESSED,
                edgecolor="white",
                alpha=0.3 + 0.7 * share / most,
            )
        )
        axis.add_patch(Rectangle((first + 3.2, 21.9), 1.6, 2.4 * share / most, facecolor=COMPRESSED))
    label(
        axis,
        20.6,
        "compressed",
        f"{entries} entries, each of {SIZES.kernel_size} tokens;\nabove them their probabilities",
        COMPRESSED,
    )

    scores = torch.zeros(TOKENS // SIZES.block_size)
    for entry, share in enumerate(way.probabilities.tolist()):
        for token in range(SIZES.kernel_size):
            scores[(entry * SIZES.kernel_stride + token) // SIZES.block_size] += share / SIZES.kernel_stride
    for block, score in enumerate(scores.tolist()):
        first = block * SIZES.block_size
        face = SELECTED if block in way.blocks else "#bbbbbb"
        axis.add_patch(Rectangle((first + 1, 13), SIZES.block_size - 2, 3.2 * score / scores.max(), facecolor=face))
    label(axis, 13.8, "scores", "of the blocks: the probabilities of the\nentries that lie in each")

    chosen = {block * SIZES.block_size + i for block in way.blocks for i in range(SIZES.block_size)}
    strip(axis, 8.5, SELECTED, chosen, blocks=True)
    own = (TOKENS - 1) // SIZES.block_size
    for block in way.blocks:
        kind = "first" if block < SIZES.init_blocks else "local" if block > own - SIZES.local_blocks else "by score"
        axis.text((block + 0.5) * SIZES.block_size, 7.6, kind, fontsize=7, ha="center", va="center", color=SELECTED)
    label(
        axis,
        9,
        "selected",
        f"{SIZES.topk} blocks: {SIZES.init_blocks} first, {SIZES.local_blocks} local,\nthe others by score",
        SELECTED,
    )

    strip(axis, 3, WINDOW, set(range(TOKENS - SIZES.window_size, TOKENS)))
    label(axis, 3.2, "window", f"the last {SIZES.window_size} tokens", WINDOW)

    arrow(axis, (TOKENS / 2, 19.2), (TOKENS / 2, 17))
    arrow(axis, (TOKENS / 2, 12.6), (TOKENS / 2, 10.5))
    for height, end, colour, gate in ((20.6, 13.2, COMPRESSED, 1), (9.3, 11.8, SELECTED, 2), (3.8, 10.4, WINDOW, 3)):
        arrow(axis, (TOKENS + 1, height), (TOKENS + 12, end), colour)
        axis.text(TOKENS + 1.5, height + (1.2 if gate == 1 else -1.8), f"times gate {gate}", fontsize=8, color=colour)
    axis.text(TOKENS + 12.5, 11.8, "sum\n= output", fontsize=10, va="center", fontweight="bold")
    return figure


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    # the same file from the same versions, drawn on a white ground
    matplotlib.rcParams["svg.hashsalt"] = "nsa-hf"
    metadata = {"Date": None} if out.suffix == ".svg" else None
    draw(last_query()).savefig(out, dpi=150, metadata=metadata)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
