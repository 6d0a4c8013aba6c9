"""A cancelled or expired request frees what it held, at once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from spieldose_proto import inference_pb2 as pb
from spieldose_server.client import Client, ClientError

from ..conftest import Running, eventually

LONG = pb.SamplingParams(max_tokens=400)


def test_a_closed_stream_frees_its_cache_and_lease(running: Running) -> None:
    stream = running.client.stream("hello", adapter="a1", sampling=LONG)
    next(stream)
    assert leases(running) == 1 and running.server.engine.held_pages > 0
    stream.close()
    eventually(lambda: idle(running))


def test_an_expired_deadline_frees_its_cache_and_lease(running: Running) -> None:
    with pytest.raises(ClientError) as caught:
        for _ in range(100):  # until one does not make it in time
            running.client.generate("hello", adapter="a1", sampling=LONG, timeout=0.2)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: idle(running))


def test_streams_cancelled_at_any_moment_leave_nothing_behind(running: Running) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(start_and_cancel, [running.client] * 64, range(64)))
    eventually(lambda: idle(running))
    assert not running.server.engine._gone
    assert not running.server.engine._cancelled


def test_a_lease_is_held_until_no_step_can_read_the_slot(running: Running) -> None:
    in_step, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        in_step.set()
        go_on.wait()

    stream = running.client.stream("hello", adapter="a1", sampling=LONG)
    next(stream)
    hook = running.base.model.register_forward_pre_hook(pause)
    assert in_step.wait(20)
    stream.close()
    running.client.unload("a1")
    time.sleep(0.5)
    assert running.state("a1") == "draining"
    hook.remove()
    go_on.set()
    eventually(lambda: running.state("a1") == "")


def test_a_cancelled_stream_disturbs_no_other(running: Running) -> None:
    alone = running.client.generate("hello", adapter="a2", sampling=LONG)
    with ThreadPoolExecutor(8) as pool:
        other = pool.submit(running.client.generate, "hello", adapter="a2", sampling=LONG)
        list(pool.map(start_and_cancel, [running.client] * 14, range(14)))
        assert other.result().token_ids == alone.token_ids


def start_and_cancel(client: Client, number: int) -> None:
    request = pb.GenerateRequest(
        text="hello", adapter_id=f"a{number % 4 + 1}", sampling_params=LONG
    )
    call = client.inference.Generate(request)
    time.sleep(number % 7 * 0.01)
    call.cancel()


def leases(running: Running) -> int:
    return sum(version.leases for version in running.server.store.list())


def idle(running: Running) -> bool:
    engine = running.server.engine
    active = engine._manager.batch_processor.scheduler.active_requests
    return leases(running) == 0 and not active and engine.held_pages == 0
