"""recipes/finetune.py: Transformers' Trainer on a converted model, held against each document alone."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from by_hand import gradient_norm, loss_alone, words
from finetune_on_cpus import adapted
from processes import started
from safetensors.torch import load_file
from tiny_models import surrounding_tokenizer
from tiny_runs import converted_and_opened
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from nsa_hf.errors import NsaError
from nsa_hf.recipes import finetune
from nsa_hf.recipes.finetune import Finetuning, make_collator, read_documents

QUICK = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
    "max_steps": 1,
}
CPU = ["--use_cpu", "--report_to", "none"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where `datasets` keeps what it has read and tokenised; not the user's."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="module")
def model_dir(request, tiny_dense_dir, tiny_sizes, tmp_path_factory):
    """A model whose gates and compressors are in use, exact up to 64 tokens."""
    folder = tmp_path_factory.mktemp("nsa") / "model"
    return converted_and_opened(
        tiny_dense_dir, folder, tiny_sizes, nsa_selector=getattr(request, "param", "compressed")
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Lines of all three forms."""
    generator = random.Random(0)
    lines = []
    for number in range(8):
        question, answer = words(generator, 4 + number), words(generator, 20 + 3 * number)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        forms = {"messages": chat}, {"prompt": question, "completion": answer}, {"text": answer}
        lines.append(json.dumps(forms[number % 3]))
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


def trainer_of(model_dir, data, out, padding="packed", layers=3, lora=False, **settings):
    """A Trainer as the script makes it."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, **({} if padding == "packed" else {"padding_side": padding}))
    documents = read_documents(str(data), tokenizer, 8192)
    model = AutoModelForCausalLM.from_pretrained(model_dir, num_hidden_layers=layers)
    return Trainer(
        adapted(model) if lora else model,
        TrainingArguments(str(out), **{**QUICK, **settings}),
        train_dataset=documents,
        eval_dataset=documents.select(range(3)),
        data_collator=make_collator(tokenizer, padding != "packed"),
    )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def alone(model_dir, data):
    """The loss and its gradient's norm of all documents, and the loss of the first three."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    documents = read_documents(str(data), tokenizer, 8192)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    loss = loss_alone(model, documents)
    norm = gradient_norm(model, loss)
    return loss.item(), norm, loss_alone(model, documents.select(range(3))).item()


def test_a_line_is_what_is_learned_behind_what_is_given(model_dir, data):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    documents = read_documents(str(data), tokenizer, 8192)
    assert len(documents) == 8 and max(len(one["input_ids"]) for one in documents) > 2 * 64
    for line, document in zip(lines, documents, strict=True):
        learned = [token for token, label in zip(document["input_ids"], document["labels"], strict=True) if label >= 0]
        assert [token for token in document["labels"] if token >= 0] == learned
        whole, learned = tokenizer.decode(document["input_ids"]), tokenizer.decode(learned)
        if "messages" in line:
            question, answer = (message["content"] for message in line["messages"])
            assert (whole, learned) == (f"user: {question}\nassistant: {answer}\n", f"{answer}\n")
        else:
            answer = line.get("completion") or line["text"]
            answer = answer[0 if "prompt" in line else 1 :] + tokenizer.eos_token  # nobody foretells the first token
            assert learned == answer and whole.endswith(answer) and len(whole) == len(document["input_ids"])


@pytest.mark.parametrize("end", [[2], []], ids=["with an end", "without one"])
def test_special_tokens_stand_around_a_document_and_not_in_it(tmp_path, end):
    tokenizer = surrounding_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2) if end else None
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("ask", " say"))
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "ask", "completion": " say"}\n{"prompt": null, "completion": " say"}\n')
    both, alone = read_documents(str(path), tokenizer, 8192)
    assert both["input_ids"] == [0, 1, *prompt, *answer, *end]
    assert both["labels"] == [-100] * (2 + len(prompt)) + answer + end
    assert alone["input_ids"] == [0, 1, *answer, *end] and alone["labels"] == [-100, -100, *answer, *end]


