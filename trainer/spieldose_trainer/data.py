"""Training examples: JSONL lines become token ids whose loss counts on the answers only."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError  # also what a template raises at roles it refuses
from transformers import PreTrainedTokenizerBase

from spieldose_kernels.checkpoint import first_line
from spieldose_trainer.errors import DataError
from spieldose_trainer.limits import NO_LIMITS, Limits
from spieldose_trainer.records import Messages, messages_of, pair_of, text_of

# what records, and what templates do with them, may raise
UNREADABLE = (
    ValueError,
    TypeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
)
IGNORED = -100  # label of a token whose prediction does not count; the loss functions' convention


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one tokenised example: the model reads all of it and is judged on what counts."""

    tokens: list[int]
    counted: tuple[range, ...]  # positions of the completion, or of each of the assistant's turns

    @property
    def prompt(self) -> list[int]:
        """Return what stands before the completion, or before the assistant's last turn."""
        return self.tokens[: self.counted[-1].start]

    @property
    def completion(self) -> list[int]:
        """Return the completion, or the assistant's last turn."""
        return self.tokens[self.counted[-1].start : self.counted[-1].stop]

    @property
    def labels(self) -> list[int]:
        """Return the tokens that count at their places, and `IGNORED` everywhere else."""
        labels = [IGNORED] * len(self.tokens)
        for span in self.counted:
            labels[span.start : span.stop] = self.tokens[span.start : span.stop]
        return labels


class Examples(list[Example]):
    """Hold a file's examples, and how many lines were too long for all of them to be kept."""

    limit = 0  # tokens of the longest that is kept whole
    truncated = 0  # lost their end
    dropped = 0  # had nothing left that counts, so they are not among the examples


def read_examples(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: Literal["refuse", "truncate"] = "refuse",
    limits: Limits = NO_LIMITS,
    or_text: bool = False,
) -> Examples:
    """Read a JSONL file of `prompt`/`completion` strings or of `messages`.

    Strings are taken as they are, as the server takes a request's `text`; messages go through the
    chat template, and all the assistant's count. `or_text` takes lines of plain `text`, too, whose
    every token but the first counts. `limits` are the base's. Raises DataError.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{path}: expected a tokenizer with an end-of-sequence token, got none")
    examples = Examples()
    examples.limit = limits.length(max_length)
    for number, line in _lines(path):
        try:
            record = json.loads(line, object_pairs_hook=_distinct)
            example = tokenise(record, tokenizer, or_text=or_text)
        except json.JSONDecodeError as error:
            reason = f"expected JSON, got {error.msg} at column {error.colno}"
            raise DataError(f"{path}:{number}: {reason}") from error
        except (*UNREADABLE, TemplateError) as error:
            reason = first_line(error)
            raise DataError(f"{path}:{number}: {reason}") from error
        largest = max(example.tokens)
        if limits.vocabulary is not None and largest >= limits.vocabulary:
            raise DataError(
                f"{path}:{number}: expected tokens that the base has an embedding for, "
                f"ids below {limits.vocabulary}, got {largest}"
            )
        length = len(example.tokens)
        if length <= examples.limit:
            examples.append(example)
        elif too_long == "refuse":
            whose = "" if examples.limit == max_length else ", as many as the base has positions"
            raise DataError(
                f"{path}:{number}: expected at most {examples.limit} tokens{whose}, got {length}"
            )
        elif shorter := _truncated(example, examples.limit):
            examples.append(shorter)
            examples.truncated += 1
        else:
            examples.dropped += 1
    if not examples:
        found = "none"
        if examples.dropped:
            found = f"{examples.dropped} with prompts of {examples.limit} tokens or more"
        raise DataError(f"{path}: expected at least one example, got {found}")
    return examples


def tokenise(record: Any, tokenizer: PreTrainedTokenizerBase, *, or_text: bool = False) -> Example:
    """Turn one record into token ids that, but for plain text, end with the end-of-sequence token.

    Raises ValueError, or what the tokenizer and its chat template raise.
    """
    if isinstance(record, dict) and "messages" in record:
        return _tokenise_chat(messages_of(record), tokenizer)
    if or_text and isinstance(record, dict) and "text" in record:
        return _tokenise_text(text_of(record), tokenizer)
    prompt, completion = pair_of(record, or_text=or_text)
    asked: list[int] = tokenizer(prompt)["input_ids"]
    whole = _appended(asked, prompt, prompt + completion, tokenizer, special=True)
    answer = whole[len(asked) :]
    if not asked or not answer:  # some tokenizers drop characters
        raise ValueError(
            f"expected a token or more in prompt and completion, got {len(asked)} and {len(answer)}"
        )
    tokens = [*whole, tokenizer.eos_token_id]
    return Example(tokens, (range(len(asked), len(tokens)),))


def _tokenise_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    tokens: list[int] = tokenizer(text)["input_ids"]
    if len(tokens) < 2:
        raise ValueError(f"expected two tokens or more in text, got {len(tokens)}")
    return Example(tokens, (range(1, len(tokens)),))


def _tokenise_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render up to every turn of the assistant, before it and after it: the difference counts."""
    if tokenizer.chat_template is None:
        raise ValueError("expected a base with a chat template for `messages`, got one without")
    render: Any = tokenizer.apply_chat_template
    eos = tokenizer.eos_token_id
    text = ""
    tokens: list[int] = []
    counted: list[range] = []
    for number, message in enumerate(messages):
        if number == 0 or message["role"] != "assistant":  # a first message answers nothing
            continue
        before: str = render(messages[:number], add_generation_prompt=True, tokenize=False)
        after: str = render(messages[: number + 1], tokenize=False)
        if not before.startswith(text) or not after.startswith(before):
            raise ValueError(
                "expected a chat template that only appends, "
                f"got one that rewrites what stands before message {number + 1}"
            )
        asked = _appended(tokens, text, before, tokenizer)
        if not asked:
            raise ValueError(f"expected a token or more before message {number + 1}, got none")
        answered = _appended(asked, before, after, tokenizer)
        answer = answered[len(asked) :]
        if eos in answer:  # templates may add a newline after it
            answer = answer[: len(answer) - answer[::-1].index(eos)]
        elif number == len(messages) - 1:
            answer.append(eos)
        counted.append(range(len(asked), len(asked) + len(answer)))
        tokens, text = answered, after
    return Example(tokens[: counted[-1].start] + answer, tuple(counted))


