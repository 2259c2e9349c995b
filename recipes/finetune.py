"""Supervised fine-tuning of a converted model by Transformers' Trainer: a script to copy. docs/finetune.md

python -m nsa_hf.recipes.finetune --model llama-nsa --data chats.jsonl --output_dir llama-nsa-tuned --bf16
python -m nsa_hf.recipes.finetune --model llama-nsa --data chats.jsonl --output_dir tiny --use_cpu --max_steps 2
accelerate launch --num_processes 2 -m nsa_hf.recipes.finetune --model llama-nsa --data chats.jsonl --output_dir OUT

A line of the data is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. What is learned is the
last message, the completion, or all of the text.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from nsa_hf.config import NsaConfigMixin
from nsa_hf.errors import NsaError

from .exit_codes import WRONG_INPUT
from .terminal import report
from .training.windows import opening_tokens

IGNORED = -100  # the label of a token that is not learned
COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass
class Finetuning:
    """What is trained on what; everything else is an argument of Trainer's own."""

    model: str = field(metadata={"help": "folder of a converted model"})
    data: str = field(metadata={"help": "a .jsonl file, a conversation or text a line"})
    eval_data: str | None = field(default=None, metadata={"help": "the same, for --eval_strategy steps"})
    max_length: int = field(default=8192, metadata={"help": "tokens of a document; what is longer is cut at its end"})
    padded: bool = field(default=False, metadata={"help": "a row for each document, instead of all of a batch in one"})


def main(arguments: list[str] | None = None) -> int:
    """Trains and saves the model, and prints an error of the user's in one line.

    Args:
        arguments: of the command line; None: those of the process.

    Returns:
        The exit code.
    """
    parser = HfArgumentParser([Finetuning, TrainingArguments])
    settings, training = parser.parse_args_into_dataclasses(arguments)
    try:
        finetune(settings, training)
    except Exception as error:
        if not report(error):
            raise
        return WRONG_INPUT
    return 0


def finetune(settings: Finetuning, training: TrainingArguments) -> Trainer:
    """Trains and saves the model; gives the Trainer, with what it has logged.

    Raises:
        NsaError: the model is not a converted one, the data cannot be used, or one process has several GPUs.
    """
    if training.n_gpu > 1 and not settings.padded:  # by `nn.DataParallel`, which would cut the list of borders
        raise NsaError(
            f"a packed batch is not spread over {training.n_gpu} GPUs by one process: start one for each (accelerate "
            "launch --num_processes), show it one GPU (CUDA_VISIBLE_DEVICES=0), or give --padded"
        )
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="float32")
    if not isinstance(model.config, NsaConfigMixin):
        raise NsaError(f"{settings.model} is a dense model: convert it first, nsa-hf convert {settings.model} OUT")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    with training.main_process_first():  # the other processes read what it has tokenised
        texts = read_documents(settings.data, tokenizer, settings.max_length)
        held_out = settings.eval_data and read_documents(settings.eval_data, tokenizer, settings.max_length)
    trainer = Trainer(
        model,
        training,
        train_dataset=texts,
        eval_dataset=held_out or None,
        processing_class=tokenizer,
        data_collator=make_collator(tokenizer, settings.padded),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    return trainer


def make_collator(tokenizer: Any, padded: bool) -> Any:
    """What makes a batch: a padded row for each document, or one row of all, each attending to itself only."""
    if not padded:
        return DataCollatorWithFlattening(return_flash_attn_kwargs=True)  # with the documents' borders
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def read_documents(path: str, tokenizer: Any, max_length: int) -> Dataset:
    """The documents of a .jsonl file as tokens.

    Returns:
        Rows of `COLUMNS`.

    Raises:
        NsaError: a line has none of the three forms, or nothing is left to learn.
    """
    rows = load_dataset("json", data_files=path, split="train")
    opening = opening_tokens(tokenizer)
    documents = rows.map(lambda row: tokenize(row, tokenizer, opening, max_length), remove_columns=rows.column_names)
    useful = documents.filter(lambda row: any(label != IGNORED for label in row["labels"]))
    if not len(useful):
        raise NsaError(f"{path}: nothing to learn in the first {max_length} tokens of any line: set --max_length")
    if len(useful) < len(documents):
        print(f"{path}: {len(documents) - len(useful)} documents left out, their prompts fill --max_length")
    return useful


def tokenize(row: dict[str, Any], tokenizer: Any, opening: list[int], max_length: int) -> dict[str, list[int]]:
    """One document: its tokens, and the labels of those that are learned.

    A chat template writes the special tokens itself. Any other document begins with those that the tokenizer begins a
    text with (`opening`), and ends with its end-of-sequence token, where it has one; there are none in between.
    """
    prompt, answer = prompt_and_answer(row, tokenizer)
    begin, end = (tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, answer))
    if not row.get("messages"):
        begin = opening + begin
        if tokenizer.eos_token_id is not None:
            end = [*end, tokenizer.eos_token_id]
    ids = begin + end
    labels = [IGNORED] * len(begin) + end
    labels[:1] = [IGNORED][: len(labels)]  # in a row that is padded on the left, padding would have to foretell it
    return {name: values[:max_length] for name, values in zip(COLUMNS, (ids, [1] * len(ids), labels), strict=True)}


def prompt_and_answer(row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    """What is given and what is learned of a line.

    Raises:
        NsaError: it has none of the three forms, or the chat template changes what came before an answer.
    """
    if row.get("messages"):
        before = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        if not whole.startswith(before):
            raise NsaError("this chat template changes the prompt when the answer is there: give prompt and completion")
        return before, whole.removeprefix(before)
    if row.get("completion"):
        return row.get("prompt") or "", row["completion"]
    if row.get("text"):
        return "", row["text"]
    raise NsaError(f"a line needs messages, prompt and completion, or text; one has {', '.join(row) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
