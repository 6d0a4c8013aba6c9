"""What the contract's messages say, in the server's own terms, and back."""

import secrets

from spieldose_proto import inference_pb2 as pb
from spieldose_server.errors import InvalidRequest
from spieldose_server.generation import Completed, Piece
from spieldose_server.request import Message, Prompt, Question
from spieldose_server.sampling import TokenLogprob
from spieldose_server.sampling_params import SamplingParams
from spieldose_server.versions import State, Version

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
            given[name] = tuple(given[name])
    return SamplingParams(**given)


def logprob(found: TokenLogprob) -> pb.TokenLogprob:
    likeliest = [pb.Likely(token_id=token, logprob=value) for token, value in found.likeliest]
    return pb.TokenLogprob(logprob=found.logprob, likeliest=likeliest)


def prompt(request: pb.GenerateRequest | pb.TokenizeRequest) -> tuple[str, Prompt]:
    """Return the prompt and the name of its field. Raises InvalidRequest."""
    match field := request.WhichOneof("prompt"):
        case "text":
            if not request.text:
                raise InvalidRequest(field, "expected a prompt, got an empty one")
            return field, request.text
        case "token_ids" if isinstance(request, pb.GenerateRequest):
            return field, list(request.token_ids.ids)
        case "messages":
            return field, [Message(m.role, m.content) for m in request.messages.messages]
    raise InvalidRequest("prompt", "expected one of text, token_ids or messages, got none")


def question(request: pb.GenerateRequest) -> Question:
    """Return what a request asks for. Raises InvalidRequest."""
    field, asked = prompt(request)
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
        method=info.method if info else "",
        description=info.description if info else "",
        density=info.density if info else 0.0,
        nnz=description.nnz if description else 0,
        memory_bytes=version.nbytes,
        running=version.leases,
        pinned=version.pinned,
    )
