import json
import os
import sys

import pytest
from tiny_models import byte_tokenizer

from nsa_hf.conversion.compare.texts import HELD_OUT
from nsa_hf.errors import NsaError
from nsa_hf.recipes.training.data import hash_texts, hash_windows, held_out_documents, held_out_windows
from nsa_hf.recipes.training.sources import named_texts, open_texts


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def texts_of(source):
    return [text for _, text in open_texts(str(source))]


@pytest.mark.parametrize("number", [0, -5])
def test_held_out_texts_have_a_length_and_a_number(number):
    with pytest.raises(NsaError, match=f"at least 2 tokens, one to predict the other from, got {number}"):
        held_out_windows([("a", "text " * 100)], byte_tokenizer(), number)
    with pytest.raises(NsaError, match=f"at least one held-out document is needed, got {number}"):
        held_out_documents("stdlib", number)


def test_the_standard_library_without_what_is_held_out():
    documents = open_texts("stdlib")
    names = {name for name, _ in documents}
    assert len(names) == len(documents) > 200
    assert {"ast.py", "json/decoder.py"} <= names
    assert not {name.split("/")[-1] for name in names} & set(HELD_OUT)
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert list(open_texts("stdlib")) == list(documents)


def test_training_and_held_out_text_are_apart():
    trained_on = set(texts_of("stdlib"))
    held_out = held_out_documents("stdlib", 3)
    assert [name for name, _ in held_out] == list(HELD_OUT[:3])
    assert not trained_on & {text for _, text in held_out}


def test_texts_without_tables_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    assert named_texts(str(tmp_path / "a.txt")) == named_texts(str(tmp_path)) == [("a.txt", "one")]
    assert named_texts(str(tmp_path / "b.jsonl")) == [("b.jsonl:0", "two"), ("b.jsonl:1", "three")]
    assert [name for name, _ in named_texts("stdlib")] == list(HELD_OUT)
    (tmp_path / "c.csv").write_text("text\nfour\n")
    with pytest.raises(NsaError, match="datasets"):
        named_texts(str(tmp_path / "c.csv"))
    monkeypatch.undo()
    assert named_texts(str(tmp_path / "c.csv")) == [("c.csv:0", "four")]


def test_hashes_see_every_change(tokenizer):
    texts = [("a", "one two"), ("b", "three")]
    changed = [
        [("a", "one two "), ("b", "three")],
        [("a", "one twothree"), ("b", "")],
        [("b", "three"), ("a", "one two")],
        [("a", "one two")],
    ]
    assert hash_texts(texts) == hash_texts(iter(texts))
    assert len({hash_texts(other) for other in [texts, *changed]}) == 5
    assert hash_windows([[1, 2], [3]]) != hash_windows([[1, 2], [4]])


def test_held_out_windows(tokenizer):
    texts = [("x", "abcdef" * 10), ("y", "ghi" * 20)]
    windows = held_out_windows(texts, tokenizer, 50)
    assert [(name, tokenizer.decode(ids)) for name, ids in windows] == [(n, t[:50]) for n, t in texts]
    with pytest.raises(NsaError, match=r"too short: x \(60\), y \(60\)"):
        held_out_windows(texts, tokenizer, 61)


def test_own_text_files_and_tables(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(["x", "y"])))
    assert texts_of(str(tmp_path)) == ["first", "second"]
    assert texts_of(str(tmp_path / "b.txt")) == ["second"]
    assert list(open_texts(str(table))) == [("rows.jsonl:0", "x"), ("rows.jsonl:1", "y")]
    assert held_out_documents(str(table), 1) == [("rows.jsonl:0", "x")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": 3}', "got one with id"),
        ("{}", "got one with nothing in it"),
        ('{"text": null}', "got null as its text"),
        ('{"text": 3}', "got the int 3 as its text"),
        ('{"text": true}', "got true as its text"),
        ('{"text": ["a"]}', "got a list as its text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "got one with messages: write each chat out as one text"),
        ('["a"]', "got a list"),
        ('"a"', "got a string"),
        ("{nothing", "cannot read it as JSON"),
        ("[" * 100_000, "cannot read it as JSON"),
        ('{"text": "\\ud800"}', "half a character"),
    ],
)
def test_a_row_without_text_is_named(tmp_path, row, message):
    """Whatever the rows around it are: a table of both kinds has a null where one has no text."""
    table = tmp_path / "rows.jsonl"
    table.write_text(f'{{"text": "first"}}\n\n{row}\n{{"text": "last"}}\n')
    with pytest.raises(NsaError) as raised:
        open_texts(str(table))
    assert f"{table}, line 3: " in str(raised.value)
    assert message in str(raised.value)


def test_rows_of_other_tables_too(tmp_path):
    for name, content, message in [
        ("a.json", '[{"text": "a"}, {"text": null}]', "row 2: expected .*got null"),
        ("b.csv", "text,id\nhello,1\nNA,2\n", "row 2: expected .*got null"),
        ("c.csv", "text\n7\n8\n", "row 1: expected .*got the int 7"),
        ("d.csv", "", "cannot read .*d.csv: No columns"),
    ]:
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(NsaError, match=message):
            open_texts(str(path))


def test_texts_that_look_like_dates_stay_texts(tmp_path):
    table = tmp_path / "rows.jsonl"
    table.write_text('{"text": "2020-01-01"}\n{"text": "2020-01-02"}\n')
    assert texts_of(str(table)) == ["2020-01-01", "2020-01-02"]


def test_nothing_to_evaluate_is_refused(tmp_path, tokenizer):
    empty = tmp_path / "rows.jsonl"
    empty.write_text("")
    for call, message in [
        (lambda: held_out_documents(str(empty), 2), "found no text"),
        (lambda: held_out_documents("stdlib", 0), "at least one held-out document"),
        (lambda: held_out_documents("stdlib", -1), "at least one held-out document"),
        (lambda: held_out_windows([("x", "abc")], tokenizer, 0), "at least 2 tokens"),
        (lambda: held_out_windows([("x", "abc")], tokenizer, 1), "at least 2 tokens"),
    ]:
        with pytest.raises(NsaError, match=message):
            call()


def test_wrong_sources_are_named(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\xfa")
    lacking = tmp_path / "rows.jsonl"
    lacking.write_text('{"content": "x"}\n')
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, message in [
        (tmp_path / "none", "no text at"),
        (bad, "as UTF-8 text"),
        (lacking, r"line 1: expected a row like .*got one with content"),
        (broken, "line 1: cannot read"),
        (empty, "found no text"),
    ]:
        with pytest.raises(NsaError, match=message):
            open_texts(str(source))


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.ndjson", "rows.jsonlines"])
def test_rows_are_known_by_any_spelling_of_their_suffix(tmp_path, name):
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts_of(str(tmp_path / name)) == ["one", "two"]


@pytest.mark.parametrize("name", ["train.jsonl", "data/train.parquet"])
def test_rows_beside_a_folders_texts_are_not_passed_over_silently(tmp_path, capsys, name):
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"text": "one"}\n')
    assert texts_of(str(tmp_path)) == ["about the data"]
    assert f"holds rows of texts ({name}), which are not read" in capsys.readouterr().err


def test_a_file_s_name_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("a text")
    for source in (tmp_path, path):
        with pytest.raises(
            NsaError, match=r"UTF-8.*caf\\udce9\.txt|caf\\udce9\.txt has a name that is not UTF-8: rename it"
        ):
            open_texts(str(source))
