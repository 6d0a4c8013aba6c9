"""The messages that a prompt is sent in."""

from collections.abc import Sequence

from spieldose_proto import inference_pb2 as pb

Prompt = str | Sequence[pb.ChatMessage]  # text as it is, or messages for the chat template


def generate_request(
    prompt: Prompt, adapter: str, sampling: pb.SamplingParams | None
) -> pb.GenerateRequest:
    """Ask for an answer."""
    request = pb.GenerateRequest(adapter_id=adapter, sampling_params=sampling)
    _set(request, prompt)
    return request


def tokenize_request(prompt: Prompt, adapter: str) -> pb.TokenizeRequest:
    """Ask for the tokens that an answer would be to."""
    request = pb.TokenizeRequest(adapter_id=adapter)
    _set(request, prompt)
    return request


def _set(request: pb.GenerateRequest | pb.TokenizeRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.messages.messages.extend(prompt)
