"""The messages that calls are made with."""

from collections.abc import Sequence
from typing import Any, TypeVar

from spieldose_proto import inference_pb2 as pb
from spieldose_server.client.errors import InvalidArgument

Message = TypeVar("Message", bound=Any)

Prompt = str | Sequence[pb.ChatMessage]  # text as it is, or messages for the chat template


def message(kind: type[Message], **fields: Any) -> Message:
    """Return a message with these fields, of which None is left out.

    Raises InvalidArgument for what a field cannot hold.
    """
    found: Message = kind()
    for name, value in fields.items():
        try:
            found.MergeFrom(kind(**{name: value}))
        except ValueError as error:
            raise InvalidArgument.of(name, f"expected what fits the field, got: {error}") from None
    return found


def generate_request(
    prompt: Prompt, adapter: str, sampling: pb.SamplingParams | None
) -> pb.GenerateRequest:
    """Ask for an answer."""
    return message(
        pb.GenerateRequest, adapter_id=adapter, sampling_params=sampling, **_prompt(prompt)
    )


def tokenize_request(prompt: Prompt, adapter: str) -> pb.TokenizeRequest:
    """Ask for the tokens that an answer would be to."""
    return message(pb.TokenizeRequest, adapter_id=adapter, **_prompt(prompt))


def _prompt(prompt: Prompt) -> dict[str, Any]:
    """Return it as the field that it goes into."""
    if isinstance(prompt, str):
        return {"text": prompt}
    return {"messages": pb.ChatMessages(messages=prompt)}
