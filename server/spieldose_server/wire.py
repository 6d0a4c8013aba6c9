"""What the contract's messages say, in the server's own terms, and back."""

import secrets
from collections.abc import Sized

from spieldose_kernels.errors import one_line
from spieldose_proto import inference_pb2 as pb
from spieldose_server.errors import InvalidRequest
from spieldose_server.generation import Completed, Piece
from spieldose_server.request import MAX_MESSAGES, Message, Prompt, Question
from spieldose_server.sampling import TokenLogprob
from spieldose_server.sampling_params import MAX_STOP_STRINGS, MAX_STOP_TOKENS, SamplingParams
from spieldose_server.versions import State, Version

MAX_LISTED = max(MAX_STOP_STRINGS, MAX_STOP_TOKENS)

STATES = {
    State.FOUND: pb.ADAPTER_STATE_FOUND,
    State.VALIDATING: pb.ADAPTER_STATE_VALIDATING,
    State.ON_HOST: pb.ADAPTER_STATE_ON_HOST,
    State.LOADING: pb.ADAPTER_STATE_LOADING,
    State.RESIDENT: pb.ADAPTER_STATE_RESIDENT,
    State.DRAINING: pb.ADAPTER_STATE_DRAINING,
    State.REJECTED: pb.ADAPTER_STATE_REJECTED,
}


def sampling(message: pb.SamplingParams) -> SamplingParams:
    given = {field.name: value for field, value in message.ListFields()}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name][: MAX_LISTED + 1])  # one too many is refused already
    return SamplingParams(**given)


def logprob(found: TokenLogprob) -> pb.TokenLogprob:
    likeliest = [pb.Likely(token_id=token, logprob=value) for token, value in found.likeliest]
    return pb.TokenLogprob(logprob=found.logprob, likeliest=likeliest)


def prompt(
    request: pb.GenerateRequest | pb.TokenizeRequest, *, max_tokens: int
) -> tuple[str, Prompt]:
    """Return the prompt and the name of its field. Raises InvalidRequest.

    Counts before it converts: millions of empty entries fit into a message, and everybody would
    wait for them.
    """
    match field := request.WhichOneof("prompt"):
        case "text":
            if not request.text:
                raise InvalidRequest(field, "expected a prompt, got an empty one")
            return field, request.text
        case "token_ids" if isinstance(request, pb.GenerateRequest):
            _check_count(field, request.token_ids.ids, max_tokens, "tokens")
            return field, list(request.token_ids.ids)
        case "messages":
            _check_count(field, request.messages.messages, MAX_MESSAGES, "messages")
            return field, [Message(m.role, m.content) for m in request.messages.messages]
    raise InvalidRequest("prompt", "expected one of text, token_ids or messages, got none")


def _check_count(field: str, entries: Sized, limit: int, what: str) -> None:
    if len(entries) > limit:
        raise InvalidRequest(field, f"expected at most {limit} {what}, got {len(entries)}")


def question(request: pb.GenerateRequest, *, max_tokens: int) -> Question:
    """Return what a request asks for; a prompt has `max_tokens` at most. Raises InvalidRequest."""
    field, asked = prompt(request, max_tokens=max_tokens)
    return Question(
        id=request.request_id or secrets.token_hex(8),
        adapter_id=request.adapter_id,
        field=field,
        prompt=asked,
        sampling=sampling(request.sampling_params),
    )


def response(request_id: str, event: Piece | Completed) -> pb.GenerateResponse:
    answered = pb.GenerateResponse(request_id=request_id, index=event.index)
    if isinstance(event, Piece):
        logprobs = map(logprob, event.logprobs)
        chunk = pb.Chunk(text=event.text, token_ids=event.token_ids, logprobs=logprobs)
        answered.chunk.CopyFrom(chunk)
    else:
        answered.complete.CopyFrom(completion(event))
    return answered


def completion(end: Completed) -> pb.Completion:
    played = None
    if end.version is not None:
        played = pb.AdapterVersion(name=end.version.name, digest=end.version.digest)
    return pb.Completion(
        finish_reason=pb.FINISH_REASON_STOP if end.stopped else pb.FINISH_REASON_LENGTH,
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        adapter=played,
    )


def adapter(version: Version) -> pb.Adapter:
    description = version.description
    info = description.info if description else None
    return pb.Adapter(
        name=version.name,
        digest=version.digest,
        state=STATES[version.state],
        reason=version.reason,
        method=one_line(info.method) if info else "",
        description=one_line(info.description) if info else "",
        density=info.density if info else 0.0,
        nnz=description.nnz if description else 0,
        memory_bytes=version.nbytes,
        running=version.leases,
        pinned=version.pinned,
    )