def _appended(
    tokens: list[int],
    text: str,
    longer: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    special: bool = False,
) -> list[int]:
    """Return the tokens of a text that begins with another, whose tokens stay as they are.

    An answer may begin with what a tokenizer would merge with the end of its prompt, as newlines;
    the model is asked with the prompt's own tokens. `special` if those have a beginning-of-sequence
    token that stands in no text.
    """
    whole: list[int] = tokenizer(longer, add_special_tokens=special)["input_ids"]
    if whole[: len(tokens)] == tokens:
        return whole
    rest: list[int] = tokenizer(longer[len(text) :], add_special_tokens=False)["input_ids"]
    return tokens + rest


def collate(examples: Sequence[Example], *, pad: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right: input_ids, attention_mask and labels, each [B, T] int64."""
    length = max(len(example.tokens) for example in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        padding = length - len(example.tokens)
        batch["input_ids"].append(example.tokens + [pad] * padding)
        batch["attention_mask"].append([1] * len(example.tokens) + [0] * padding)
        batch["labels"].append(example.labels + [IGNORED] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def read_text(path: Path) -> str:
    """Return what a file of data holds. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: expected UTF-8, got {error.reason}") from error
    except OSError as error:
        raise DataError(f"{path}: expected a readable UTF-8 JSONL file, got {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields; raises ValueError if it has one twice."""
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"expected every field once, got `{name}` again")
        record[name] = value
    return record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, numbered from 1."""
    lines = read_text(path).split("\n")  # and not at U+2028, which JSON strings may hold
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line


def _truncated(example: Example, length: int) -> Example | None:
    """Cut an example's end; None if nothing that counts would remain."""
    counted = tuple(
        range(span.start, min(span.stop, length)) for span in example.counted if span.start < length
    )
    return Example(example.tokens[: counted[-1].stop], counted) if counted else None
