"""Which positions belong to which row or document: found once per forward, handed to every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa_hf.kernels import is_exporting

from .errors import NsaError

# Of an assertion on the device; on a GPU it may have 255 letters.
HOLES = "attention_mask has holes (a row is 1, then 0, then 1 again): pad on the left (tokenizer.padding_side='left')"


@dataclass(frozen=True)
class Segments:
    """Left-padded rows (`starts`), packed documents (`cu_seqlens`), or full rows without padding (both None).

    Attributes:
        starts: int32 `[B]`, first real position of each row.
        lengths: int32 `[B]`, tokens in a static cache, the new ones counted; None without one.
        cu_seqlens: int32 `[documents + 1]`, borders of the documents that one row holds.
        borders: the same borders on the host.
        past: tokens in a dynamic cache before the new ones.
    """

    starts: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    borders: tuple[int, ...] = ()
    past: int = 0

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Segments:
        """The same segments on another device. Accelerate's hooks (`device_map`) move every argument that has this."""
        tensors = ((name, value) for name, value in vars(self).items() if isinstance(value, Tensor))
        moved: dict[str, Any] = {name: value.to(device, non_blocking=non_blocking) for name, value in tensors}
        return replace(self, **moved)

    def position_ids(self, tokens: int) -> Tensor | None:
        """Positions of the new tokens within their row or document, int64 `[B, T]`; 0 for padding.

        None where every row begins at its first position, as families assume without position ids. To dense attention
        with RoPE only distances matter; a trained compressor sees the positions themselves.
        """
        if self.cu_seqlens is not None:
            borders = self.cu_seqlens.long()
            first = borders[:-1].repeat_interleave(borders.diff(), output_size=tokens)
            return (torch.arange(tokens, device=borders.device) - first)[None]
        if self.starts is None:
            return None
        place = torch.arange(tokens, device=self.starts.device)
        before = self.past if self.lengths is None else self.lengths[:, None].long() - tokens
        return (place + before - self.starts[:, None]).clamp(min=0)


def find_segments(
    batch: int,
    tokens: int,
    past: int,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
) -> Segments:
    """The segments of a forward without a cache or with a dynamic one.

    They are taken from `cu_seq_lens` where given, else from the mask, else from position ids that restart.

    Args:
        batch, tokens, past: rows, new tokens of each, and tokens already in the cache.
        attention_mask: `[B, past + T]`, nonzero where a token is real: left padding, right padding or both.
        position_ids: `[B or 1, T]`; where they do not rise by one a new document begins (batch 1 only). Of RoPE in
            several dimensions `[4, B, T]`, the text's first; those of `[3, B, T]` are not looked at.
        cu_seq_lens_q, cu_seq_lens_k: int `[documents + 1]`, equal; one of them is enough.

    Raises:
        NsaError: a mask with holes, of four dimensions or of a wrong size; packing with several rows or a cache.
    """
    check_positions(position_ids, batch, tokens)
    cu_seqlens = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    if cu_seqlens is not None:
        check_borders(cu_seqlens)
        if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seqlens:
            if not torch.equal(cu_seq_lens_k, cu_seqlens):
                raise NsaError("cu_seq_lens_q and cu_seq_lens_k must be equal: queries and keys are the same documents")
        return packed_segments(cu_seqlens.tolist(), cu_seqlens, batch, tokens, past)
    if attention_mask is not None:
        return Segments(starts=padding_starts(attention_mask, batch, past + tokens), past=past)
    position_ids = text_positions(position_ids)
    if position_ids is not None and is_exporting():
        rises = (position_ids.diff(dim=-1) == 1).all()
        torch._assert_async(rises, "position_ids restart: packed documents cannot be given to an exported model")
        return Segments(past=past)
    if position_ids is not None and tokens > 1:
        restarts = position_ids.diff(dim=-1) != 1
        if not bool(restarts.any()):
            return Segments(past=past)
        if batch != 1:
            raise NsaError(
                f"position ids that restart mean packed documents, which need batch size 1, got {batch}: flatten the "
                "batch (DataCollatorWithFlattening), or give an attention_mask if the rows are padded"
            )
        borders = [0, *(restarts[0].nonzero().flatten() + 1).tolist(), tokens]
        return packed_segments(borders, position_ids.new_tensor(borders), batch, tokens, past)
    return Segments(past=past)


