"""Windows of tokens out of texts that come one by one, in an order that follows from a seed.

    stream = WindowStream(parts_of(open_texts("corpus")), tokenizer, pack=True, seed=0)
    window = stream.take(8192)              # whatever length, each time
    state = stream.state()                  # small, as JSON can hold it
    stream.restore(state)                   # goes on behind that window, here or in another process

A text of `length` tokens and more gives windows of its own, so that their first tokens say something about their last
ones; what is left over at its end is dropped. Shorter texts are packed: they follow each other until a window is full,
and each begins at position 0 (`borders`). Several texts are read at a time, in lanes, so that windows that follow each
other are of different ones. Only texts that are being read are in memory, with the whole of the one of which a part was
read last; and a run that goes on reads only those again.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from nsa_hf.conversion.files.hashes import hash_parts
from nsa_hf.errors import NsaError

from .data import hash_texts
from .sources import HubTexts, Named

LANES = 16  # texts that are read at a time
# A text of more characters counts as several, so that none fills many windows one after another; but a part has room
# for some of the longest windows.
LONGEST_PART, PER_TOKEN = 200_000, 20


class Window(NamedTuple):
    """`ids`: token ids `[length]`; `borders`: where in it a new text begins, 0 not counted; `name`: of what it has."""

    ids: list[int]
    borders: list[int]
    name: str


class Span(NamedTuple):
    """Tokens `start` to `end - 1` of the text with number `text` in a stream's order."""

    text: int
    start: int
    end: int


class StoredParts:
    """The parts of texts on the disk. It is read once when it is made: for where long texts are cut, and for its hash.

    Attributes:
        hash: of names, texts, and their order.
        count: how many parts there are.
    """

    def __init__(self, texts: Sequence[Named], longest: int = LONGEST_PART):
        """Reads all once.

        Args:
            texts: on the disk.
            longest: characters of a part at most.
        """
        self.texts, self.longest = texts, longest
        self.owners, self.starts, self.ends = array("q"), array("q"), array("q")
        self.hash = hash_texts(self.read_once())
        self.count = len(self.owners)

    def read_once(self) -> Iterator[Named]:
        """The texts; notes where they are cut."""
        for owner, (name, text) in enumerate(self.texts):
            for start, end in cut(text, self.longest):
                self.owners.append(owner)
                self.starts.append(start)
                self.ends.append(end)
            yield name, text

    def ordered(self, seed: int) -> StoredOrder:
        """The parts in the order of a seed."""
        return StoredOrder(self, seed)


class StoredOrder:
    """Stored parts in shuffled order, over and over, each time in another.

    Attributes:
        count: how many there are.
    """

    def __init__(self, parts: StoredParts, seed: int):
        self.parts, self.seed = parts, seed
        self.count = parts.count
        self.times, self.order = -1, array("q")
        self.owner, self.owned = -1, ("", "")  # the text of which a part was read last

    def read(self, numbers: Sequence[int]) -> list[Named]:
        """Name and text of the parts with these numbers; a text that several are of is read once for them."""
        parts, owners = [self.part(number) for number in numbers], self.parts.owners
        places = sorted(range(len(parts)), key=lambda place: (owners[parts[place]] != self.owner, owners[parts[place]]))
        found = {place: self.read_part(parts[place]) for place in places}
        return [found[place] for place in range(len(parts))]

    def part(self, number: int) -> int:
        """Which of the stored parts has a number in this order."""
        times, place = divmod(number, self.count)
        if times != self.times:
            self.times, self.order = times, array("q", range(self.count))
            random.Random(f"{self.seed} {times}").shuffle(self.order)
        return self.order[place]

    def read_part(self, part: int) -> Named:
        """Name and text of a stored part."""
        parts, owner = self.parts, self.parts.owners[part]
        if owner != self.owner:
            self.owner, self.owned = owner, parts.texts[owner]
        name, text = self.owned
        return name, text[parts.starts[part] : parts.ends[part]]


class StreamedParts:
    """The parts of a data set that is streamed.

    Attributes:
        hash: of what it is called, and its commit.
        count: not known: 0.
    """

    count = 0

    def __init__(self, texts: HubTexts, longest: int = LONGEST_PART):
        self.texts, self.longest = texts, longest
        self.hash = hash_parts([f"{texts.source}@{texts.revision}".encode()])

    def ordered(self, seed: int) -> StreamedOrder:
        """The parts in the order of a seed."""
        return StreamedOrder(self.texts, seed, self.longest)


