"""From JSONL to token ids and labels, and what each unusable line is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spieldose_trainer.data import IGNORED, Example, collate, read_examples
from spieldose_trainer.errors import DataError

Read = Callable[..., list[Example]]

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.fixture
def tokenizer(tiny_directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_directory)


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Read:
    """Write text as a file named data.jsonl and read it as examples."""

    def read(text: str, *, max_length: int = 1000) -> list[Example]:
        path = tmp_path / "data.jsonl"
        path.write_text(text, encoding="utf-8")
        return read_examples(path, tokenizer, max_length=max_length)

    return read


def test_a_prompt_is_read_as_it_is(read: Read, tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = read('{"prompt": "Name: ", "completion": "Ann"}')
    assert tokenizer.decode(example.prompt) == "Name: "


def test_a_completion_ends_with_the_end_of_sequence_token(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    (example,) = read('{"prompt": "Name: ", "completion": "Ann"}')
    assert tokenizer.decode(example.completion) == "Ann<|end|>"


def test_messages_go_through_the_chat_template(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    (example,) = read(json.dumps({"messages": CHAT}))
    expected = "<|system|>Be brief.<|end|>\n<|user|>Hi<|end|>\n<|assistant|>"
    assert tokenizer.decode(example.prompt) == expected


def test_the_assistants_last_message_is_the_completion_up_to_its_end_token(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    (example,) = read(json.dumps({"messages": CHAT}))
    assert tokenizer.decode(example.completion) == "Hello<|end|>"


def test_earlier_answers_of_the_assistant_belong_to_the_prompt(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    more = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Ciao"}]
    (example,) = read(json.dumps({"messages": CHAT + more}))
    assert "Hello<|end|>" in tokenizer.decode(example.prompt)
    assert tokenizer.decode(example.completion) == "Ciao<|end|>"


def test_a_template_without_end_token_gets_one(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    (example,) = read(json.dumps({"messages": CHAT}))
    assert tokenizer.decode(example.completion) == "Hello|<|end|>"


def test_blank_lines_are_skipped(read: Read) -> None:
    assert len(read(f"\n{GOOD}\n\n   \n{GOOD}\n")) == 2


def test_lines_may_end_as_on_windows(read: Read) -> None:
    assert len(read(f"{GOOD}\r\n{GOOD}\r\n")) == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_unicode_line_separator_inside_a_string_does_not_end_the_line(
    read: Read, tokenizer: PreTrainedTokenizerBase, separator: str
) -> None:
    record = {"prompt": f"a{separator}b", "completion": "c"}
    (example,) = read(json.dumps(record, ensure_ascii=False))
    assert tokenizer.decode(example.prompt) == f"a{separator}b"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("not json", "Expecting value"),
        ('{"prompt": "a"', "Expecting ',' delimiter"),
        ('"text"', "expected .*`prompt` and `completion`.*got str"),
        ('{"prompt": "a"}', "expected .*`prompt` and `completion`.*got .'prompt'"),
        ('{"prompt": "", "completion": "b"}', "expected non-empty strings"),
        ('{"prompt": "a", "completion": ""}', "expected non-empty strings"),
        ('{"prompt": "a", "completion": 7}', "expected non-empty strings"),
        ('{"messages": []}', "end with the assistant's"),
        (json.dumps({"messages": CHAT[:-1]}), "end with the assistant's"),
        (json.dumps({"messages": CHAT[-1:]}), "end with the assistant's"),
        (json.dumps({"messages": [{"role": "user"}, CHAT[-1]]}), "string `role` and `content`"),
        (json.dumps({"messages": ["Hi", CHAT[-1]]}), "string `role` and `content`"),
    ],
)
def test_an_unusable_line_is_named_with_what_was_expected(
    read: Read, tmp_path: Path, line: str, expected: str
) -> None:
    with pytest.raises(DataError, match=expected) as error:
        read(f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert str(error.value).startswith(f"{tmp_path / 'data.jsonl'}:3: ")
    assert "\n" not in str(error.value)


def test_a_line_too_long_is_named_with_its_length_and_the_limit(read: Read, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(f'{GOOD}\n{{"prompt": "abcd", "completion": "efg"}}', max_length=7)
    assert str(error.value) == f"{tmp_path / 'data.jsonl'}:2: expected at most 7 tokens, got 8"


def test_a_line_of_exactly_the_longest_length_is_read(read: Read) -> None:
    assert len(read('{"prompt": "abcd", "completion": "efg"}', max_length=8)) == 1


def test_messages_for_a_base_without_a_chat_template_are_refused(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"data.jsonl:1: expected a base with a chat template"):
        read(json.dumps({"messages": CHAT}))


def test_a_template_that_rewrites_the_prompt_is_refused(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(
        DataError, match=r"data.jsonl:1: expected a chat template that only appends"
    ):
        read(json.dumps({"messages": CHAT}))


def test_a_line_that_the_template_itself_refuses_is_named(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role, please') }}"
    with pytest.raises(DataError, match=r"data.jsonl:1: no system role, please"):
        read(json.dumps({"messages": CHAT}))


def test_an_empty_file_is_refused(read: Read) -> None:
    with pytest.raises(DataError, match=r"data.jsonl: expected at least one example, got none"):
        read("\n\n")


def test_a_missing_file_is_refused_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: expected a readable UTF-8 JSONL file"):
        read_examples(tmp_path / "none.jsonl", tokenizer, max_length=10)


def test_a_file_in_another_encoding_is_refused_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "ä", "completion": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl: expected a readable UTF-8 JSONL file"):
        read_examples(path, tokenizer, max_length=10)


def test_the_loss_counts_on_completions_only() -> None:
    batch = padded()
    assert batch["labels"] == [[IGNORED, IGNORED, 3, 4], [IGNORED, 6, IGNORED, IGNORED]]


def test_padding_stands_on_the_right_and_is_not_attended_to() -> None:
    batch = padded()
    assert batch["input_ids"] == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_completion_token_equal_to_the_padding_still_counts() -> None:
    batch = collate([Example([1], [9]), Example([1], [2, 9])], pad=9)
    assert batch["labels"].tolist() == [[IGNORED, 9, IGNORED], [IGNORED, 2, 9]]


def padded() -> dict[str, Any]:
    batch = collate([Example([1, 2], [3, 4]), Example([5], [6])], pad=9)
    return {name: tensor.tolist() for name, tensor in batch.items()}
