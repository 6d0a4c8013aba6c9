"""A whole answer, put together from the responses that it came in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spieldose_proto import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Reply:
    """Hold a whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprob, ...]  # one for each, if asked for
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    adapter: str  # name@digest of the version that played, empty for the base


def replies(responses: Iterable[pb.GenerateResponse]) -> list[Reply]:
    """Return the answers that a call's responses make, by index."""
    parts: dict[int, list[pb.GenerateResponse]] = {}
    for response in responses:
        parts.setdefault(response.index, []).append(response)
    return [_reply(parts[index]) for index in sorted(parts)]


def _reply(responses: Sequence[pb.GenerateResponse]) -> Reply:
    complete = responses[-1].complete
    played = complete.adapter
    return Reply(
        text="".join(response.chunk.text for response in responses),
        token_ids=tuple(token for r in responses for token in r.chunk.token_ids),
        logprobs=tuple(found for r in responses for found in r.chunk.logprobs),
        finish_reason=pb.FinishReason.Name(complete.finish_reason).rpartition("_")[2].lower(),
        prompt_tokens=complete.prompt_tokens,
        adapter=f"{played.name}@{played.digest}" if played.name else "",
    )
