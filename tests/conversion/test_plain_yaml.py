"""conversion/files/plain_yaml.py"""

from __future__ import annotations

import pytest

from nsa_hf.conversion.files.plain_yaml import load_plain


def test_plain_values_come_as_yaml_has_them():
    assert load_plain("a: 1\nb: [x, {c: null}]\n") == {"a": 1, "b": ["x", {"c": None}]}
    assert load_plain("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x", r"line 2: an alias \(\*x\)"),
        ("<<: &x {a: 1}\n<<: *x", "alias"),
        ("{a: " * 5000, "nested deeper than 50"),
        ("- " * 5000 + "x", "nested deeper than 50"),
        ("x" * ((1 << 20) + 1), "more than 1,048,576 characters"),
        ("a: 2024-02-30", "day is out of range"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: [", "expected the node content"),
        ("a: {b: 1}\nc: 2\n? a\n: 3", "line 3: a is given twice"),
        ("\0", "not allowed"),
    ],
)
def test_what_is_not_plain_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load_plain(text)