def check_positions(position_ids: Tensor | None, batch: int, tokens: int) -> None:
    """Checks the shape of position ids.

    Raises:
        NsaError: it is neither `[batch or 1, tokens]` nor that of RoPE in several dimensions.
    """
    if position_ids is None:
        return
    *several, rows, places = position_ids.shape if position_ids.dim() > 1 else (0, 0)
    if len(several) > 1 or rows not in (1, batch) or places != tokens:
        raise NsaError(
            f"position_ids must be [{batch} or 1, {tokens}] (rows and new tokens), or [3 or 4, {batch}, {tokens}] for "
            f"RoPE in several dimensions, got {list(position_ids.shape)}"
        )


def check_borders(cu_seqlens: Tensor) -> None:
    """Checks that documents' borders are whole numbers in a row.

    Raises:
        NsaError: they are not.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise NsaError(
            "cu_seq_lens_q and cu_seq_lens_k must be int32 or int64 [documents + 1], got "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )


def text_positions(position_ids: Tensor | None) -> Tensor | None:
    """The positions that count the text's tokens, `[B or 1, T]`: the first of `[4, B, T]`, none of `[3, B, T]`."""
    if position_ids is None or position_ids.dim() < 3:
        return position_ids
    return position_ids[0] if position_ids.shape[0] == 4 else None


def packed_segments(borders: list[int], cu_seqlens: Tensor, batch: int, tokens: int, past: int) -> Segments:
    """The segments of packed documents, checked; of a single document those of a full row.

    Args:
        borders: 0, the first position of each further document, and the number of tokens.
        cu_seqlens: the same, int `[documents + 1]`.
        batch, tokens, past: as in `find_segments`.

    Raises:
        NsaError: there are several rows, a cache, or borders that do not rise from 0 to `tokens`.
    """
    rises = all(low < high for low, high in zip(borders[:-1], borders[1:], strict=True))
    if batch != 1 or past or len(borders) < 2 or borders[0] != 0 or borders[-1] != tokens or not rises:
        raise NsaError(
            f"packed documents need batch size 1, an empty cache and borders that rise from 0 to the {tokens} tokens; "
            f"got batch size {batch}, {past} cached tokens and borders {borders}"
        )
    if len(borders) == 2:
        return Segments()
    return Segments(cu_seqlens=cu_seqlens.to(torch.int32), borders=tuple(borders))


def static_segments(
    batch: int,
    tokens: int,
    past: Tensor | int,
    room: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
) -> Segments:
    """The segments of a forward with a static cache. For a decoding step on a GPU nothing is copied to the host.

    Args:
        batch, tokens: rows, and new tokens of each.
        past, room: tokens that the cache holds (a tensor on its device), and those it has room for.
        attention_mask: `[B, past + T]`, or `[B, room]` filled up with zeros, which has the same shape at every step.

    Raises:
        NsaError: packed documents; a mask that is wrong as in `find_segments`.
        RuntimeError: a mask that is wrong in a compiled step, or in a step of one token on a GPU, where looking at it
            would stall the step. It is raised by the next call that waits for the GPU, after which CUDA is unusable.
    """
    check_positions(position_ids, batch, tokens)
    may_look = not torch.compiler.is_compiling() and (tokens > 1 or device.type == "cpu")
    positions = text_positions(position_ids) if may_look and tokens > 1 and attention_mask is None else None
    restarts = positions is not None and bool((positions.diff(dim=-1) != 1).any())
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None or restarts:
        raise NsaError("a static cache cannot hold packed documents: give no cache, or pad the rows on the left")
    if isinstance(past, Tensor):
        # the first layer that counts them may be on another device
        lengths = (past + tokens).to(device, torch.int32).expand(batch).contiguous()
    else:
        lengths = torch.full((batch,), past + tokens, dtype=torch.int32, device=device)
    if attention_mask is None:
        return Segments(lengths=lengths)
    check_mask(attention_mask, batch, (int(past) + tokens, room) if may_look else None)
    starts, runs = row_runs(attention_mask)
    if may_look:
        refuse_holes(int(runs.max()))
    else:
        torch._assert_async((runs <= 1).all(), HOLES)
    return Segments(starts=starts, lengths=lengths)