class StreamedOrder:
    """Streamed parts in shuffled order, over and over. To go back means to begin again at the front.

    Attributes:
        count: how many there are; 0 until the end was seen.
    """

    def __init__(self, texts: HubTexts, seed: int, longest: int):
        self.texts, self.seed, self.longest = texts, seed, longest
        self.count = self.next = 0
        self.parts = self.all_parts()

    def all_parts(self) -> Iterator[Named]:
        """The parts of all texts, over and over."""
        for times in range(1 << 30):
            count = 0
            for name, text in self.texts.shuffled(self.seed + times):
                for start, end in cut(text, self.longest):
                    count += 1
                    yield name, text[start:end]
            if not count:
                raise NsaError(f"found no text in {self.texts.source}: give other data")
            self.count = count

    def read(self, numbers: Sequence[int]) -> list[Named]:
        """Name and text of the parts with these numbers, which ascend."""
        return [self.read_part(number) for number in numbers]

    def read_part(self, number: int) -> Named:
        """Name and text of the part with a number."""
        if number < self.next:
            self.next, self.parts = 0, self.all_parts()
        while self.next < number:
            next(self.parts)
            self.next += 1
        self.next += 1
        return next(self.parts)


Parts = StoredParts | StreamedParts


def parts_of(texts: Sequence[Named] | HubTexts, length: int = 0) -> Parts:
    """The parts of texts.

    Args:
        texts: as `open_texts` gives them.
        length: tokens of the longest window that is made of them.
    """
    longest = max(LONGEST_PART, PER_TOKEN * length)
    return StreamedParts(texts, longest) if isinstance(texts, HubTexts) else StoredParts(texts, longest)


