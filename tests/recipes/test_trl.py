"""TRL's trainers on a converted model: losses and gradients as computed by hand from each text alone."""

from __future__ import annotations

import random

import pytest
import torch
from by_hand import IGNORED, gradient_norm, log_probabilities, loss_alone, words
from datasets import Dataset
from tiny_runs import converted_and_opened
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import nsa_hf
from nsa_hf import NsaError

QUICK = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 1,
    "per_device_train_batch_size": 8,
}


@pytest.fixture(scope="module")
def model_dir(tiny_dense_dir, tiny_sizes, tmp_path_factory):
    """A model whose gates and compressors are in use, exact up to 64 tokens."""
    return converted_and_opened(tiny_dense_dir, tmp_path_factory.mktemp("nsa") / "model", tiny_sizes)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def first_step(trainer):
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"gradient_checkpointing": False}, 8),
        ({"padding_free": True, "max_length": None}, 1),
        ({"packing": True, "max_length": 1600}, 1),
    ],
    ids=["padded", "padding_free", "packing"],
)
def test_supervised(model_dir, tokenizer, tmp_path, settings, rows):
    generator = random.Random(0)
    texts = [{"prompt": words(generator, 4), "completion": words(generator, 20 + 3 * n)} for n in range(8)]
    documents = []
    for text in texts:
        prompt, answer = (tokenizer(text[part]).input_ids for part in ("prompt", "completion"))
        answer = [*answer, tokenizer.eos_token_id]
        documents.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    model = load(model_dir)
    loss = loss_alone(model, documents)
    config = SFTConfig(str(tmp_path), **QUICK, **settings)
    trainer = SFTTrainer(str(model_dir), config, train_dataset=Dataset.from_list(texts))
    assert type(trainer.model) is type(model)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[0] == rows
    step = first_step(trainer)
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert step["grad_norm"] == pytest.approx(gradient_norm(model, loss), rel=1e-3)


def test_preferences(model_dir, tokenizer, tiny_dense_dir, tmp_path):
    generator = random.Random(1)
    pairs = [
        {"prompt": words(generator, 4), "chosen": words(generator, 20 + 3 * n), "rejected": words(generator, 25)}
        for n in range(4)
    ]
    model, beta = load(model_dir), 0.1
    sums = {
        part: [
            log_probabilities(
                model, *(tokenizer(pair[one]).input_ids + end for one, end in (("prompt", []), (part, [1])))
            ).sum()
            for pair in pairs
        ]
        for part in ("chosen", "rejected")
    }
    chosen, rejected = (torch.stack(values) for values in sums.values())
    # the model is its own reference before the first step
    difference = chosen - rejected - (chosen - rejected).detach()
    loss = -torch.nn.functional.logsigmoid(beta * difference).mean()
    config = DPOConfig(str(tmp_path), **QUICK, beta=beta)
    trainer = DPOTrainer(
        load(model_dir), args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    assert type(trainer.ref_model) is type(model)
    step = first_step(trainer)
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert step["logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-2)
    assert step["logps/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-2)
    assert step["grad_norm"] == pytest.approx(gradient_norm(model, loss), rel=1e-3)
    # a model in memory stands in no folder: its reference is not, in silence, the dense model that it was made of
    sparse = nsa_hf.NsaLlamaForCausalLM.from_dense(tiny_dense_dir, topk=4)
    with pytest.raises(OSError, match="Repo id"):
        DPOTrainer(sparse, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)


class Spy:
    """A reward that differs from completion to completion, and keeps what it was given."""

    __name__ = "spy"

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.completions: list[list[int]] = []

    def __call__(self, prompts, completion_ids, **kwargs):
        self.prompts += prompts
        self.completions += completion_ids
        return [float(sum(completion) % 7) for completion in completion_ids]


def reinforced(model_dir, tokenizer, tmp_path, **settings):
    """One step of GRPO on two prompts of different length, four completions each: Trainer's log, and what was seen."""
    generator, spy = random.Random(2), Spy()
    prompts = Dataset.from_list([{"prompt": words(generator, count)} for count in (12, 30)])
    config = GRPOConfig(
        str(tmp_path), **QUICK, num_generations=4, max_completion_length=24, loss_type="dr_grpo", scale_rewards="none",
        **settings,
    )  # fmt: skip
    trainer = GRPOTrainer(load(model_dir), spy, args=config, train_dataset=prompts, processing_class=tokenizer)
    step = first_step(trainer)
    assert len({len(prompt) for prompt in spy.prompts}) == 2 and len(spy.completions) == 8
    return step, spy


def test_reinforcement(model_dir, tokenizer, tmp_path):
    step, spy = reinforced(model_dir, tokenizer, tmp_path)
    model = load(model_dir)
    rewards = torch.tensor(Spy()(spy.prompts, spy.completions)).view(2, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    loss = torch.zeros(())
    for prompt, completion, advantage in zip(spy.prompts, spy.completions, advantages, strict=True):
        log_probability = log_probabilities(model, tokenizer(prompt).input_ids, completion)
        loss = loss - advantage * (log_probability - log_probability.detach()).exp().sum() / (8 * 24)
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert step["grad_norm"] == pytest.approx(gradient_norm(model, loss), rel=1e-3)


def test_its_completions_are_those_of_each_prompt_alone(model_dir, tokenizer, tmp_path):
    _, spy = reinforced(model_dir, tokenizer, tmp_path, top_k=1)
    model = load(model_dir)
    for prompt, completion in zip(spy.prompts[::4], spy.completions[::4], strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.shape[1] :].tolist()
        assert completion == alone


def test_its_other_ways_to_generate_are_refused(model_dir, tokenizer, tmp_path):
    with pytest.raises(NsaError, match="does not support continuous batching and its paged cache"):
        reinforced(model_dir, tokenizer, tmp_path, use_transformers_continuous_batching=True)
    with pytest.raises(NsaError, match="attn_implementation='flash_attention_2' is not one of a sparse model's"):
        config = SFTConfig(str(tmp_path), **QUICK, model_init_kwargs={"attn_implementation": "flash_attention_2"})
        SFTTrainer(str(model_dir), config, train_dataset=Dataset.from_list([{"text": "a"}]))