def static_mask(attention_mask: Tensor | None, room: int) -> Tensor | None:
    """A 2D mask `[B, tokens so far]` filled up with zeros to `[B, room]`: the same shape at every step."""
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] >= room:
        return attention_mask
    return torch.nn.functional.pad(attention_mask, (0, room - attention_mask.shape[1]))


def padding_starts(attention_mask: Any, batch: int, keys: int) -> Tensor | None:
    """First real position of each row, int32 `[B]`, or None where no row is padded on the left.

    In a graph (`torch.compile`, `torch.export`), which cannot look at the mask, never None.

    Raises:
        NsaError: the mask has holes or a wrong shape.
        RuntimeError: it has holes, in a graph.
    """
    check_mask(attention_mask, batch, (keys,))
    starts, runs = row_runs(attention_mask)
    if torch.compiler.is_compiling():
        torch._assert_async((runs <= 1).all(), HOLES)
        return starts
    most_runs, last_start = torch.stack([runs.max(), starts.max()]).tolist()
    refuse_holes(most_runs)
    return starts if last_start > 0 else None


def check_mask(attention_mask: Any, batch: int, widths: tuple[int, ...] | None) -> None:
    """Checks a mask's shape.

    Args:
        widths: numbers of tokens that it may have; None = any.

    Raises:
        NsaError: it is not `[batch, one of widths]`.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise NsaError(
            f"sparse attention takes a 2D attention_mask [batch, tokens] (padding only), got {got}: "
            "for packed documents give position_ids that restart, or cu_seq_lens_q"
        )
    rows, width = attention_mask.shape
    if rows != batch or (widths is not None and not any(width == other for other in widths)):
        expected = " or ".join(str([batch, other]) for other in dict.fromkeys(widths or (width,)))
        raise NsaError(
            f"attention_mask must be {expected} (rows, cached and new tokens), got {list(attention_mask.shape)}"
        )


def row_runs(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first real position of each row, and how many runs of real positions it has: int32 `[B]` both.

    A row without any real position starts behind its end.
    """
    keys = attention_mask.shape[1]
    real = attention_mask != 0
    run_begins = real.long().diff(dim=-1, prepend=real.new_zeros(real.shape[0], 1).long()) == 1
    # int64 until the end: PyTorch 2.11 cannot compile the minimum of int32 beside a number of tokens that varies
    position = torch.arange(keys, device=attention_mask.device)
    first = torch.where(real, position, keys).amin(-1)
    return first.to(torch.int32), run_begins.sum(-1).to(torch.int32)


def is_left_padded(attention_mask: Tensor) -> bool:
    """Whether all padding of the mask `[B, tokens]` stands before its row's tokens."""
    return bool((attention_mask[:, 1:].bool() | ~attention_mask[:, :-1].bool()).all())


def padding_first(attention_mask: Tensor) -> Tensor:
    """The order `[B, tokens]` in which each row's padding comes first, and then its tokens as they were."""
    return attention_mask.bool().int().argsort(dim=1, stable=True)


def refuse_unfinished(attention_mask: Tensor) -> None:
    """Refuses rows that cannot be continued: the next token would come behind a hole.

    Raises:
        NsaError: a row of the mask `[B, tokens]` has holes, or ends with padding.
    """
    refuse_holes(int(row_runs(torch.nn.functional.pad(attention_mask, (0, 1), value=1))[1].max()))


def refuse_holes(most_runs: int) -> None:
    """Refuses a mask of which a row has more than one run of real positions."""
    if most_runs > 1:
        raise NsaError(
            "attention_mask has holes (a row is 1, then 0, then 1 again): sparse attention takes padding on the left "
            "and on the right, but nothing behind that. In a loop of your own pad prompts on the left "
            "(tokenizer.padding_side='left'); generate() does so by itself"
        )