def cut(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Start and end of the parts of a text: one, or several of at most `longest` characters that end with a line."""
    start = 0
    while start < len(text):
        end = min(start + longest, len(text))
        if end < len(text):
            end = text.rfind("\n", start + longest // 2, end) + 1 or end
        yield start, end
        start = end


class Lane:
    """One reader of a stream: the text that it is at, and what is left of texts before it.

    Attributes:
        text: the number of its text, -1 before it has one.
        offset: tokens that were taken of it.
        open: spans that wait until they fill a window.
    """

    def __init__(self, text: int = -1, offset: int = 0, open: Sequence[Span] = ()):
        self.text, self.offset, self.open = text, offset, list(open)


class WindowStream:
    """Windows out of the texts of one source.

    Attributes:
        short: texts that were dropped since they are shorter than a window (where nothing is packed), each counted
            when it was read for the first time.
    """

    def __init__(self, parts: Parts, tokenizer: Any, *, pack: bool, seed: int):
        """Begins at the first window.

        Args:
            parts: of the texts.
            tokenizer: Transformers'.
            pack: short texts share a window; otherwise they are dropped.
            seed: of the order of the texts.
        """
        self.order: StoredOrder | StreamedOrder = parts.ordered(seed)
        self.encode, self.pack = encoder(tokenizer), pack
        self.opening = opening_tokens(tokenizer)
        self.next = self.turn = self.short = 0
        self.lanes = [Lane() for _ in range(min(LANES, self.order.count or LANES))]
        self.names: dict[int, str] = {}
        self.tokens: dict[int, array[int]] = {}  # of the texts that are needed
        self.ahead: dict[int, tuple[str, array[int]]] = {}  # of those that come next

    def take(self, length: int) -> Window:
        """The next window.

        Args:
            length: its tokens.

        Raises:
            NsaError: no text is long enough, or one cannot be read.
        """
        lane = self.lanes[self.turn % len(self.lanes)]
        self.turn += 1
        first = self.next
        while (window := self.advance(lane, length)) is None:
            if self.order.count and self.next - first > 2 * self.order.count + len(self.lanes):
                raise NsaError(
                    f"none of the {self.order.count} documents has {length} tokens: give longer texts or a smaller "
                    "length"
                )
        return window

    def advance(self, lane: Lane, length: int) -> Window | None:
        """One step towards a lane's next window of `length` tokens; None when more are needed."""
        if sum(self.size(span) for span in lane.open) >= length:
            return self.filled(lane, length)
        if lane.text < 0:
            lane.text, lane.offset = self.next, 0
            self.next += 1
            self.read(lane.text)
        body = length - len(self.opening)
        left = len(self.tokens[lane.text]) - lane.offset
        if left >= body:
            span = Span(lane.text, lane.offset, lane.offset + body)
            lane.offset += body
            return self.window([span], length)
        # What is left over of a long text is not packed: nearly every batch would have some of it, and batches of whole
        # windows are trained on much faster.
        if self.pack and left and lane.offset == 0:
            lane.open.append(Span(lane.text, lane.offset, lane.offset + left))
        elif lane.offset == 0:
            self.short += lane.text < (self.order.count or sys.maxsize)
        lane.text = -1
        self.forget()
        return None

    def size(self, span: Span) -> int:
        """The tokens of a span in a window, where it begins as a text does."""
        return len(self.opening) + span.end - span.start

    def filled(self, lane: Lane, length: int) -> Window:
        """A window of a lane's open spans; what the last one has too much stays open."""
        taken, room = [], length
        while room > 0:
            span = lane.open.pop(0)
            if self.size(span) > room:
                middle = span.start + max(0, room - len(self.opening))
                lane.open.insert(0, span._replace(start=middle))
                span = span._replace(end=middle)
            taken.append(span)
            room -= self.size(span)
        window = self.window(taken, length)
        self.forget()
        return window

    def window(self, spans: Sequence[Span], length: int) -> Window:
        """The window that consists of `spans`."""
        ids: list[int] = []
        borders = []
        for span in spans:
            borders.append(len(ids))
            ids += self.opening + self.tokens[span.text][span.start : span.end].tolist()
        names = ", ".join(f"{self.names[span.text]}@{span.start}" for span in spans)
        return Window(ids[:length], borders[1:], names)

    def read(self, number: int) -> None:
        """Tokenises a text, and those that come next with it, which takes many cores."""
        if number not in self.ahead:
            self.ahead = dict(self.tokenised(range(number, number + LANES)))
        self.names[number], self.tokens[number] = self.ahead.pop(number)

    def tokenised(self, numbers: Sequence[int]) -> Iterator[tuple[int, tuple[str, array[int]]]]:
        """Number, name and tokens of texts."""
        if not numbers:  # which tokenizers in Python refuse
            return
        named = self.order.read(numbers)
        rows = self.encode([text for _, text in named])
        for number, (name, _), ids in zip(numbers, named, rows, strict=True):
            yield number, (name, array("i", ids))

    def forget(self) -> None:
        """Drops the texts that no lane needs any more."""
        needed = {span.text for lane in self.lanes for span in lane.open} | {lane.text for lane in self.lanes}
        for number in self.tokens.keys() - needed:
            del self.tokens[number], self.names[number]

    def state(self) -> dict[str, Any]:
        """Where the stream is, as JSON can hold it."""
        lanes = [[lane.text, lane.offset, [list(span) for span in lane.open]] for lane in self.lanes]
        return {"next": self.next, "turn": self.turn, "short": self.short, "lanes": lanes}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken; only the texts that are needed there are read."""
        self.next, self.turn, self.short = state["next"], state["turn"], state["short"]
        self.lanes = [Lane(text, offset, [Span(*span) for span in open]) for text, offset, open in state["lanes"]]
        self.tokens, self.names, self.ahead = {}, {}, {}
        needed = {span.text for lane in self.lanes for span in lane.open} | {lane.text for lane in self.lanes} - {-1}
        for number, (name, tokens) in self.tokenised(sorted(needed)):
            self.names[number], self.tokens[number] = name, tokens


def encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """What gives the token ids of texts, without special tokens: those of the tokenizer's own call.

    The library behind a fast tokenizer has a faster one, which does not note where in the text each token is. It is
    taken where the tokenizer does nothing of its own around that library.
    """
    ways = ("__call__", "_encode_plus", "_batch_encode_plus")
    fast = PreTrainedTokenizerFast
    if isinstance(tokenizer, fast) and all(getattr(type(tokenizer), w, 0) is getattr(fast, w, 0) for w in ways):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return lambda texts: [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return lambda texts: tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def opening_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text: [bos], several or none; not those that it puts behind one.

    Raises:
        NsaError: they cannot be told from the text's own.
    """
    whole, own = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(own) + 1):
        if own and whole[start : start + len(own)] == own:
            return list(whole[:start])
    raise NsaError(
        f"{type(tokenizer).__name__} makes {whole} of the text 'a', and {own} of it without special tokens: expected "
        "the same tokens with others around them; give a tokenizer that does so"
    )
