"""The seven sizes of Native Sparse Attention, their rules, and the block counts that follow from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes of the three branches, in tokens or blocks (paper's letters in brackets).

    Args:
        kernel_size: tokens of a compression block [l].
        kernel_stride: tokens between the starts of two compression blocks [d]; divides `kernel_size` and `block_size`.
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
            "kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride, "block_size": self.block_size,
            "topk": self.topk, "init_blocks": self.init_blocks, "local_blocks": self.local_blocks,
            "window_size": self.window_size,
        }  # fmt: skip

    def check(self, prefix: str = "") -> Sizes:
        """Returns itself if the sizes obey the rules.

        Args:
            prefix: put before each name in the message (`nsa_` for the fields of a config).

        Raises:
            TypeError: a size is not an int.
            ValueError: a size breaks a rule; names the field, the value and the rule.
        """
        for name, value in self.by_name().items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{prefix}{name} must be an int, got {value!r}")
            least = 0 if name == "init_blocks" else 1
            if value < least:
                raise ValueError(f"{prefix}{name} must be at least {least}, got {value}")
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


def n_blocks(tokens: int, kernel_size: int, kernel_stride: int) -> int:
    """How many complete compression blocks `tokens` tokens hold (eq. 7): block `i` covers `[i*d, i*d + l)`."""
    return 0 if tokens < kernel_size else (tokens - kernel_size) // kernel_stride + 1
