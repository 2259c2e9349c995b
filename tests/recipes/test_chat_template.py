"""recipes/chat_template.py: a template is a program that came with the model, and may do anything."""

from __future__ import annotations

import time

import pytest
from tiny_models import byte_tokenizer

from nsa_hf.errors import NsaError
from nsa_hf.recipes import chat_template
from nsa_hf.recipes.chat_template import apply_chat_template

TURNS = [{"role": "user", "content": "{{ 7 * 7 }} & <b>, grün\n"}]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def test_the_text_is_the_tokenizers_own(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{{ eos_token }}" + tokenizer.chat_template
    expected = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    assert apply_chat_template(tokenizer, TURNS) == expected
    assert TURNS[0]["content"] in expected and expected.endswith("assistant: ")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "other"}
    assert apply_chat_template(tokenizer, TURNS) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only system turns') }}", "fails with TemplateError: only system turns"),
        ("{{ messages[0].content.no.such }}", "fails with UndefinedError"),
        ("{% for x in %}", "fails with TemplateSyntaxError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails with RecursionError"),
        ("{{ 'x' * 20000000 }}", "makes 20,000,000 characters of a conversation of"),
        ("{{ 'x' * 20000000000 }}", "takes more than 4 GiB of memory"),
        ("{{ ''.__class__.__mro__ }}", "fails with SecurityError"),
    ],
)
def test_a_template_that_goes_wrong_is_named(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(NsaError, match=f"^the tokenizer's chat template {message}.* do without it$"):
        apply_chat_template(tokenizer, TURNS)


@pytest.mark.parametrize(
    "template",
    [
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
    ],
    ids=["in loops", "in one operation, which no signal interrupts"],
)
def test_a_template_that_never_ends_is_ended(tokenizer, template, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 4)
    tokenizer.chat_template = template
    began = time.perf_counter()
    with pytest.raises(NsaError, match=r"does not end \(within 4 seconds\)"):
        apply_chat_template(tokenizer, TURNS)
    assert time.perf_counter() - began < 20


def test_no_template_or_none_by_default(tokenizer):
    tokenizer.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(NsaError, match="cannot be chosen"):
        apply_chat_template(tokenizer, TURNS)
    tokenizer.chat_template = None
    with pytest.raises(NsaError, match="has no chat template: leave --chat out"):
        apply_chat_template(tokenizer, TURNS)


def test_modules_of_the_current_folder_are_not_run(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    assert apply_chat_template(tokenizer, TURNS).endswith("assistant: ")
