"""A server that is away or full is asked again, but never for what it has begun to answer."""

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from pytest import approx

from spieldose_kernels.delta_file import write_delta
from spieldose_proto import inference_pb2 as pb
from spieldose_proto import inference_pb2_grpc as rpc
from spieldose_server import admission
from spieldose_server.client import (
    AsyncClient,
    Busy,
    Cancelled,
    Client,
    DeadlineExceeded,
    Unavailable,
    channel,
)

from ..conftest import Running, eventually
from .fake_server import FakeServer, fails, hangs, says
from .test_adapters import Stream
from .test_process import process

AWAY, FULL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED
SHORT = pb.SamplingParams(max_tokens=4)
LONG = pb.SamplingParams(max_tokens=500, min_tokens=500)

Ask = Callable[..., Any]  # asks a server at an address by a call of a client with these settings


def later(seconds: float) -> bytes:
    """Return the details of a full server's status."""
    retry, detail = error_details_pb2.RetryInfo(), any_pb2.Any()
    retry.retry_delay.FromMilliseconds(round(1000 * seconds))
    detail.Pack(retry)
    return status_pb2.Status(code=FULL.value[0], details=[detail]).SerializeToString()


def in_thread(address: str, call: Callable[[Any], Any], **settings: Any) -> Any:
    with Client(address, **settings) as client:
        return call(client)


def on_a_loop(address: str, call: Callable[[Any], Any], **settings: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(address, **settings) as client:
            return await call(client)

    return asyncio.run(ask())


@pytest.fixture(params=[in_thread, on_a_loop])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param


@pytest.mark.parametrize("code", [AWAY, FULL])
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.generate("x"),
        lambda client: client.answers("x"),
        lambda client: client.tokenize("x"),
        lambda client: client.model(),
        lambda client: client.adapters(),
        lambda client: client.adapter("a1"),
        lambda client: client.load("a1"),
        lambda client: client.unload("a1"),
        lambda client: client.pin("a1"),
        lambda client: client.unpin("a1"),
    ],
)
def test_every_call_is_made_again(
    fake: FakeServer, ask: Ask, call: Callable[[Any], Any], code: grpc.StatusCode
) -> None:
    fake.plan = 2 * [fails(code, grpc_status_details_bin=later(0.001))]
    ask(fake.address, call)
    first, *again = (attempt.request for attempt in fake.attempts)
    assert again == 2 * [first]


def test_other_refusals_are_final(fake: FakeServer, ask: Ask) -> None:
    for code in set(grpc.StatusCode) - {AWAY, FULL, grpc.StatusCode.OK}:
        fake.plan, fake.attempts = [fails(code)], []
        with pytest.raises(Exception, match="as planned"):
            ask(fake.address, lambda client: client.model())
        assert len(fake.attempts) == 1


def test_it_gives_up_after_five_times(fake: FakeServer, ask: Ask) -> None:
    fake.plan = 9 * [fails(AWAY)]
    with pytest.raises(Unavailable, match="UNAVAILABLE: as planned"):
        ask(fake.address, lambda client: client.generate("x"))
    assert len(fake.attempts) == 5
    moments = [attempt.moment for attempt in fake.attempts]
    for wait, begin, end in zip((0.2, 0.4, 0.8, 1.6), moments, moments[1:], strict=False):
        assert end - begin > 0.75 * wait


@pytest.mark.parametrize("code", [AWAY, FULL])
def test_what_has_begun_is_never_asked_for_again(
    fake: FakeServer, ask: Ask, code: grpc.StatusCode
) -> None:
    fake.plan = [fails(code, "one ", grpc_status_details_bin=later(0.001))]
    with pytest.raises((Unavailable, Busy)):
        ask(fake.address, lambda client: client.generate("x"))
    assert len(fake.attempts) == 1


def test_the_text_of_an_answer_that_is_asked_for_again_comes_once(fake: FakeServer) -> None:
    fake.plan = [fails(AWAY), says("one ", "two")]
    with Client(fake.address) as client:
        assert list(client.stream("x")) == ["one ", "two"]
        fake.plan = [fails(AWAY), fails(AWAY, "one ")]
        stream = client.stream("x")
        assert next(stream) == "one "
        with pytest.raises(Unavailable):
            next(stream)
    assert len(fake.attempts) == 4


def test_the_server_says_when_to_come_back(fake: FakeServer, ask: Ask) -> None:
    fake.plan = [fails(FULL, grpc_status_details_bin=later(0.9))]
    ask(fake.address, lambda client: client.generate("x"))
    first, second = fake.attempts
    assert second.moment - first.moment >= 0.9  # left to itself it would wait 0.24 s at most


def test_a_full_server_is_asked_again_when_it_said(
    serve_tiny: Callable[..., Iterator[Running]],
    tmp_path: Path,
    make_adapter: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    ask: Ask,
) -> None:
    monkeypatch.setattr(admission, "MIN_RETRY", 1.5)
    refused: list[float] = []
    write_delta(tmp_path / "a1.safetensors", make_adapter(1))
    with (
        contextmanager(serve_tiny)(tmp_path, max_requests=1) as running,
        ThreadPoolExecutor(1) as pool,
    ):
        clamped = admission._clamped
        monkeypatch.setattr(
            admission, "_clamped", lambda s: refused.append(time.monotonic()) or clamped(s)
        )
        with Stream(running, "a1"):
            address = f"127.0.0.1:{running.server.port}"
            asked = pool.submit(ask, address, lambda client: client.generate("x", sampling=SHORT))
            eventually(lambda: refused)
        assert asked.result(60).finish_reason == "length"
        assert time.monotonic() - refused[0] >= 1.5


