"""The event loop's client: many streams at once, and whatever ends one ends it on the server."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import AsyncClient, Cancelled, Client, NotFound, Unavailable

from ..conftest import Running, eventually
from .fake_server import FakeServer, fails, hangs, says
from .test_cancel import LONG, idle
from .test_client_retries import AWAY, FULL, later

SHORT = pb.SamplingParams(max_tokens=24)


def on_a_loop(address: str, work: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        async with AsyncClient(address) as client:
            return await work(client)

    return asyncio.run(whole())


@pytest.fixture
def address(running: Running) -> str:
    return f"127.0.0.1:{running.server.port}"


def test_fifty_streams_at_once_get_each_its_own_answer(running: Running, address: str) -> None:
    asked = [(f"prompt {number}", ("", "a1", "a2", "a3", "a4")[number % 5]) for number in range(50)]
    alone = [running.client.generate(p, adapter=a, sampling=SHORT).text for p, a in asked]

    async def said(client: AsyncClient, prompt: str, adapter: str) -> str:
        texts = [text async for text in client.stream(prompt, adapter=adapter, sampling=SHORT)]
        return "".join(texts)

    async def work(client: AsyncClient) -> list[str]:
        return await asyncio.gather(*(said(client, *each) for each in asked))

    assert on_a_loop(address, work) == alone
    assert len(set(alone)) > 40  # so that a mix-up would show


@contextmanager
def slow(running: Running) -> Iterator[None]:
    """Let the model take 40 s for LONG while the block runs."""
    with running.base.model.register_forward_pre_hook(lambda *_: time.sleep(0.1)):
        yield


async def closed(client: AsyncClient) -> None:
    async with aclosing(client.stream("hello", adapter="a1", sampling=LONG)) as stream:
        async for _ in stream:
            break


async def forgotten(client: AsyncClient) -> None:
    async for _ in client.stream("hello", adapter="a1", sampling=LONG):
        break


async def cancelled(client: AsyncClient) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in client.stream("hello", adapter="a1", sampling=LONG):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def timed_out(client: AsyncClient) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            async for _ in client.stream("hello", adapter="a1", sampling=LONG):
                pass


@pytest.mark.parametrize("end", [closed, forgotten, cancelled, timed_out])
def test_a_stream_that_ends_early_frees_its_place_at_once(
    running: Running, address: str, end: Callable[[AsyncClient], Awaitable[None]]
) -> None:
    async def work(client: AsyncClient) -> None:
        with slow(running):
            await end(client)
            await asyncio.to_thread(eventually, lambda: idle(running), seconds=10.0)

    on_a_loop(address, work)


@pytest.mark.parametrize("way", ["close", "break"])
def test_so_does_one_in_a_thread(
    running: Running, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    calls, begin = [], running.client.inference.Generate

    def kept(*request: Any, **settings: Any) -> Any:
        calls.append(begin(*request, **settings))  # gRPC cancels those that nobody holds
        return calls[-1]

    monkeypatch.setattr(running.client.inference, "Generate", kept)
    with slow(running):
        stream = running.client.stream("hello", adapter="a1", sampling=LONG)
        for _ in stream:
            break
        assert not idle(running)
        if way == "close":
            stream.close()
        del stream
        eventually(lambda: idle(running), seconds=10.0)


def test_both_clients_say_the_same(running: Running, address: str) -> None:
    admin = f"127.0.0.1:{running.server.admin_port}"

    async def steered(client: AsyncClient) -> None:
        assert (await client.pin("a1")).pinned
        assert not (await client.unpin("a1")).pinned
        await client.unload("a2")
        assert (await client.load("a2")).name == "a2"

    async def told(client: AsyncClient) -> list[Any]:
        await client.wait(20)
        two = pb.SamplingParams(max_tokens=8, n=2, temperature=1.0, seed=3)
        with pytest.raises(NotFound):
            await client.adapter("nobody")
        async with aclosing(client.watch()) as events:
            seen = [(await anext(events)).adapter.name for _ in range(4)]
        return [
            await client.generate("x", adapter="a1", sampling=SHORT),
            await client.answers("x", adapter="a1", sampling=two),
            await client.tokenize("x"),
            (await client.model()).fingerprint,
            [each.name for each in await client.adapters()],
            await client.adapter("a1"),
            seen,
        ]

    on_a_loop(admin, steered)
    two = pb.SamplingParams(max_tokens=8, n=2, temperature=1.0, seed=3)
    client, events = running.client, running.client.watch()
    assert on_a_loop(address, told) == [
        client.generate("x", adapter="a1", sampling=SHORT),
        client.answers("x", adapter="a1", sampling=two),
        client.tokenize("x"),
        client.model().fingerprint,
        [each.name for each in client.adapters()],
        client.adapter("a1"),
        [next(events).adapter.name for _ in range(4)],
    ]
    events.close()


def test_they_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)


def test_what_has_begun_is_not_begun_again(fake: FakeServer) -> None:
    fake.plan = [fails(AWAY), fails(AWAY, "one ")]

    async def work(client: AsyncClient) -> list[str]:
        texts = []
        with pytest.raises(Unavailable):
            async for text in client.stream("x"):
                texts.append(text)
        return texts

    assert on_a_loop(fake.address, work) == ["one "]
    assert len(fake.attempts) == 2


def test_closing_a_client_ends_its_calls(fake: FakeServer) -> None:
    fake.plan = [hangs, hangs, fails(FULL, grpc_status_details_bin=later(30)), says("late")]

    async def work(client: AsyncClient) -> list[Any]:
        calls = [client.generate("x"), client.model(), client.tokenize("x")]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.to_thread(eventually, lambda: len(fake.plan) == 1)
        await asyncio.sleep(0.2)  # two hang now, the third waits
        await client.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(error) for error in on_a_loop(fake.address, work)] == [Cancelled] * 3


def test_who_waits_for_no_server_is_told() -> None:
    async def work(client: AsyncClient) -> None:
        await client.wait(0.2)

    with pytest.raises(TimeoutError, match=r"no server answered within 0\.2 s"):
        on_a_loop("127.0.0.1:1", work)
    with Client("127.0.0.1:1") as client, pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        client.wait(0.2)


def test_it_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient()
