"""Whatever bytes a client sends, the answer says what is wrong with them, and others are served."""

import random
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

from spieldose_proto import inference_pb2 as pb

from ..conftest import Running

METHODS = [
    (f"/{service.full_name}/{method.name}", method.server_streaming)
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
GENERATE = "/spieldose.v1.Inference/Generate"
NO_MESSAGES = {
    "a varint without end": b"\xff" * 11,
    "a wire type there is not": b"\x0f\x00",
    "a field longer than the message": b"\x0a\xff\xff\xff\xff\x07x",
    "a group that does not end": b"\x0b" * 200,
}
SOUND = pb.GenerateRequest(
    request_id="mine",
    adapter_id="a1",
    text="hello",
    sampling_params=pb.SamplingParams(
        temperature=0.5, top_p=0.9, top_k=5, max_tokens=2, stop=["no"], seed=3, n=2, logprobs=1
    ),
).SerializeToString()
CLEAN = {
    None,  # it still is a sound request
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
}


@pytest.mark.parametrize("payload", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_is_an_invalid_argument_of_every_method(
    running: Running, caplog: pytest.LogCaptureFixture, payload: bytes
) -> None:
    for path, streams in METHODS:
        error = refusal(running, path, payload, streams=streams)
        assert error is not None and error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == f"expected a request message of {path}, got other bytes"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    running.client.generate("hello", adapter="a1", sampling=pb.SamplingParams(max_tokens=2))


def test_text_that_is_not_utf8_is_an_invalid_argument(running: Running) -> None:
    error = refusal(running, GENERATE, b"\x1a\x02\xc3\x28", streams=True)
    assert error is not None and error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_mutated_request_gets_an_answer_or_a_reason(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    alone = running.client.generate("hello", adapter="a1", sampling=pb.SamplingParams(max_tokens=9))
    codes = set()

    @settings(max_examples=900, derandomize=True, deadline=None, database=None)
    @given(st.randoms(use_true_random=False), st.integers(1, 4))
    def mutate(chance: random.Random, times: int) -> None:
        payload = bytearray(SOUND)
        for _ in range(times):
            at = chance.randrange(len(payload))
            payload[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        error = refusal(running, GENERATE, bytes(payload), streams=True)
        codes.add(None if error is None else error.code())
        assert codes <= CLEAN, (payload, error)

    mutate()
    assert codes == CLEAN  # the mutations reach all of them
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert alone == running.client.generate(
        "hello", adapter="a1", sampling=pb.SamplingParams(max_tokens=9)
    )


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("request_id", pb.GenerateRequest(text="x", request_id="y" * 129)),
        (
            "sampling_params.stop",
            pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(stop=["é" * 9999] * 17)),
        ),
        (
            "sampling_params.stop_token_ids",
            pb.GenerateRequest(
                text="x", sampling_params=pb.SamplingParams(stop_token_ids=range(99999))
            ),
        ),
        (
            "messages",
            pb.GenerateRequest(
                messages=pb.ChatMessages(messages=[pb.ChatMessage(role="\0é" * 99999, content="x")])
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_reason_fits_into_a_status_whatever_it_quotes(
    running: Running, field: str, request_: pb.GenerateRequest
) -> None:
    error = refusal(running, GENERATE, request_.SerializeToString(), streams=True)
    assert error is not None and error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"{field}: expected")
    detail = error_details_pb2.BadRequest()
    assert rpc_status.from_call(error).details[0].Unpack(detail)
    assert detail.field_violations[0].field == field


def test_an_unknown_adapter_is_not_found_however_long_its_name(running: Running) -> None:
    payload = pb.GenerateRequest(text="x", adapter_id="é" * 100_000).SerializeToString()
    error = refusal(running, GENERATE, payload, streams=True)
    assert error is not None and error.code() == grpc.StatusCode.NOT_FOUND


def refusal(running: Running, path: str, payload: bytes, *, streams: bool) -> Any:
    """Send bytes to a method and return the error, or None; a stream is closed once it begins."""
    with grpc.insecure_channel(f"127.0.0.1:{running.server.port}") as channel:
        method = channel.unary_stream(path) if streams else channel.unary_unary(path)
        try:
            answer = method(payload, timeout=60)
            if streams:
                next(answer)
        except grpc.RpcError as error:
            return error
        return None
