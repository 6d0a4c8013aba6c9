"""What a line of training data may say, and what is said of a line that says something else."""

import json
from typing import Any

from spieldose_trainer.text import is_text

ROLES = ("system", "user", "assistant")  # what a served request may have, too

Messages = list[dict[str, str]]  # of `role` and `content`, the assistant's last


def pair_of(record: Any, *, or_text: bool = False) -> tuple[str, str]:
    """Return a record's prompt and completion, neither empty. Raises ValueError."""
    if not isinstance(record, dict) or record.keys() != {"prompt", "completion"}:
        other = "`messages` or `text`" if or_text else "`messages`"
        raise ValueError(
            f"expected `prompt` and `completion` alone, or {other} alone, got {_shown(record)}"
        )
    for name, text in record.items():
        _check_string(f"`{name}`", text, may_be_empty=False)
    return record["prompt"], record["completion"]


def text_of(record: dict[str, Any]) -> str:
    """Return a record's text, which is not empty. Raises ValueError."""
    if record.keys() != {"text"}:
        raise ValueError(f"expected `text` alone, got {_shown(record)}")
    text = record["text"]
    _check_string("`text`", text, may_be_empty=False)
    return str(text)


def messages_of(record: dict[str, Any]) -> Messages:
    """Return a record's messages, of which the last answers the others. Raises ValueError."""
    if record.keys() != {"messages"}:
        raise ValueError(f"expected `messages` alone, got {_shown(record)}")
    messages = record["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"expected `messages` to list two or more, got {_shown(messages)}")
    for number, message in enumerate(messages, start=1):
        _check_message(message, name=f"message {number}")
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"expected the last message to be the assistant's, got the {messages[-1]['role']}'s"
        )
    return messages


def _check_message(message: Any, *, name: str) -> None:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        raise ValueError(
            f"expected {name} to have `role` and `content` alone, got {_shown(message)}"
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(
            f"expected {name} to have a role of {', '.join(ROLES)}, got {_shown(role)}"
        )
    _check_string(f"the `content` of {name}", content, may_be_empty=role != "assistant")


def _check_string(name: str, value: Any, *, may_be_empty: bool) -> None:
    if not isinstance(value, str) or not (value or may_be_empty):
        kind = "a string" if may_be_empty else "a non-empty string"
        raise ValueError(f"expected {name} to be {kind}, got {_shown(value)}")
    if not is_text(value):
        raise ValueError(f"expected {name} to be Unicode text, got half of a character in it")


def _shown(value: Any) -> str:
    """Return what was found in a few words: an object by its fields, the rest as JSON."""
    if isinstance(value, dict):
        return ", ".join(f"`{field}`" for field in value) or "an object without fields"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
