"""recipes/training/windows.py and batches.py: what is read, in which order, and going on in the middle of it."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import byte_tokenizer, surrounding_tokenizer
from transformers import ByT5Tokenizer

from nsa_hf.errors import NsaError
from nsa_hf.recipes.training import sources, windows
from nsa_hf.recipes.training.batches import Batches, Weighted, as_batch
from nsa_hf.recipes.training.sources import HubTexts, open_texts
from nsa_hf.recipes.training.windows import StoredParts, Window, WindowStream, parts_of


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def letters(*lengths):
    """Texts a, b, c, ... whose every byte tells its place."""
    return [(chr(97 + i), "".join(chr(33 + j // 10 % 90) for j in range(n))) for i, n in enumerate(lengths)]


def stream(texts, tokenizer, pack=True, seed=3):
    return WindowStream(StoredParts(texts), tokenizer, pack=pack, seed=seed)


def starts(window):
    """(text, place) of each piece of a window."""
    return [(name, int(place)) for name, _, place in (part.rpartition("@") for part in window.name.split(", "))]


def test_a_window_of_its_own_for_what_is_long_enough(tokenizer):
    texts = letters(250, 99, 420, 100)
    source = stream(texts, tokenizer, pack=False)
    taken = [source.take(100) for _ in range(30)]
    assert {window.name for window in taken} == {"a@0", "a@100", "c@0", "c@100", "c@200", "c@300", "d@0"}
    for window in taken:
        [(name, start)] = starts(window)
        assert tokenizer.decode(window.ids) == dict(texts)[name][start : start + 100]
        assert window.borders == []
    again, other = stream(texts, tokenizer, pack=False), stream(texts, tokenizer, pack=False, seed=4)
    assert [again.take(100) for _ in range(30)] == taken
    assert [other.take(100).name for _ in range(30)] != [window.name for window in taken]


def test_short_texts_are_packed_and_what_is_left_over_of_long_ones_is_dropped(tokenizer):
    texts = letters(270, 30, 10, 35, 45, 7)
    source = stream(texts, tokenizer)
    # 397 tokens, of which lanes keep what does not fill a window yet
    taken = [source.take(50) for _ in range(60)]
    assert {len(window.ids) for window in taken} == {50}
    whole = dict(texts)
    read = {name: set() for name in whole}
    for window in taken:
        pieces = starts(window)
        ends = [*window.borders, 50]
        for (name, place), start, end in zip(pieces, [0, *window.borders], ends, strict=True):
            assert tokenizer.decode(window.ids[start:end]) == whole[name][place : place + end - start]
            read[name] |= set(range(place, place + end - start))
    # every token of every short text was read, and of the long one the windows that it fills
    assert read == {name: set(range(len(text) // 50 * 50 or len(text))) for name, text in texts}
    assert all(not window.borders for window in taken if window.name.startswith("a@0"))
    assert source.short == 0


def test_each_text_begins_as_the_tokenizer_begins_one(tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "opening_tokens", lambda _: [7])
    source = stream(letters(30, 20, 5), tokenizer)
    for window in (source.take(16) for _ in range(20)):
        assert len(window.ids) == 16
        assert all(window.ids[start] == 7 for start in [0, *window.borders])


def test_what_stands_before_a_text_is_told_from_what_stands_behind_it(tokenizer):
    around = surrounding_tokenizer()
    assert around("a")["input_ids"] == [0, 1, *tokenizer("a")["input_ids"], 2]
    assert windows.opening_tokens(around) == [0, 1]
    assert windows.opening_tokens(tokenizer) == []

    class Changing:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [5 + add_special_tokens]}

    with pytest.raises(NsaError, match=r"Changing makes \[6\] of the text 'a', and \[5\] of it without special tokens"):
        windows.opening_tokens(Changing())


def test_windows_that_follow_each_other_are_of_different_texts(tokenizer):
    source = stream(letters(5000, 5000, 5000, 5000), tokenizer)
    for _ in range(10):
        assert len({source.take(100).name[0] for _ in range(4)}) == 4
    assert len(source.tokens) <= 5


def test_a_very_long_text_counts_as_several(tokenizer, monkeypatch):
    text = "line of text\n" * 50
    parts = StoredParts([("a", text)], longest=100)
    order = parts.ordered(0)
    pieces = [text for _, text in order.read(range(parts.count))]
    assert parts.count > 5
    assert all(len(piece) <= 100 and piece.endswith("\n") for piece in pieces)
    assert sorted("".join(pieces)) == sorted(text)
    # but not as so many that a window does not fit into one
    monkeypatch.setattr(windows, "LONGEST_PART", 100)
    assert parts_of([("a", text)], length=1000).count == 1
    assert parts_of([("a", text)], length=10).count > 2


def test_a_large_text_is_read_once_for_all_its_parts(tokenizer):
    """And the parts of several are read in the order of the seed all the same."""
    texts, read = [(name, "line of text\n" * 200) for name in "ab"], []

    class Noting(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    for count in (1, 2):
        parts = StoredParts(Noting(texts[:count]), longest=100)
        one_by_one = [parts.ordered(0).read([number])[0] for number in range(70)]
        read.clear()
        order = parts.ordered(0)
        together = [named for start in range(0, 70, 14) for named in order.read(range(start, start + 14))]
        assert together == one_by_one
        assert len(read) == 1 + 5 * (count - 1)
    assert parts.count < 70  # a second time around was begun


def test_texts_are_tokenised_as_the_tokenizer_does_it(tokenizer):
    """By the library's own call where nothing is done around it, whatever the tokenizer was told before."""
    texts = ["one", "two words", "", "<s>" + "x" * 300]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    class Own(type(tokenizer)):
        def __call__(self, *arguments, **options):
            return {"input_ids": [[7] for _ in arguments[0]]}

    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert windows.encoder(tokenizer)(texts) == expected
    own = Own(tokenizer_object=tokenizer.backend_tokenizer, bos_token="!")
    assert windows.encoder(own)(texts) == [[7]] * 4