def test_retries_can_be_turned_off(fake: FakeServer, ask: Ask) -> None:
    for code, kind in ((AWAY, Unavailable), (FULL, Busy)):
        fake.plan, fake.attempts = [fails(code, grpc_status_details_bin=later(0.001))], []
        with pytest.raises(kind):
            ask(fake.address, lambda client: client.generate("x"), retries=0)
        assert len(fake.attempts) == 1


def test_a_deadline_bounds_the_retries(fake: FakeServer, ask: Ask) -> None:
    fake.plan = [fails(FULL, grpc_status_details_bin=later(60))]
    with pytest.raises(Busy) as caught:  # at once: nothing would come of waiting
        ask(fake.address, lambda client: client.generate("x", timeout=50.0))
    assert caught.value.retry_after == 60
    fake.plan = 9 * [fails(FULL, grpc_status_details_bin=later(0.2))]
    with pytest.raises(Busy):
        ask(fake.address, lambda client: client.model(), timeout=0.3, retries=9)
    assert len(fake.attempts) <= 3
    assert all((again.left or 9) < 0.2 for again in fake.attempts[2:])  # what the first left


def test_a_full_server_that_does_not_say_when_is_not_asked_again(
    fake: FakeServer, ask: Ask
) -> None:
    fake.plan = [fails(FULL)]  # so ends a message that is too large
    with pytest.raises(Busy) as caught:
        ask(fake.address, lambda client: client.generate("x"))
    assert caught.value.retry_after is None
    assert len(fake.attempts) == 1


def test_a_server_that_dies_before_it_answers_and_stays_away_is_given_up(
    tiny_directory: Path, tmp_path: Path, ask: Ask
) -> None:
    with (
        process(tiny_directory, tmp_path) as (server, address),
        Client(address) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        list(client.stream("x", sampling=SHORT))
        server.send_signal(signal.SIGSTOP)  # the next is sent, and not answered
        asked = pool.submit(ask, address, lambda client: client.generate("x"))
        watched = pool.submit(lambda: next(client.watch()))
        time.sleep(0.5)
        server.kill()
        for call in (asked, watched):
            with pytest.raises(Unavailable):
                call.result(60)


def test_closing_a_client_ends_its_calls(fake: FakeServer) -> None:
    fake.plan = [hangs, fails(FULL, grpc_status_details_bin=later(30))]
    client = Client(fake.address)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(client.generate, "x"), pool.submit(client.model)]
        eventually(lambda: not fake.plan)
        time.sleep(0.2)  # the one hangs now, the other waits
        client.close()
        for call in calls:
            with pytest.raises(Cancelled, match=r"^CANCELLED: "):
                call.result(20)


def test_grpc_that_is_told_to_retry_obeys_the_server_too(
    serve_tiny: Callable[..., Iterator[Running]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MIN_RETRY", 0.5)
    policy = {
        "maxAttempts": 2,
        "initialBackoff": "0.001s",
        "maxBackoff": "0.001s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    service = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
    with contextmanager(serve_tiny)(tmp_path, max_requests=1) as running, Stream(running, ""):
        address = f"127.0.0.1:{running.server.port}"
        with grpc.insecure_channel(address, [("grpc.service_config", service)]) as channel:
            began = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                list(rpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="x")))
            assert caught.value.code() is FULL
            assert time.monotonic() - began >= 0.5


def test_calls_have_a_deadline_and_answers_none(fake: FakeServer, ask: Ask) -> None:
    def left(call: Callable[[Any], Any], **settings: Any) -> float | None:
        ask(fake.address, call, **settings)
        return fake.attempts[-1].left

    for call in (
        lambda client: client.model(),
        lambda client: client.tokenize("x"),
        lambda client: client.adapters(),
        lambda client: client.adapter("a1"),
        lambda client: client.load("a1"),
        lambda client: client.unload("a1"),
        lambda client: client.pin("a1"),
        lambda client: client.unpin("a1"),
    ):
        assert left(call) == approx(channel.CALL_SECONDS, rel=0.1)
        assert left(call, timeout=1000.0) == approx(1000, rel=0.1)
        assert left(call, timeout=None) is None
    assert left(lambda client: client.pin("a1", timeout=1000.0)) == approx(1000, rel=0.1)
    assert left(lambda client: client.generate("x")) is None
    assert left(lambda client: client.generate("x", timeout=1000.0)) == approx(1000, rel=0.1)


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline(
    fake: FakeServer, ask: Ask
) -> None:
    fake.plan = 2 * [hangs]
    with pytest.raises(DeadlineExceeded, match=r"^DEADLINE_EXCEEDED: "):
        ask(fake.address, lambda client: client.model(), timeout=0.2)
    with pytest.raises(DeadlineExceeded):
        ask(fake.address, lambda client: client.generate("x", timeout=0.2))


def test_a_stream_whose_server_has_vanished_ends(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(channel, "PING_SECONDS", 1)
    with process(tiny_directory, tmp_path) as (server, address), Client(address) as client:
        stream = client.stream("hello", sampling=LONG)
        next(stream)
        server.send_signal(signal.SIGSTOP)  # its connections stay, and nothing comes by them
        with pytest.raises(Unavailable):
            list(stream)
