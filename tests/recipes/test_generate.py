import io
import itertools
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nsa_hf.errors import NsaError
from nsa_hf.recipes.cli import run
from nsa_hf.recipes.evaluation.subject import Settings
from nsa_hf.recipes.evaluation.suites import evaluate
from nsa_hf.recipes.generate import generate_text, prompt_ids
from nsa_hf.recipes.inspection import inspect_model
from nsa_hf.recipes.load import load_nsa_model

PROMPT = "the words of it are as they were, " * 4  # beyond the exact range of 64 tokens


def test_greedy_text_equals_one_pass_per_token(nsa_dir, tmp_path, capsys):
    result = generate_text(nsa_dir, PROMPT, max_new_tokens=12, save=tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    model, tokenizer = AutoModelForCausalLM.from_pretrained(nsa_dir).eval(), AutoTokenizer.from_pretrained(nsa_dir)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    prompt = ids.shape[1]
    with torch.no_grad():
        for _ in range(result["new_tokens"]):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert result["text"] == tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
    assert result["prompt_tokens"] == prompt == len(PROMPT)
    assert result["new_tokens"] == 12
    assert result["tokens_per_second"] > 0
    printed = capsys.readouterr().out
    assert f"[{prompt} prompt tokens read in " in printed
    assert "tokens/s, 12 new]" in printed
    assert result["text"] in printed


def test_part_of_a_prompt(nsa_dir):
    result = generate_text(nsa_dir, PROMPT, prompt_tokens=10, max_new_tokens=1)
    assert result["prompt_tokens"] == 10
    assert result["prompt_end"] == PROMPT[:10]
    assert result["tokens_per_second"] is None


def test_sampling_repeats_with_its_seed(nsa_dir):
    texts = [
        generate_text(nsa_dir, PROMPT, temperature=2.0, seed=seed, max_new_tokens=12)["text"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_tokens_per_second_count_what_comes_after_the_first(nsa_dir, monkeypatch):
    """A clock that goes on by a second whenever it is read: once for the prompt, and once for each token."""
    clock = SimpleNamespace(perf_counter=itertools.count(5.0).__next__)
    monkeypatch.setattr("nsa_hf.recipes.generate.time", clock)
    result = generate_text(nsa_dir, PROMPT, max_new_tokens=7)
    assert (result["seconds_to_first_token"], result["tokens_per_second"]) == (1, 1)
    clock.perf_counter = itertools.count(0, 0.25).__next__
    assert generate_text(nsa_dir, PROMPT, max_new_tokens=7)["tokens_per_second"] == 4


@pytest.mark.parametrize(("option", "greedy"), [("top_p", 1e-6), ("top_k", 1), ("temperature", 1e-4)])
def test_each_setting_of_sampling_counts(nsa_dir, option, greedy):
    free = {"temperature": 5.0, "max_new_tokens": 12}
    expected = generate_text(nsa_dir, PROMPT, max_new_tokens=12)["text"]
    assert generate_text(nsa_dir, PROMPT, **free)["text"] != expected
    result = generate_text(nsa_dir, PROMPT, **free | {option: greedy})
    assert result["text"] == expected and result[option] == greedy


def test_without_top_k_every_token_may_come(nsa_dir):
    """Transformers by itself would leave out all but 50 of the 256."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(nsa_dir).eval(), AutoTokenizer.from_pretrained(nsa_dir)
    with torch.no_grad():
        logits = model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits[0, -1]
    likely = {tokenizer.decode([token]) for token in logits.topk(50).indices.tolist()} | {""}
    first = {generate_text(nsa_dir, PROMPT, temperature=100, seed=seed, max_new_tokens=1)["text"] for seed in range(12)}
    assert first - likely


def test_a_chat_turn_goes_through_the_template(nsa_dir):
    tokenizer = AutoTokenizer.from_pretrained(nsa_dir)
    assert tokenizer.decode(prompt_ids(tokenizer, "hello", chat=True)[0]) == "user: hello\nassistant: "
    result = generate_text(nsa_dir, "hello", chat=True, max_new_tokens=2)
    assert (result["chat"], result["prompt_end"]) == (True, "hello")
    tokenizer.chat_template = None
    with pytest.raises(NsaError, match="no chat template"):
        prompt_ids(tokenizer, "hello", chat=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"prompt_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1e-300}, "temperature must be 0"),
        ({"seed": 2**70}, "seed must have at most 63 bits"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"dtype": "int8"}, "dtype must be float32"),
        ({"max_new_tokens": 4000}, "do not fit the model's 4096"),
    ],
)
def test_wrong_settings_are_named(nsa_dir, settings, message):
    with pytest.raises(NsaError, match=message):
        generate_text(nsa_dir, PROMPT, **settings)


def test_half_a_character_is_refused(nsa_dir):
    with pytest.raises(NsaError, match=r"no text in UTF-8: .*surrogates not allowed"):
        generate_text(nsa_dir, "abc\udcff")


def test_an_empty_prompt_is_refused(nsa_dir):
    with pytest.raises(NsaError, match="the prompt is empty"):
        generate_text(nsa_dir, "")


def test_the_command_prints_text_as_it_comes_and_tokens_per_second(nsa_dir, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    # a token is a word here: text is printed up to the last space
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda self, ids, **_: "word " * len(ids))
    passes, printed, after = [], [], []

    def watched(*args):
        model = load_nsa_model(*args)
        model.register_forward_hook(lambda *_: passes.append(None))
        return model

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            printed.append(text)
            if text == "word ":
                after.append(len(passes))
            return len(text)

    monkeypatch.setattr("nsa_hf.recipes.generate.load_nsa_model", watched)
    monkeypatch.setattr("sys.stdout", Screen())
    arguments = ["--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 9, "--device", "cpu"]
    assert run(["generate", *map(str, [nsa_dir, *arguments])]) == 0
    assert printed.count("word ") == 9, "one by one, not at once"
    assert after == list(range(1, 10)), "each as soon as the pass that gave it was over, none held back to the end"
    assert len(passes) == 9
    line = rf"\[{len(PROMPT)} prompt tokens read in [\d.]+ s, then [\d.]+ tokens/s, 9 new\]"
    assert re.search(line, "".join(printed))


def with_file(nsa_dir, folder, name, **changes):
    """A copy of the model with `changes` in one of its JSON files."""
    copy = shutil.copytree(nsa_dir, folder / "model")
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps({**content, **changes}))
    return copy


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 4},
        {"num_return_sequences": 3, "num_beams": 3, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_a_checkpoint_that_asks_for_more_than_one_text(nsa_dir, tmp_path, capsys, asked):
    model = with_file(nsa_dir, tmp_path, "generation_config.json", **asked)
    expected = generate_text(nsa_dir, PROMPT, max_new_tokens=6)["text"]
    capsys.readouterr()
    assert generate_text(model, PROMPT, max_new_tokens=6)["text"] == expected
    said = capsys.readouterr().err
    for name in asked.keys() & {"num_beams", "num_return_sequences", "prompt_lookup_num_tokens"}:
        assert f"{name}={asked[name]}" in said
    assert ("takes the likeliest token each time" in said) is ("return_dict_in_generate" not in asked)


def test_a_checkpoints_stop_strings_stop(nsa_dir, tmp_path):
    free = generate_text(nsa_dir, PROMPT, max_new_tokens=12)
    model = with_file(nsa_dir, tmp_path, "generation_config.json", stop_strings=[free["text"][:3]])
    stopped = generate_text(model, PROMPT, max_new_tokens=12)
    assert (stopped["text"], stopped["new_tokens"], free["new_tokens"]) == (free["text"][:3], 3, 12)


def test_sampling_is_as_the_options_say(nsa_dir, tmp_path, capsys):
    free = {"temperature": 2.0, "seed": 1, "max_new_tokens": 12}
    expected = generate_text(nsa_dir, PROMPT, **free)["text"]
    model = with_file(nsa_dir, tmp_path, "generation_config.json", do_sample=True, min_p=0.9, typical_p=0.1)
    assert generate_text(model, PROMPT, **free)["text"] == expected
    assert "min_p=0.9, typical_p=0.1; this command samples as its options say" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"repetition_penalty": -1.0}, {"bad_words_ids": "no list"}, {"stop_strings": 5}, {"min_length": "long"}]
)
def test_a_generation_config_that_cannot_be_followed_is_named(nsa_dir, tmp_path, wrong):
    model = with_file(nsa_dir, tmp_path, "generation_config.json", **wrong)
    with pytest.raises(NsaError, match=r"generation_config\.json cannot be followed"):
        generate_text(model, PROMPT, max_new_tokens=2)


def test_a_bug_of_ours_is_not_taken_for_the_generation_config(nsa_dir, monkeypatch):
    def bug(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr("nsa_hf.NsaLlamaForCausalLM.generate", bug)
    with pytest.raises(ValueError, match=r"^a bug$"):
        generate_text(nsa_dir, PROMPT, max_new_tokens=2)


def test_a_tokenizer_of_another_model_is_named_before_the_model_runs(nsa_dir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(nsa_dir)
    tokenizer.add_tokens(["beyond"])
    model = shutil.copytree(nsa_dir, tmp_path / "model")
    tokenizer.save_pretrained(model)
    assert generate_text(model, "within", max_new_tokens=1)["new_tokens"] == 1
    monkeypatch.setattr("nsa_hf.NsaLlamaForCausalLM.forward", None)
    message = "the tokenizer gives token 256, and the model's vocabulary ends at 255"
    with pytest.raises(NsaError, match=message):
        generate_text(model, "beyond", max_new_tokens=1)
    text = ("text.txt", "and beyond it, " * 40)
    with pytest.raises(NsaError, match=message):
        inspect_model(model, text, 100)
    (tmp_path / "text.txt").write_text(text[1])
    with pytest.raises(NsaError, match=message):
        evaluate(model, ["ppl"], Settings(text=str(tmp_path / "text.txt"), documents=1, length=100))


@pytest.fixture
def broken_dir(nsa_dir, tmp_path):
    """A model whose last layer gives NaN."""
    out = shutil.copytree(nsa_dir, tmp_path / "broken")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_logits_that_are_not_finite_are_said_in_one_line(broken_dir, tmp_path, capsys):
    before = (broken_dir / "inspect.json").exists()
    text = tmp_path / "text.txt"
    text.write_text(PROMPT)
    for arguments in (
        ["generate", str(broken_dir), "--prompt", PROMPT, "--max-new-tokens", "3"],
        ["generate", str(broken_dir), "--prompt", PROMPT, "--max-new-tokens", "3", "--temperature", "1"],
        ["inspect", str(broken_dir), "--text", str(text), "--length", "64"],
        ["eval", str(broken_dir), "--text", str(text), "--length", "64", "--documents", "1"],
    ):
        assert run([*arguments, "--device", "cpu"]) == 2
        assert re.fullmatch(r"error: .*logits are not finite .*\n", capsys.readouterr().err)
    assert (broken_dir / "inspect.json").exists() is before