def test_used_up_text_begins_again_in_another_order(tokenizer):
    source = stream(letters(100, 100, 100, 100, 100), tokenizer)
    rounds = [[source.take(100).name for _ in range(5)] for _ in range(4)]
    assert all(sorted(names) == ["a@0", "b@0", "c@0", "d@0", "e@0"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_too_short_texts_are_refused_or_packed(tokenizer):
    with pytest.raises(NsaError, match="none of the 2 documents has 100 tokens"):
        stream(letters(50, 60), tokenizer, pack=False).take(100)
    assert len(stream(letters(50, 60), tokenizer).take(100).borders) == 1
    source = stream(letters(50, 150, 60, 170), tokenizer, pack=False)
    for _ in range(9):
        source.take(100)
    assert source.short == 2  # each once, however often the texts were gone through


@pytest.mark.parametrize("pack", [True, False])
def test_a_stream_goes_on_where_it_was(tokenizer, pack):
    texts = letters(250, 130, 10, 35, 145, 107, 260)
    lengths = [100, 50, 100, 25] * 12
    whole = stream(texts, tokenizer, pack)
    taken = [whole.take(length) for length in lengths]
    for at in (0, 1, 7, 20, 47):
        first = stream(texts, tokenizer, pack)
        for length in lengths[:at]:
            first.take(length)
        state = json.loads(json.dumps(first.state()))
        second = stream(texts, tokenizer, pack)
        second.take(100)
        second.restore(state)
        assert [second.take(length) for length in lengths[at:]] == taken[at:]


def test_a_stream_goes_on_from_its_beginning_with_a_tokenizer_in_python():
    """Which has no fast one behind it, and refuses no texts at all."""
    texts, tokenizer = letters(250, 30, 145), ByT5Tokenizer()
    first, second = stream(texts, tokenizer), stream(texts, tokenizer)
    second.take(50)
    second.restore(first.state())
    assert not tokenizer.is_fast
    assert [second.take(50) for _ in range(9)] == [first.take(50) for _ in range(9)]


def test_going_on_reads_only_what_is_needed_again(tokenizer):
    read = []

    class Noting(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    parts = StoredParts(Noting(letters(*[150] * 500)))
    source = WindowStream(parts, tokenizer, pack=True, seed=0)
    for _ in range(300):
        source.take(100)
    state = source.state()
    read.clear()
    again = WindowStream(parts, tokenizer, pack=True, seed=0)
    again.restore(state)
    again.take(100)
    assert len(read) <= 4 * windows.LANES


class Rows:
    """What `datasets` gives for a data set that is streamed."""

    def __init__(self, rows):
        self.rows = rows

    def shuffle(self, seed, buffer_size):
        return self.rows[seed % 3 :] + self.rows[: seed % 3]

    def take(self, count):
        return self.rows[:count]


@pytest.fixture
def hub(monkeypatch):
    """A data set of the Hub; gives what was asked of it."""
    asked = []

    class Library:
        @staticmethod
        def load_dataset(*names, **options):
            asked.append((names, options))
            return Rows([{"body": text} for _, text in letters(150, 130, 40, 160, 220)])

    monkeypatch.setattr(sources, "import_datasets", lambda: Library)
    monkeypatch.setattr(sources, "hub_revision", lambda name, revision: f"commit-of-{revision}")
    return asked


def test_a_data_set_of_the_hub_is_streamed(tokenizer, hub):
    texts = open_texts("hub:owner/name/config@v1:train", column="body")
    assert isinstance(texts, HubTexts)
    assert texts.first(2)[0] == ("hub:owner/name/config@v1:train:0", letters(150)[0][1])
    assert hub == [
        (("owner/name", "config"), {"split": "train", "revision": "commit-of-v1", "streaming": True}),
    ]
    whole = WindowStream(parts_of(texts), tokenizer, pack=True, seed=1)
    taken = [whole.take(100) for _ in range(30)]
    first = WindowStream(parts_of(texts), tokenizer, pack=True, seed=1)
    for _ in range(13):
        first.take(100)
    second = WindowStream(parts_of(texts), tokenizer, pack=True, seed=1)
    second.restore(first.state())
    assert [second.take(100) for _ in range(17)] == taken[13:]
    assert parts_of(texts).hash != parts_of(open_texts("hub:owner/name/config@v2:train", column="body")).hash


def test_a_data_set_that_cannot_be_had_is_named(hub, monkeypatch):
    with pytest.raises(NsaError, match=r'expected a row like {"text": "..."}, got one with body'):
        open_texts("hub:owner/name").first(1)
    with pytest.raises(NsaError, match=r"expected hub:owner/name\[/config\]"):
        open_texts("hub:")

    def away(name, revision):
        raise ConnectionError("no network")

    monkeypatch.setattr(sources, "hub_revision", away)
    with pytest.raises(NsaError, match="cannot read hub:owner/name: ConnectionError: no network"):
        open_texts("hub:owner/name")


def test_packed_windows_are_one_row_of_texts():
    plain = as_batch([Window([1, 2, 3, 4], [], "a@0"), Window([5, 6, 7, 8], [], "b@0")])
    assert plain.keys() == {"input_ids"}
    assert plain["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    packed = as_batch([Window([1, 2, 3, 4], [1], "a@0, b@0"), Window([5, 6, 7, 8], [], "c@0")])
    assert packed["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed["position_ids"].tolist() == [[0, 0, 1, 2, 0, 1, 2, 3]]


def batches(tokenizer, process=0, processes=1, state=None, lengths=((100, 1.0),), weights=(1.0,), **options):
    texts = [letters(*[330] * 6), [(f"x{name}", text[::-1]) for name, text in letters(*[330] * 6)]]
    streams = [Weighted(stream(texts[number], tokenizer, seed=number), weight) for number, weight in enumerate(weights)]
    return Batches(
        streams,
        lengths=list(lengths),
        batch_size=2,
        seed=5,
        process=process,
        processes=processes,
        state=state,
        **options,
    )


def some(made, count):
    """The first batches, as lists."""
    try:
        return [{name: tensor.tolist() for name, tensor in next(made).items()} for _ in range(count)]
    finally:
        made.close()


def test_processes_share_what_one_reads(tokenizer):
    alone = some(batches(tokenizer), 12)
    both = [some(batches(tokenizer, process, 2), 6) for process in range(2)]
    assert [batch for pair in zip(*both, strict=True) for batch in pair] == alone
    assert both[0] != both[1]


def test_a_batch_has_one_length_and_each_as_many_tokens(tokenizer):
    made = batches(tokenizer, lengths=((50, 1.0), (100, 3.0)))
    sizes = [torch.tensor(batch["input_ids"]).shape for batch in some(made, 200)]
    tokens = {rows * length for rows, length in sizes}
    assert tokens == {200}
    # where texts are packed, the row does not tell the windows' length; where they are not, it does
    short = sum(rows == 4 for rows, _ in sizes)
    long = sum(rows == 2 for rows, _ in sizes)
    assert 0.1 < short / (short + long) < 0.45


def test_sources_come_by_their_weights(tokenizer):
    made = batches(tokenizer, weights=(1.0, 3.0))
    try:
        for _ in range(200):
            next(made)
        turns = [source["turn"] for source in made.state["sources"]]
    finally:
        made.close()
    assert sum(turns) == 400
    assert 0.68 < turns[1] / 400 < 0.82


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_go_on_where_they_were(tokenizer, processes):
    options = {"lengths": ((50, 1.0), (100, 1.0)), "weights": (1.0, 2.0), "processes": processes}
    whole = some(batches(tokenizer, **options), 20)
    for at in (0, 1, 9):
        first = batches(tokenizer, **options)
        for _ in range(at):
            next(first)
        # what was made ahead of what was asked for does not count
        state = json.loads(json.dumps(first.state))
        first.close()
        assert some(batches(tokenizer, state=state, **options), 20 - at) == whole[at:]


def test_a_token_without_embedding_is_refused(tokenizer):
    made = batches(tokenizer, vocabulary=5)
    for _ in range(2):  # and whoever asks again is told again
        with pytest.raises(NsaError, match="the model's vocabulary ends at 4"):
            next(made)
    made.close()