@pytest.mark.parametrize("model_dir", ["compressed", "channels"], indirect=True)
@pytest.mark.parametrize("padding", ["left", "right", "packed"])
def test_the_loss_is_that_of_each_document_alone(model_dir, data, alone, tmp_path, padding):
    loss, norm, held_out = alone
    trainer = trainer_of(model_dir, data, tmp_path, padding)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(held_out, abs=1e-4)
    trainer.train()
    assert losses(trainer) == pytest.approx([loss], abs=1e-4)
    assert trainer.state.log_history[-2]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    # in parts, computed again in the backward pass: the same step
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    again = trainer_of(model_dir, data, tmp_path, padding, **parts)
    again.train()
    assert losses(again) == pytest.approx([loss], abs=1e-4)
    assert again.state.log_history[-2]["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_bf16(model_dir, data, alone, tmp_path):
    """By autocast: weights stay in float32."""
    for padding in ("left", "packed"):
        trainer = trainer_of(model_dir, data, tmp_path, padding, bf16=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            loss = loss_alone(trainer.model, trainer.train_dataset).item()
        trainer.train()
        assert losses(trainer) == pytest.approx([loss], abs=1e-3) and abs(loss - alone[0]) > 1e-6
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_compiled(model_dir, data, tmp_path):
    """With a backend that runs the graphs as they are; one layer, for speed."""
    trainer = trainer_of(model_dir, data, tmp_path, "left", 1, torch_compile=True, torch_compile_backend="eager")
    loss = loss_alone(trainer.model, trainer.train_dataset)
    norm = gradient_norm(trainer.model, loss)
    trainer.train()
    assert losses(trainer) == pytest.approx([loss.item()], abs=1e-4)
    assert trainer.state.log_history[-2]["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_resumed_to_the_bit_with_the_best_model_at_the_end(model_dir, data, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    # the best is the first: it is to be as bad as can be
    settings |= {"per_device_train_batch_size": 2, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = trainer_of(model_dir, data, tmp_path / "out", **settings)
    trainer.train()
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert max(evaluated) == evaluated[0] == trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == evaluated[0]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert all(torch.equal(value, best.state_dict()[name]) for name, value in trainer.model.state_dict().items())

    expected = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    again = trainer_of(model_dir, data, tmp_path / "out", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    resumed = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_the_script(model_dir, data, tmp_path, capsys):
    arguments = ["--model", str(model_dir), "--data", str(data), "--eval_data", str(data)]
    options = [
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "2",
        "--use_cpu",
        "--report_to",
        "none",
        "--padded",
    ]
    before = dict(AutoModelForCausalLM.from_pretrained(model_dir).named_parameters())
    assert finetune.main([*arguments, *options, "--learning_rate", "1e-3", "--save_strategy", "no"]) == 0
    after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids


def test_what_it_cannot_use(model_dir, data, tiny_dense_dir, tmp_path, capsys):
    output = ["--output_dir", str(tmp_path / "out"), *CPU]
    assert finetune.main(["--model", str(tiny_dense_dir), "--data", str(data), *output]) == 2
    assert "is a dense model: convert it first, nsa-hf convert" in capsys.readouterr().err
    assert finetune.main(["--model", str(model_dir), "--data", str(tmp_path / "none.jsonl"), *output]) == 2
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True)
    arguments._n_gpu = 2
    with pytest.raises(NsaError, match="a packed batch is not spread over 2 GPUs by one process: start one for each"):
        finetune.finetune(Finetuning(str(model_dir), str(data)), arguments)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    other = tmp_path / "other.jsonl"
    other.write_text('{"words": "a b"}\n')
    with pytest.raises(NsaError, match="a line needs messages, prompt and completion, or text; one has words"):
        read_documents(str(other), tokenizer, 8192)
    with pytest.raises(NsaError, match="nothing to learn in the first 1 tokens of any line: set --max_length"):
        read_documents(str(data), tokenizer, 1)
    capsys.readouterr()
    assert len(read_documents(str(data), tokenizer, 30)) < 8
    assert "documents left out, their prompts fill --max_length" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and Finetuning("a", "b").max_length == 8192


def history_of_two_processes(model_dir, data, cache, folder, *more):
    """What was logged of two steps with the model in parts (FSDP2); the result is `folder / "out"`."""
    arguments = ["--model", str(model_dir), "--data", str(data), "--output_dir", str(folder / "out"), *CPU, "--fsdp"]
    arguments += ["--per_device_train_batch_size", "4", "--max_steps", "2", "--learning_rate", "1e-3"]
    arguments += ["--lr_scheduler_type", "constant", "--logging_steps", "1", "--save_steps", "2", *more]
    environment = {"HF_DATASETS_CACHE": cache}
    with started(arguments, folder / "log", program="finetune_on_cpus", processes=2, environment=environment) as run:
        assert run.finish().count("in parts: True") == 2
    return json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"][:2]


def test_two_processes_train_as_one(model_dir, data, alone, cache, tmp_path):
    """With DDP the batch is shared out in the same way."""
    first, second = history_of_two_processes(model_dir, data, cache, tmp_path)
    assert (first["loss"], first["grad_norm"]) == pytest.approx(alone[:2], rel=1e-3)
    one = trainer_of(model_dir, data, tmp_path / "one", max_steps=2)
    one.train()
    assert second["loss"] == pytest.approx(losses(one)[1], rel=1e-4)
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    # AdamW makes of a rounding in a tiny gradient a step of some size
    assert all((value - two[name]).abs().max() < 2e-4 for name, value in one.model.state_dict().items())


def test_two_processes_train_an_adapter_as_one(model_dir, data, cache, tmp_path):
    """Beside gates that are trained whole: most of what is in parts gets no gradient."""
    history = history_of_two_processes(model_dir, data, cache, tmp_path, "--lora")
    one = trainer_of(model_dir, data, tmp_path / "one", lora=True, max_steps=2)
    one.train()
    assert [row["loss"] for row in history] == pytest.approx(losses(one), rel=1e-4)
    one.save_model()
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "out")]
    assert saved[0].keys() == saved[1].keys() and any("nsa.gate" in name for name in saved[0])
    # AdamW makes of a rounding in a tiny gradient a step of some size
    assert all((value - saved[1][name]).abs().max() < 2e-4 for name, value in saved[0].items())
    assert all(value.abs().max() > 1e-3 for name, value in saved[1].items() if "lora_B" in name), "trained"
