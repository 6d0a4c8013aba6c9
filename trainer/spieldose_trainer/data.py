"""Training examples: JSONL lines become token ids whose loss counts on the completion only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError  # also what a template raises at roles it refuses
from transformers import PreTrainedTokenizerBase

from spieldose_trainer.errors import DataError

IGNORED = -100  # label of a token whose prediction does not count; the loss functions' convention


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one tokenised example: the model reads all of it and is judged on the completion."""

    prompt: list[int]
    completion: list[int]


def read_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Example]:
    """Read a JSONL file of `prompt`/`completion` strings or of `messages`.

    Strings are taken as they are, as the server takes a request's `text`; messages go through the
    chat template, and the last one, the assistant's, is the completion. Raises DataError.
    """
    examples = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable UTF-8 JSONL file, got {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = tokenise(json.loads(line), tokenizer)
        except (ValueError, TypeError, TemplateError) as error:
            raise DataError(f"{path}:{number}: {error}") from error
        length = len(example.prompt) + len(example.completion)
        if length > max_length:
            raise DataError(f"{path}:{number}: expected at most {max_length} tokens, got {length}")
        examples.append(example)
    if not examples:
        raise DataError(f"{path}: expected at least one example, got none")
    return examples


def tokenise(record: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Turn one record into token ids, the completion ending with the end-of-sequence token."""
    match record:
        case {"messages": [*context, {"role": "assistant", "content": str()}] as messages} if (
            context and all(map(_is_message, context))
        ):
            return _tokenise_chat(messages, tokenizer)
        case {"prompt": str(prompt), "completion": str(completion)} if prompt and completion:
            answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
            return Example(tokenizer(prompt)["input_ids"], [*answer, tokenizer.eos_token_id])
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise ValueError(
        "expected non-empty strings `prompt` and `completion`, "
        "or `messages` of string `role` and `content` that end with the assistant's, "
        f"got {found}"
    )


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _tokenise_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Example:
    if tokenizer.chat_template is None:
        raise ValueError("expected a base with a chat template for `messages`, got one without")
    render: Any = tokenizer.apply_chat_template
    prompt: list[int] = render(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole: list[int] = render(messages, return_dict=False)
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            "expected a chat template that only appends, got one that rewrites the prompt"
        )
    completion = whole[len(prompt) :]
    eos = tokenizer.eos_token_id
    if eos not in completion:
        return Example(prompt, [*completion, eos])
    last = len(completion) - completion[::-1].index(eos)  # templates may add a newline after it
    return Example(prompt, completion[:last])


def collate(examples: Sequence[Example], *, pad: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right: input_ids, attention_mask and labels, each [B, T] int64."""
    length = max(len(e.prompt) + len(e.completion) for e in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        tokens = example.prompt + example.completion
        padding = length - len(tokens)
        batch["input_ids"].append(tokens + [pad] * padding)
        batch["attention_mask"].append([1] * len(tokens) + [0] * padding)
        labels = [IGNORED] * len(example.prompt) + example.completion
        batch["labels"].append(labels + [IGNORED] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}
