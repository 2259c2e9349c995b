"""The seven sizes of Native Sparse Attention, their rules, and the block counts that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

# Positions are int32.
MOST = 2**31 - 1
# Up to here sizes are taken as they are, so that kernels are not compiled anew for texts that grow.
FEW_BLOCKS, FEW_TOKENS = 64, 4096


@dataclass(frozen=True)
class Sizes:
    """The sizes of the three branches, in tokens or blocks (paper's letters in brackets).

        >>> Sizes(topk=32).exact_tokens
        2048

    Args:
        kernel_size: tokens of an entry, a compressed key and value [l].
        kernel_stride: tokens between the starts of two entries [d]; divides `kernel_size` and `block_size`.
        block_size: tokens of a selection block [l']; at least `kernel_size`.
        topk: selection blocks a query attends to, the forced ones counted [n].
        init_blocks: blocks at the start of the text that are always selected.
        local_blocks: the query's own block and those just before it, always selected.
        window_size: tokens of the sliding window, the query's own counted [w].
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512

    @property
    def exact_tokens(self) -> int:
        """Up to this many tokens the selection holds every block, so the selected branch is dense attention."""
        return self.topk * self.block_size

    def by_name(self) -> dict[str, int]:
        """The sizes as `nsa_attention` takes them."""
        # written out: `torch.compile` traces this
        return {
            "kernel_size": self.kernel_size,
            "kernel_stride": self.kernel_stride,
            "block_size": self.block_size,
            "topk": self.topk,
            "init_blocks": self.init_blocks,
            "local_blocks": self.local_blocks,
            "window_size": self.window_size,
        }

    def as_list(self) -> list[int]:
        """The sizes as a custom operator's schema takes them; `Sizes(*numbers)` is the way back."""
        return list(self.by_name().values())

    def check(self, prefix: str = "") -> Sizes:
        """Returns itself if the sizes obey the rules.

        Args:
            prefix: put before each name in the message (`nsa_` for the fields of a config).

        Raises:
            TypeError: a size is not an int.
            ValueError: a size breaks a rule; names the field, the value and the rule.
        """
        for name, value in self.by_name().items():
            least = 0 if name == "init_blocks" else 1
            check_int(f"{prefix}{name}", value, least)
        for name in ("kernel_size", "block_size"):
            if getattr(self, name) % self.kernel_stride:
                raise ValueError(
                    f"{prefix}kernel_stride must divide {prefix}{name}, got {self.kernel_stride} and "
                    f"{getattr(self, name)}: choose a stride that divides both"
                )
        if self.kernel_size > self.block_size:
            raise ValueError(
                f"{prefix}kernel_size must be at most {prefix}block_size, got {self.kernel_size} and {self.block_size}"
            )
        if self.topk < self.init_blocks + self.local_blocks:
            raise ValueError(
                f"{prefix}topk counts the forced blocks, so it must be at least {prefix}init_blocks + "
                f"{prefix}local_blocks = {self.init_blocks + self.local_blocks}, got {self.topk}"
            )
        return self

    def within(self, keys: int) -> Sizes:
        """Sizes that mean the same in a text of `keys` tokens and cost no more than the text needs.

        What is far larger than the text is cut to what still covers all of it, rounded up to a power of two, so that
        few kinds of sizes come of it. The usual ones are left as they are.
        """
        if self.topk <= FEW_BLOCKS and max(self.block_size, self.window_size) <= FEW_TOKENS:
            return self
        tokens = power_of_2(keys + 1, FEW_TOKENS)
        # a block that covers the text still does, and a kernel that is longer still is
        block = min(self.block_size, -(-tokens // self.kernel_stride) * self.kernel_stride)
        blocks = power_of_2(-(-keys // block), FEW_BLOCKS)
        init, local = min(self.init_blocks, blocks), min(self.local_blocks, blocks)
        return Sizes(
            min(self.kernel_size, block),
            self.kernel_stride,
            block,
            min(self.topk, max(blocks, init + local)),
            init,
            local,
            min(self.window_size, tokens),
        )


def check_int(name: str, value: object, least: int) -> None:
    """Whether a size is an int of at least `least`.

    Raises:
        TypeError: not an int.
        ValueError: smaller, or larger than positions are.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > MOST:
        raise ValueError(f"{name} must be at most 2^31 - 1 = {MOST}, got {value}")


def power_of_2(count: int, least: int) -> int:
    """`least` doubled until it is `count` or more."""
    while least < count:
        least *= 2
    return least


def n_blocks(tokens: int, kernel_size: int, kernel_stride: int) -> int:
    """How many complete entries `tokens` tokens hold (eq. 7): entry `i` covers `[i*d, i*d + l)`.

    >>> n_blocks(256, kernel_size=32, kernel_stride=16)
    15
    """
    return 0 if tokens < kernel_size else (tokens - kernel_size) // kernel_stride + 1
