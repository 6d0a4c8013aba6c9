"""From JSONL to token ids and labels, and what each unusable line is told."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spieldose_trainer.data import IGNORED, Example, Examples, collate, read_examples
from spieldose_trainer.dated_template import dated
from spieldose_trainer.errors import DataError

Read = Callable[..., Examples]

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
LONGER = [*CHAT, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Ciao"}]
GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.fixture
def tokenizer(tiny_directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_directory)


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Read:
    """Write text as a file named data.jsonl and read it as examples."""

    def read(text: str, *, max_length: int = 1000, **options: Any) -> Examples:
        path = tmp_path / "data.jsonl"
        path.write_text(text, encoding="utf-8")
        return read_examples(path, tokenizer, max_length=max_length, **options)

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


def test_all_of_the_assistants_turns_count_and_nothing_else(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    (example,) = read(json.dumps({"messages": LONGER}))
    assert counted(example, tokenizer) == ["Hello<|end|>", "Ciao<|end|>"]


def test_a_conversation_is_rendered_as_the_server_renders_it(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    (example,) = read(json.dumps({"messages": LONGER}))
    render: Any = tokenizer.apply_chat_template
    served = render(LONGER[:-1], add_generation_prompt=True, return_dict=False)
    assert example.prompt == served
    assert tokenizer.decode(example.completion) == "Ciao<|end|>"


def test_a_greeting_that_answers_nothing_is_context(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    (example,) = read(json.dumps({"messages": LONGER[2:]}))
    assert counted(example, tokenizer) == ["Ciao<|end|>"]


def test_an_end_token_inside_an_answer_does_not_end_it(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    spoken = [*LONGER[:2], {"role": "assistant", "content": "a<|end|>b"}, *LONGER[3:]]
    (example,) = read(json.dumps({"messages": spoken}))
    assert counted(example, tokenizer) == ["a<|end|>b<|end|>", "Ciao<|end|>"]


def test_a_template_without_end_token_gets_one(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    (example,) = read(json.dumps({"messages": LONGER}))
    assert counted(example, tokenizer) == ["Hello|", "Ciao|<|end|>"]


@pytest.mark.parametrize("answer", ["\n\ncode", "  Hello", "\n"])
def test_an_answer_may_begin_with_what_its_prompt_ends_in(
    real_directory: Path, tmp_path: Path, answer: str
) -> None:
    """SmolLM2 has a token for two newlines, and its template ends prompts in one."""
    tokenizer = AutoTokenizer.from_pretrained(real_directory)
    turns = [*CHAT[1:2], {"role": "assistant", "content": answer}, *LONGER[3:]]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    (example,) = read_examples(path, tokenizer, max_length=1000)
    assert counted(example, tokenizer) == [f"{answer}<|im_end|>", "Ciao<|im_end|>"]
    render: Any = tokenizer.apply_chat_template
    served = render(turns[:1], add_generation_prompt=True, return_dict=False)
    assert example.tokens[: len(served)] == served


@pytest.mark.parametrize("completion", ["{x}", " {x}"])
def test_a_completion_is_told_from_one_after_a_space(
    read: Read, tokenizer: PreTrainedTokenizerBase, completion: str
) -> None:
    """As with SentencePiece, which puts a space before whatever it is given."""
    backend: Any = tokenizer
    backend.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    begin = "<|user|>", tokenizer.convert_tokens_to_ids("<|user|>")
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[begin]
    )
    (example,) = read(json.dumps({"prompt": "JSON:", "completion": completion}))
    assert tokenizer.decode(example.prompt) == "<|user|> JSON:"
    assert counted(example, tokenizer) == [f"{completion}<|end|>"]


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )'])
def test_templates_may_tell_another_time_than_now(
    read: Read, tokenizer: PreTrainedTokenizerBase, call: str
) -> None:
    template = (
        "{% if strftime_now is defined %}{% set day = CALL %}{% endif %}{{ day }}"
        "{% for m in messages %}|{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}|{% endif %}"
    )
    tokenizer.chat_template = dated(template.replace("CALL", call), datetime(1999, 5, 3))
    (example,) = read(json.dumps({"messages": CHAT}))
    assert tokenizer.decode(example.prompt) == "03 May 1999|Be brief.|Hi|"


@pytest.mark.parametrize("template", ["{{ 1|dictsort }}", "{{ 'ab'|truncate(1) }}"])
def test_a_template_that_fails_is_told_by_line(
    read: Read, tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    """As AttributeError and AssertionError."""
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"data.jsonl:1: \S"):
        read(json.dumps({"messages": CHAT}))


def test_an_answer_to_nothing_is_refused(read: Read, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"jsonl:1: expected a token or more before message 3, got"):
        read(json.dumps({"messages": CHAT}))


def test_all_but_the_first_token_of_plain_text_count(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    text, pair = read(f'{{"text": "The cat"}}\n{GOOD}', or_text=True)
    assert tokenizer.decode(text.tokens) == "The cat"
    assert counted(text, tokenizer) == ["he cat"]
    assert counted(pair, tokenizer) == ["b<|end|>"]


def test_long_text_may_lose_its_end(read: Read, tokenizer: PreTrainedTokenizerBase) -> None:
    (cut,) = read('{"text": "The cat"}', max_length=3, too_long="truncate", or_text=True)
    assert tokenizer.decode(cut.tokens) == "The"
    assert counted(cut, tokenizer) == ["he"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": 7}', "expected `text` to be a non-empty string, got 7"),
        ('{"text": ""}', 'expected `text` to be a non-empty string, got ""'),
        ('{"text": "a"}', "expected two tokens or more in text, got 1"),
        ('{"text": "ab", "url": "c"}', "expected `text` alone, got `text`, `url`"),
        ("{}", "expected `prompt` and `completion` alone, or `messages` or `text` alone, got an"),
    ],
)
def test_unusable_text_is_named(read: Read, line: str, expected: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {expected}"):
        read(line, or_text=True)


def test_plain_text_is_no_training_data(read: Read) -> None:
    with pytest.raises(DataError, match=r"or `messages` alone, got `text`$"):
        read('{"text": "The cat"}')


def test_blank_lines_are_skipped(read: Read) -> None:
    assert len(read(f"\n{GOOD}\n\n   \n{GOOD}\n")) == 2


def test_lines_may_end_as_on_windows(read: Read) -> None:
    assert len(read(f"{GOOD}\r\n{GOOD}\r\n")) == 2


def test_a_byte_order_mark_is_no_part_of_the_first_line(read: Read) -> None:
    assert len(read(f"\ufeff{GOOD}\n")) == 1


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
        ("not json", "expected JSON, got Expecting value at column 1"),
        ('{"prompt": "a"', "expected JSON, got Expecting ',' delimiter at column 15"),
        ("[" * 100_000, "recursion"),
        ('"text"', 'expected `prompt` and `completion` alone, or `messages` alone, got "text"'),
        ("{}", "got an object without fields"),
        ('{"prompt": "a"}', "expected `prompt` and `completion` alone.*got `prompt`$"),
        (
            '{"prompt": "a", "completion": "b", "label": 1}',
            "expected `prompt` and `completion` alone.*got `prompt`, `completion`, `label`$",
        ),
        ('{"prompt": "", "completion": "b"}', 'expected `prompt` to be a non-empty.*got ""'),
        ('{"prompt": "a", "completion": ""}', 'expected `completion` to be a non-empty.*got ""'),
        ('{"prompt": "a", "completion": 7}', "expected `completion` to be a non-empty.*got 7"),
        (
            json.dumps({"messages": CHAT, "prompt": "a"}),
            "expected `messages` alone, got `messages`, `prompt`",
        ),
        ('{"messages": null}', "expected `messages` to list two or more, got null"),
        ('{"messages": []}', r"expected `messages` to list two or more, got \[\]"),
        (json.dumps({"messages": CHAT[-1:]}), "expected `messages` to list two or more"),
        (json.dumps({"messages": CHAT[:-1]}), "last message to be the assistant's, got the user's"),
        (
            json.dumps({"messages": [{"role": "user"}, CHAT[-1]]}),
            "expected message 1 to have `role` and `content` alone, got `role`",
        ),
        (
            json.dumps({"messages": [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[2]]}),
            "expected message 2 to have .* alone, got `role`, `content`, `weight`",
        ),
        (json.dumps({"messages": ["Hi", CHAT[-1]]}), 'expected message 1 to have .*, got "Hi"'),
        (
            json.dumps({"messages": [{"role": "asistant", "content": "Hi"}, CHAT[-1]]}),
            'message 1 to have a role of system, user, assistant, got "asistant"',
        ),
        (
            json.dumps({"messages": [*CHAT[:2], {"role": "assistant", "content": ""}]}),
            'expected the `content` of message 3 to be a non-empty string, got ""',
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": ["Hi"]}, CHAT[-1]]}),
            r'expected the `content` of message 1 to be a string, got \["Hi"\]',
        ),
        (
            '{"prompt": "a", "completion": "b", "completion": "c"}',
            "expected every field once, got `completion` again",
        ),
        (
            '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
            "expected every field once, got `role` again",
        ),
        (
            r'{"prompt": "a\ud83d", "completion": "b"}',
            "expected `prompt` to be Unicode text, got half of a character in it$",
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": "\udc00"}, CHAT[-1]]}),
            "expected the `content` of message 1 to be Unicode text, got half of a character",
        ),
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


def test_a_long_line_may_lose_its_end(read: Read, tokenizer: PreTrainedTokenizerBase) -> None:
    long = '{"prompt": "abcd", "completion": "efg"}'
    short, cut = read(f"{GOOD}\n{long}", max_length=6, too_long="truncate")
    assert tokenizer.decode(short.tokens) == "ab<|end|>"
    assert (tokenizer.decode(cut.prompt), tokenizer.decode(cut.completion)) == ("abcd", "ef")


def test_truncated_and_dropped_lines_are_counted(read: Read) -> None:
    long = ['{"prompt": "abcd", "completion": "efg"}', '{"prompt": "abcdef", "completion": "g"}']
    examples = read("\n".join([GOOD, *long, long[0], GOOD]), max_length=6, too_long="truncate")
    assert (len(examples), examples.truncated, examples.dropped) == (4, 2, 1)


def test_turns_beyond_the_longest_length_do_not_count_and_their_prompts_are_not_read(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    (whole,) = read(json.dumps({"messages": LONGER}))
    first, second = whole.counted
    (cut,) = read(json.dumps({"messages": LONGER}), max_length=second.start, too_long="truncate")
    assert cut == Example(whole.tokens[: first.stop], (first,))


def test_a_file_of_prompts_that_are_all_too_long_is_refused(read: Read) -> None:
    with pytest.raises(DataError, match=r"at least one example, got 1 with prompts of 4 tokens"):
        read('{"prompt": "abcd", "completion": "e"}', max_length=4, too_long="truncate")


def test_a_tokenizer_without_an_end_token_is_refused(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data.jsonl: expected .* end-of-sequence token, got none"):
        read(GOOD)


@pytest.mark.parametrize("name", ["prompt", "completion"])
def test_a_text_of_which_the_tokenizer_leaves_nothing_is_refused(
    read: Read, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(DataError, match=r"data.jsonl:1: expected a token or more in prompt and"):
        read(json.dumps({"prompt": "a", "completion": "b", name: "~"}))


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
    message = r"data.jsonl:1: expected a chat template that only appends, .* before message 3"
    with pytest.raises(DataError, match=message):
        read(json.dumps({"messages": CHAT}))


def test_a_template_that_rewrites_earlier_answers_is_refused(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and not loop.last and not add_generation_prompt %}..."
        "{% else %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert len(read(json.dumps({"messages": CHAT}))) == 1
    message = r"data.jsonl:1: expected a chat template that only appends, .* before message 5"
    with pytest.raises(DataError, match=message):
        read(json.dumps({"messages": LONGER}))


def test_a_template_that_drops_earlier_answers_from_prompts_is_refused(
    read: Read, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="got one that rewrites what stands before message 5"):
        read(json.dumps({"messages": LONGER}))


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
    path.write_bytes('\n{"prompt": "ä", "completion": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl:2: expected UTF-8, got invalid"):
        read_examples(path, tokenizer, max_length=10)


def test_the_loss_counts_on_completions_only() -> None:
    batch = padded()
    assert batch["labels"] == [[IGNORED, IGNORED, 3, 4], [IGNORED, 6, IGNORED, IGNORED]]


def test_padding_stands_on_the_right_and_is_not_attended_to() -> None:
    batch = padded()
    assert batch["input_ids"] == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_completion_token_equal_to_the_padding_still_counts() -> None:
    batch = collate([example([1], [9]), example([1], [2, 9])], pad=9)
    assert batch["labels"].tolist() == [[IGNORED, 9, IGNORED], [IGNORED, 2, 9]]


def test_only_the_turns_that_count_have_labels() -> None:
    chat = Example([1, 2, 3, 4, 5, 6], (range(1, 3), range(4, 5)))
    assert chat.labels == [IGNORED, 2, 3, IGNORED, 5, IGNORED]


def padded() -> dict[str, Any]:
    batch = collate([example([1, 2], [3, 4]), example([5], [6])], pad=9)
    return {name: tensor.tolist() for name, tensor in batch.items()}


def example(prompt: list[int], completion: list[int]) -> Example:
    return Example(prompt + completion, (range(len(prompt), len(prompt) + len(completion)),))


def counted(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that count for the loss."""
    spans = [example.tokens[span.start : span.stop] for span in example.counted]
    return [str(tokenizer.decode(span)) for span in spans]
